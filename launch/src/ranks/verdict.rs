//! Which rank died first, and how: read from what `mpirun` says.
//!
//! A rank that is killed cannot write anything, and its parent is `mpirun` (or a daemon on another
//! machine), so `mpirun`'s words are the one source that knows about every rank. Its sentences, of
//! Open MPI 4 and 5, are these:
//!
//! ```text
//! mpirun noticed that process rank 1 with PID 0 on node vm exited on signal 9 (Killed).
//!
//! The first process to do so was:
//!   Process name: [[24697,1],3]
//!   Exit code:    1
//! ```
//!
//! Lines may be wrapped differently, so they are joined before they are searched. Open MPI leaves
//! them out now and then (a rank that dies while others still start); then only the exit code of
//! `mpirun` is known, which is that of the rank, or 128 and the signal.
//!
//! `mpirun` names whoever *exited* first. Where a rank hangs or its machine vanishes, that is one of
//! those who noticed. Two kinds of words name the culprit then, and win: those of the watchdog on
//! rank 0 (`watchdog: lost rank 2 (node7, pid 4711): its connection closed`), and the error with
//! which a rank follows another (`rank 2 failed, see its log; …`).

use std::fmt;

use oxitron_trainer::guard::watchdog::parse_verdict;

/// Words of the error of a rank that leaves because another one, named before, has failed.
const FOLLOWS_MARK: &str = " failed, see its log";

/// How a rank ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum How {
    /// It returned this exit code, not 0.
    Exit(i32),
    /// This signal killed it.
    Signal(i32),
    /// The watchdog lost it, with this for a reason.
    Lost(String),
}

impl How {
    /// What an exit code of `mpirun` or of a shell says about the process below it.
    pub fn from_exit_code(code: i32) -> Self {
        if (129..=192).contains(&code) {
            Self::Signal(code - 128)
        } else {
            Self::Exit(code)
        }
    }
}

impl fmt::Display for How {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exit(code) => write!(f, "exited with code {code}"),
            Self::Signal(9) => {
                write!(
                    f,
                    "was killed by SIGKILL (often the system, when memory runs out)"
                )
            }
            Self::Signal(signal) => match signal_hook::low_level::signal_name(*signal) {
                Some(name) => write!(f, "was killed by {name}"),
                None => write!(f, "was killed by signal {signal}"),
            },
            Self::Lost(reason) => write!(f, "was lost {reason}"),
        }
    }
}

/// The rank that died first and how, if `words` (all of `mpirun`'s own output) say so.
pub fn first_death(words: &str) -> Option<(usize, How)> {
    let words = words.split_whitespace().collect::<Vec<_>>().join(" ");
    killed(&words).or_else(|| exited(&words))
}

/// The rank that a line of the watchdog names as lost, and why.
pub fn lost(line: &str) -> Option<(usize, String)> {
    let (rank, reason) = parse_verdict(line)?;
    Some((rank, reason.trim().to_owned()))
}

/// The rank whose failure a line of another rank gives as its reason.
pub fn followed(line: &str) -> Option<usize> {
    let (before, _) = line.split_once(FOLLOWS_MARK)?;
    let (_, rank) = before.rsplit_once("rank ")?;
    rank.parse().ok()
}

fn killed(words: &str) -> Option<(usize, How)> {
    let (_, rest) = words.split_once("noticed that process rank ")?;
    let rank = leading_number(rest)?;
    let (_, rest) = rest.split_once("on signal ")?;
    Some((
        rank,
        How::Signal(i32::try_from(leading_number(rest)?).ok()?),
    ))
}

fn exited(words: &str) -> Option<(usize, How)> {
    let (_, rest) = words.split_once("Process name: ")?;
    let (name, rest) = rest.split_once(" Exit code: ")?;
    // `[[job],rank]` in version 4, `[name@job,rank]` in version 5.
    let rank = leading_number(name.rsplit(',').next()?)?;
    Some((rank, How::Exit(i32::try_from(leading_number(rest)?).ok()?)))
}

fn leading_number(text: &str) -> Option<usize> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    text[..digits].parse().ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_killed_rank_is_found_even_when_the_line_is_wrapped() {
        let words = "--------\nprterun noticed that process rank 12 with PID 4711 on node gpu-3 \
                     exited on\nsignal 11 (Segmentation fault).\n--------\n";
        assert_eq!(first_death(words), Some((12, How::Signal(11))));
        assert_eq!(How::Signal(11).to_string(), "was killed by SIGSEGV");
    }

    #[test]
    fn an_exit_code_is_found_in_the_words_of_both_versions() {
        for name in ["[[24697,1],3]", "[prterun-vm-25065@1,3]"] {
            let words = format!(
                "mpirun detected that one or more processes exited with non-zero status, thus \
                 causing\nthe job to be terminated. The first process to do so was:\n\n  \
                 Process name: {name}\n  Exit code:    75\n----\n"
            );
            assert_eq!(first_death(&words), Some((3, How::Exit(75))));
        }
    }

    #[test]
    fn the_watchdog_names_who_is_lost_and_why() {
        let line = "WARN watchdog: lost rank 12 (node7, pid 4711): its connection closed; ends";
        let (rank, reason) = lost(line).unwrap();
        assert_eq!(rank, 12);
        assert_eq!(
            How::Lost(reason).to_string(),
            "was lost (node7, pid 4711): its connection closed; ends"
        );
        assert_eq!(lost("watchdog: all ranks live"), None);
    }

    #[test]
    fn a_rank_that_follows_another_names_it() {
        use oxitron_trainer::run::RunError;
        let error = RunError::OtherRank {
            rank: 13,
            usage: false,
        }
        .to_string();
        assert_eq!(followed(&format!("oxitron: {error}")), Some(13));
        assert_eq!(followed("oxitron: no rank failed"), None);
    }

    #[test]
    fn other_words_name_nobody() {
        assert_eq!(
            first_death("Primary job  terminated normally, but 1 process returned"),
            None
        );
        assert_eq!(first_death(""), None);
        assert_eq!(How::from_exit_code(137), How::Signal(9));
        assert_eq!(How::from_exit_code(3), How::Exit(3));
    }
}
