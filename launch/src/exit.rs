//! Exit codes.

use std::process::ExitCode;

use oxitron_trainer::config::ConfigError;
use oxitron_trainer::run::RunError;

/// A command line or configuration that is refused before any data is opened.
pub const USAGE: u8 = 2;
/// Stopped on request after a complete save; start again to go on (`EX_TEMPFAIL` of sysexits).
pub const STOPPED: u8 = 75;

/// An error with its causes, each said once: some messages repeat their cause, some leave it to be
/// printed after them.
pub fn describe(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1) {
        let cause = cause.to_string();
        if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    text
}

/// The exit code that tells what kind of error ended a command.
pub fn code_of(error: &anyhow::Error) -> ExitCode {
    let usage = error.downcast_ref::<ConfigError>().is_some()
        || error
            .downcast_ref::<RunError>()
            .is_some_and(RunError::is_usage)
        || matches!(
            error.downcast_ref::<oxitron_data::Error>(),
            Some(oxitron_data::Error::Option { .. })
        );
    if usage {
        ExitCode::from(USAGE)
    } else {
        ExitCode::FAILURE
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use anyhow::Context;

    use super::*;

    #[test]
    fn every_cause_is_said_once() {
        let cause = || io::Error::other("disk on fire");
        let repeated = anyhow::Error::from(cause()).context("a.toml: cannot read: disk on fire");
        assert_eq!(describe(&repeated), "a.toml: cannot read: disk on fire");
        let left_out = Err::<(), _>(cause()).context("cannot import hf");
        let said = left_out.map_err(|error| describe(&error));
        assert_eq!(said, Err("cannot import hf: disk on fire".to_owned()));
    }
}
