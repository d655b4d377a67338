//! Exit codes.

use std::process::ExitCode;

use oxitron_trainer::config::ConfigError;
use oxitron_trainer::run::RunError;

/// A command line or configuration that is refused before any data is opened.
pub const USAGE: u8 = 2;
/// Stopped on request after a complete save; start again to go on (`EX_TEMPFAIL` of sysexits).
pub const STOPPED: u8 = 75;

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
