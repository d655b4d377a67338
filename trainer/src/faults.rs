//! Faults on purpose: what a test can make go wrong in a real run, and where.
//!
//! # Only in builds for tests
//!
//! Everything here does nothing unless the crate is built with the feature `faults` (of the binary:
//! `cargo build --release --features faults`), which no normal build has. Without it the functions
//! are empty, no crate is linked for them, and `FAILPOINTS` is not read.
//!
//! # How to ask for one
//!
//! The environment variable `FAILPOINTS` names points and what happens there, in the grammar of the
//! `fail` crate: `POINT=TERM->TERM…;POINT=…` with `TERM = [P%][N*]off|return(FAULT)|sleep(MS)|…`. A
//! term counts the visits of its point in this process; after `N` of them the next term holds.
//!
//! ```text
//! FAILPOINTS='disk::rename::before=3*off->1*return(kill@1);step::loss=return(nan#20)'
//! ```
//!
//! kills rank 1 before its fourth rename, and makes the loss of step 20 not a number on all ranks.
//! A `FAULT` is a word, with `@R` only on rank `R`, with `#S` only while step `S` is under way:
//!
//! | fault | what happens at the point |
//! |---|---|
//! | `kill` | the process dies at once (SIGKILL), as by a lost node or the memory killer |
//! | `stop` | the process stands still (SIGSTOP) until somebody sends SIGCONT: a hang |
//! | `sleep:MS` | the thread sleeps for so many milliseconds |
//! | `enospc`, `eacces` | the operation fails with this error of the system |
//! | `nan`, `spike:F` | the value of the point becomes NaN, or `F` times as large |
//!
//! A fault whose rank or step does not match has used up its visit: with `@` and `#`, leave out `N*`
//! or count the visits of the rank meant.
//!
//! # Where the points are
//!
//! - `disk::OPERATION::before` and `::after` for every change that a checkpoint makes on disk:
//!   `create_folder`, `create_file`, `write`, `sync_file`, `rename`, `remove_file`, `remove_folder`,
//!   `sync_folder`; and `disk::write::within`, where half of the bytes are written. An error *after*
//!   is of an operation that has taken place.
//! - `stage::begin::before` and `::after` where a stage that follows another is entered: before its
//!   data and optimizer are set up, and when they are.
//! - The step loop places others with [`at`].

use std::io;

/// What the code at a point has to bring about itself. `kill`, `stop` and `sleep` have happened when
/// [`at`] returns.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// Fail with this error of the system.
    Error(i32),
    /// Make the value NaN.
    Nan,
    /// Make the value so many times as large.
    Spike(f64),
}

impl Fault {
    /// The value that `value` becomes. An [`Fault::Error`] has no effect on it.
    pub fn apply(self, value: f64) -> f64 {
        match self {
            Self::Error(_) => value,
            Self::Nan => f64::NAN,
            Self::Spike(factor) => value * factor,
        }
    }
}

/// `FAILPOINTS` cannot be understood.
#[derive(Debug, thiserror::Error)]
#[error("FAILPOINTS: `{found}`: {detail}; the grammar is explained in trainer/src/faults.rs")]
pub struct Error {
    /// The part that was not understood.
    found: String,
    /// What was expected.
    detail: String,
}

/// Reads `FAILPOINTS`. The binary calls it once, before anything else. Does nothing in a build
/// without the feature `faults`.
///
/// # Errors
/// A point or fault that cannot be understood.
pub fn setup() -> Result<(), Error> {
    #[cfg(feature = "faults")]
    if let Some(text) = std::env::var_os("FAILPOINTS") {
        active::configure(&text.to_string_lossy())?;
    }
    Ok(())
}

/// As [`setup`], from a text. Points that it names begin to count anew.
#[cfg(test)]
pub(crate) fn set(text: &str) {
    #[cfg(feature = "faults")]
    if let Err(error) = active::configure(text) {
        unreachable!("{error}");
    }
    #[cfg(not(feature = "faults"))]
    assert!(text.is_empty(), "this build knows no faults");
}

/// Says which rank this process is, for faults with `@R`.
#[inline]
pub fn set_rank(rank: usize) {
    #[cfg(feature = "faults")]
    active::RANK.store(rank as u64, std::sync::atomic::Ordering::Relaxed);
    #[cfg(not(feature = "faults"))]
    let _ = rank;
}

/// Says which step is under way, for faults with `#S`.
#[inline]
pub fn set_step(step: u64) {
    #[cfg(feature = "faults")]
    active::STEP.store(step, std::sync::atomic::Ordering::Relaxed);
    #[cfg(not(feature = "faults"))]
    let _ = step;
}

/// A point at which something can go wrong: what the caller is to make happen there, if anything.
#[inline]
pub fn at(point: &str) -> Option<Fault> {
    #[cfg(feature = "faults")]
    return active::at(point);
    #[cfg(not(feature = "faults"))]
    {
        let _ = point;
        None
    }
}

/// A point at which an operation can fail.
///
/// # Errors
/// The error that was asked for.
#[inline]
pub fn fail_at(point: &str) -> io::Result<()> {
    match at(point) {
        None => Ok(()),
        Some(Fault::Error(code)) => Err(io::Error::from_raw_os_error(code)),
        Some(other) => Err(io::Error::other(format!(
            "the fault {other:?} has no meaning at `{point}`"
        ))),
    }
}

/// The argument of `return(…)`.
#[cfg(any(test, feature = "faults"))]
mod grammar {
    use std::time::Duration;

    use super::Fault;

    /// A word of the grammar.
    #[derive(Clone, Copy, Debug, PartialEq)]
    pub(super) enum Effect {
        Kill,
        Stop,
        Sleep(Duration),
        Give(Fault),
    }

    /// A fault with its conditions.
    #[derive(Clone, Copy, Debug, PartialEq)]
    pub(super) struct Request {
        pub effect: Effect,
        pub rank: Option<u64>,
        pub step: Option<u64>,
    }

    impl Request {
        pub(super) fn parse(text: &str) -> Result<Self, String> {
            let mut rank = None;
            let mut step = None;
            let mut rest = text.trim();
            while let Some(at) = rest.rfind(['@', '#']) {
                let number = rest[at + 1..]
                    .parse()
                    .map_err(|_| format!("a number was expected after `{}`", &rest[at..=at]))?;
                let slot = if rest[at..].starts_with('@') {
                    &mut rank
                } else {
                    &mut step
                };
                if slot.replace(number).is_some() {
                    return Err(format!("`{}` is given twice", &rest[at..=at]));
                }
                rest = &rest[..at];
            }
            let (word, value) = match rest.split_once(':') {
                Some((word, value)) => (word, Some(value)),
                None => (rest, None),
            };
            let effect = match (word, value) {
                ("kill", None) => Effect::Kill,
                ("stop", None) => Effect::Stop,
                ("enospc", None) => Effect::Give(Fault::Error(libc::ENOSPC)),
                ("eacces", None) => Effect::Give(Fault::Error(libc::EACCES)),
                ("nan", None) => Effect::Give(Fault::Nan),
                ("spike", Some(factor)) => {
                    Effect::Give(Fault::Spike(factor.parse().map_err(|_| {
                        format!("`{factor}` is not a factor, as in `spike:100`")
                    })?))
                }
                ("sleep", Some(pause)) => {
                    Effect::Sleep(Duration::from_millis(pause.parse().map_err(|_| {
                        format!("`{pause}` is not a number of milliseconds, as in `sleep:500`")
                    })?))
                }
                _ => {
                    return Err(
                        "one of `kill`, `stop`, `sleep:MS`, `enospc`, `eacces`, `nan`, `spike:F` \
                         was expected"
                            .to_owned(),
                    );
                }
            };
            Ok(Self { effect, rank, step })
        }

        pub(super) fn applies(&self, rank: u64, step: u64) -> bool {
            self.rank.is_none_or(|wanted| wanted == rank)
                && self.step.is_none_or(|wanted| wanted == step)
        }
    }
}

#[cfg(feature = "faults")]
mod active {
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
    use std::thread;

    use rustix::process::{Signal, getpid, kill_process};

    use super::grammar::{Effect, Request};
    use super::{Error, Fault};

    /// Neither is known before the run says so; then no condition on it holds.
    pub(super) static RANK: AtomicU64 = AtomicU64::new(u64::MAX);
    pub(super) static STEP: AtomicU64 = AtomicU64::new(u64::MAX);

    /// As `fail::FailScenario::setup`, with an error in place of a panic, and with the faults
    /// checked before the run begins rather than when they are due.
    pub(super) fn configure(text: &str) -> Result<(), Error> {
        for point in text
            .split(';')
            .map(str::trim)
            .filter(|text| !text.is_empty())
        {
            let refuse = |detail: String| Error {
                found: point.to_owned(),
                detail,
            };
            let Some((name, terms)) = point.split_once('=') else {
                return Err(refuse("POINT=TERM was expected".to_owned()));
            };
            for term in terms.split("->") {
                let Some((_, fault)) = term.split_once("return") else {
                    continue;
                };
                let fault = fault.trim().strip_prefix('(');
                let fault = fault.and_then(|fault| fault.strip_suffix(')'));
                Request::parse(fault.unwrap_or_default()).map_err(&refuse)?;
            }
            fail::cfg(name.trim(), terms).map_err(&refuse)?;
        }
        Ok(())
    }

    pub(super) fn at(point: &str) -> Option<Fault> {
        let argument = visit(point)?;
        // Checked in `configure`; a test that goes past it sees nothing happen and fails.
        let request = Request::parse(&argument).ok()?;
        if !request.applies(RANK.load(Relaxed), STEP.load(Relaxed)) {
            return None;
        }
        eprintln!("fault at {point}: {argument}");
        let signal = match request.effect {
            Effect::Give(fault) => return Some(fault),
            Effect::Sleep(pause) => {
                thread::sleep(pause);
                return None;
            }
            Effect::Kill => Signal::KILL,
            Effect::Stop => Signal::STOP,
        };
        if let Err(error) = kill_process(getpid(), signal) {
            eprintln!("fault at {point}: {argument} failed: {error}");
        }
        None
    }

    /// The argument of the `return` that holds now.
    fn visit(point: &str) -> Option<String> {
        fail::fail_point!(point, |argument: Option<String>| argument);
        None
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::grammar::{Effect, Request};
    use super::*;

    #[test]
    fn faults_have_conditions() {
        let parse = |text| Request::parse(text).unwrap();
        assert_eq!(parse("kill").effect, Effect::Kill);
        let request = parse("enospc#20@1");
        assert_eq!(request, parse("enospc@1#20"));
        assert_eq!(request.effect, Effect::Give(Fault::Error(libc::ENOSPC)));
        assert!(request.applies(1, 20));
        assert!(!request.applies(0, 20) && !request.applies(1, 21));
        assert!(parse("stop").applies(5, 6));
        assert!(!parse("stop@0").applies(u64::MAX, 6));
        assert_eq!(
            parse("spike:1e3@0").effect,
            Effect::Give(Fault::Spike(1000.0))
        );
        for wrong in [
            "", "boom", "kill@", "kill@x", "kill@1@2", "nan:3", "spike", "spike:x", "sleep:-1",
        ] {
            assert!(Request::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn values_are_spoiled() {
        assert!(Fault::Nan.apply(1.0).is_nan());
        assert_eq!(Fault::Spike(8.0).apply(2.0), 16.0);
    }

    #[cfg(not(feature = "faults"))]
    #[test]
    fn a_normal_build_has_no_faults() {
        set_rank(0);
        set_step(1);
        assert!(setup().is_ok());
        assert_eq!(at("disk::write::before"), None);
    }

    #[cfg(feature = "faults")]
    #[test]
    fn a_configured_point_fails_when_its_turn_comes() {
        for wrong in [
            "a",
            "a=return",
            "a=return(boom)",
            "a=banana",
            "a=return(kill",
        ] {
            assert!(active::configure(wrong).is_err(), "{wrong}");
        }
        active::configure("t::one=1*off->1*return(enospc);t::two=return(nan@3#9)").unwrap();
        assert!(fail_at("t::one").is_ok());
        let error = fail_at("t::one").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
        assert!(fail_at("t::one").is_ok());
        set_rank(3);
        set_step(8);
        assert_eq!(at("t::two"), None);
        set_step(9);
        assert_eq!(at("t::two"), Some(Fault::Nan));
        assert!(fail_at("t::two").is_err());
    }
}
