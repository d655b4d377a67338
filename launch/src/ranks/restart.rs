//! Whether a job that failed is started again, and after how long: a pure policy.
//!
//! Most failures of a long run are none of the run's fault (a machine, a link, a file system), and
//! starting again is the whole remedy. Some are: a config that is refused, a data file that is
//! gone. Those would fail in the same way for ever, so restarts are counted, and a failure that
//! repeats itself word by word while the run gets nowhere ends the matter early. A run that gets on
//! may fail as often as it likes: count and pause start anew with each new checkpoint.

use std::fmt;
use std::time::Duration;

use super::supervisor::Failure;
use super::verdict::How;

/// The pause before the first restart; each further one without a new checkpoint doubles it.
const FIRST_PAUSE: Duration = Duration::from_secs(1);

/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Exit code of a rank whose command line or config is refused.
const USAGE: i32 = 2;

/// Words of the error of ranks that give the run up, see [`RunError::BadSteps`]: they would come to
/// the same step again.
///
/// [`RunError::BadSteps`]: oxitron_trainer::run::RunError::BadSteps
const GIVEN_UP_MARK: &str = "the run is given up: ";

/// Words of the error of a rank that finds the run directory locked.
const LOCKED_MARK: &str = "is in use by another process";

/// How often in a row a locked run directory is waited for. A rank 0 on a machine that cannot be
/// reached holds the lock until it notices by itself; with the pauses these are five minutes.
const LOCKED_LIMIT: u32 = 10;

/// How `oxitron` begins the line that says why it failed.
const ERROR_MARK: &str = "oxitron: ";

/// How far an attempt got, compared with all before it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// A newer checkpoint is complete.
    pub saved: bool,
    /// A later step was taken.
    pub stepped: bool,
}

/// What follows from a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// The ranks are started again.
    Again(Again),
    /// They are not.
    GiveUp(Reason),
}

/// A restart to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Again {
    /// The pause before it.
    pub after: Duration,
    /// Its number since the last progress, and how many there may be; none where it does not count.
    pub number: Option<(u32, u32)>,
}

/// Why the ranks are not started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Nobody asked for restarts.
    NotWanted,
    /// Somebody asked for an end.
    StopRequested,
    /// The command line or the config was refused, or the training does not get anywhere.
    Refused,
    /// The ranks could not be started at all.
    NotStarted,
    /// The same happened twice in a row, and nothing else.
    Repeats,
    /// The run directory stays locked.
    Locked,
    /// All restarts are used up.
    UsedUp {
        /// How many there were.
        limit: u32,
    },
}

impl fmt::Display for Again {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.after.as_secs();
        match self.number {
            Some((number, limit)) => write!(f, "restart {number} of {limit} in {seconds} s"),
            None => write!(
                f,
                "the ranks of before may not have noticed yet that they are lost: another try in \
                 {seconds} s"
            ),
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotWanted => write!(f, "no restarts were asked for (--max-restarts)"),
            Self::StopRequested => write!(f, "a stop was asked for: no restart"),
            Self::Refused => write!(f, "no restart would change that"),
            Self::NotStarted => write!(f, "nothing ran: no restart"),
            Self::Repeats => write!(
                f,
                "two attempts in a row failed with the same words and without a further step: no \
                 restart would change that"
            ),
            Self::Locked => write!(f, "it stays so: no restart"),
            Self::UsedUp { limit: 1 } => write!(f, "the one restart is used up"),
            Self::UsedUp { limit } => {
                write!(
                    f,
                    "all {limit} restarts without a new checkpoint are used up"
                )
            }
        }
    }
}

/// What an attempt that returned 1 said at its end, and whether it had got anywhere.
#[derive(Debug, PartialEq, Eq)]
struct Trouble {
    words: Vec<String>,
    progress: Progress,
}

impl Trouble {
    fn of(failure: &Failure, progress: Progress) -> Option<Self> {
        let words = &failure.words;
        let error = words.iter().rposition(|line| line.contains(ERROR_MARK));
        (failure.how == How::Exit(1) && !words.is_empty()).then(|| Self {
            words: words[error.unwrap_or(0)..].to_vec(),
            progress,
        })
    }

    fn says(&self, mark: &str) -> bool {
        self.words.iter().any(|line| line.contains(mark))
    }
}

/// The restarts of a launch so far.
#[derive(Debug)]
pub struct Restarts {
    limit: u32,
    /// Those since the last progress.
    used: u32,
    /// Pauses since the last progress.
    pauses: u32,
    /// Attempts in a row that found the run directory locked.
    locked: u32,
    last: Option<Trouble>,
}

impl Restarts {
    /// At most `limit` restarts without a new checkpoint.
    pub fn new(limit: u32) -> Self {
        Self {
            limit,
            used: 0,
            pauses: 0,
            locked: 0,
            last: None,
        }
    }

    /// Decides after a failed attempt. `stop_requested`: somebody asked for an end meanwhile.
    /// `elsewhere`: ranks run on other machines, which may come back.
    pub fn after(
        &mut self,
        failure: &Failure,
        progress: Progress,
        stop_requested: bool,
        elsewhere: bool,
    ) -> Decision {
        if self.limit == 0 {
            return Decision::GiveUp(Reason::NotWanted);
        }
        if stop_requested {
            return Decision::GiveUp(Reason::StopRequested);
        }
        if failure.how == How::Exit(USAGE) {
            return Decision::GiveUp(Reason::Refused);
        }
        if !failure.started && !elsewhere {
            return Decision::GiveUp(Reason::NotStarted);
        }
        if progress.saved {
            (self.used, self.pauses) = (0, 0);
        }
        let trouble = Trouble::of(failure, progress);
        let says = |mark| trouble.as_ref().is_some_and(|trouble| trouble.says(mark));
        if says(GIVEN_UP_MARK) {
            return Decision::GiveUp(Reason::Refused);
        }
        if says(LOCKED_MARK) {
            self.locked += 1;
            if self.locked > LOCKED_LIMIT {
                return Decision::GiveUp(Reason::Locked);
            }
            let after = self.pause();
            return Decision::Again(Again {
                after,
                number: None,
            });
        }
        self.locked = 0;
        // Equal to the last in words and in progress, and the progress is none.
        let repeats = progress == Progress::default() && trouble.is_some() && trouble == self.last;
        self.last = trouble;
        if repeats {
            return Decision::GiveUp(Reason::Repeats);
        }
        self.count()
    }

    /// Decides when machines that the next attempt needs do not answer.
    pub fn machines_missing(&mut self) -> Decision {
        self.count()
    }

    fn count(&mut self) -> Decision {
        let limit = self.limit;
        if self.used >= limit {
            return Decision::GiveUp(Reason::UsedUp { limit });
        }
        self.used += 1;
        let after = self.pause();
        Decision::Again(Again {
            after,
            number: Some((self.used, limit)),
        })
    }

    fn pause(&mut self) -> Duration {
        // 2⁶ seconds are more than the longest pause already.
        let pause = FIRST_PAUSE * 2_u32.pow(self.pauses.min(6));
        self.pauses += 1;
        pause.min(LONGEST_PAUSE)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use oxitron_trainer::run::RunError;

    use super::*;

    const NOTHING: Progress = Progress {
        saved: false,
        stepped: false,
    };
    const STEPPED: Progress = Progress {
        saved: false,
        stepped: true,
    };
    const SAVED: Progress = Progress {
        saved: true,
        stepped: true,
    };

    fn failure(how: How, words: &str) -> Failure {
        Failure {
            rank: Some(1),
            how,
            words: words.lines().map(str::to_owned).collect(),
            started: true,
        }
    }

    fn killed() -> Failure {
        failure(How::Signal(9), "")
    }

    fn locked() -> Failure {
        let run_dir = "/runs/a".into();
        let error = RunError::Locked { run_dir };
        failure(How::Exit(1), &format!("oxitron: {error}"))
    }

    impl Restarts {
        fn see(&mut self, failure: &Failure, progress: Progress) -> Decision {
            self.after(failure, progress, false, false)
        }
    }

    /// The pause in seconds, and the number of the restart.
    fn again(decision: Decision) -> (u64, Option<u32>) {
        match decision {
            Decision::Again(again) => (
                again.after.as_secs(),
                again.number.map(|(number, _)| number),
            ),
            Decision::GiveUp(reason) => panic!("{reason}"),
        }
    }

    #[test]
    fn pauses_double_up_to_a_minute_and_a_checkpoint_starts_anew() {
        let mut restarts = Restarts::new(9);
        let seen: Vec<_> = (0..8)
            .map(|_| again(restarts.see(&killed(), STEPPED)))
            .collect();
        let pauses = [1, 2, 4, 8, 16, 32, 60, 60];
        let expected: Vec<_> = pauses.into_iter().zip((1..).map(Some)).collect();
        assert_eq!(seen, expected);
        assert_eq!(again(restarts.see(&killed(), SAVED)), (1, Some(1)));
        assert_eq!(again(restarts.see(&killed(), NOTHING)), (2, Some(2)));
    }

    #[test]
    fn some_failures_are_final_at_once() {
        let mut restarts = Restarts::new(3);
        let final_one = |decision| match decision {
            Decision::GiveUp(reason) => reason,
            Decision::Again(again) => panic!("{again}"),
        };
        let usage = failure(How::Exit(2), "oxitron: no");
        assert_eq!(final_one(restarts.see(&usage, SAVED)), Reason::Refused);
        let error = RunError::BadSteps("step 7: the loss is not finite".to_owned());
        let bad = failure(How::Exit(1), &format!("oxitron: {error}"));
        assert_eq!(final_one(restarts.see(&bad, SAVED)), Reason::Refused);
        let stopped = restarts.after(&killed(), SAVED, true, false);
        assert_eq!(final_one(stopped), Reason::StopRequested);
        let mut nothing_ran = failure(How::Exit(1), "no daemon");
        nothing_ran.started = false;
        let reason = final_one(restarts.see(&nothing_ran, NOTHING));
        assert_eq!(reason, Reason::NotStarted);
        // Other machines may come back.
        again(restarts.after(&nothing_ran, NOTHING, false, true));
        let none = Restarts::new(0).see(&killed(), SAVED);
        assert_eq!(final_one(none), Reason::NotWanted);
    }

    #[test]
    fn a_failure_that_repeats_itself_without_progress_ends_it_early() {
        let gone = |warning: &str| failure(How::Exit(1), &format!("{warning}\noxitron: no file"));
        let mut restarts = Restarts::new(9);
        again(restarts.see(&gone("12:01 slow"), NOTHING));
        let repeats = Decision::GiveUp(Reason::Repeats);
        assert_eq!(restarts.see(&gone("12:02 slow"), NOTHING), repeats);

        // Progress in between, other words, or another kind of end: it is not the same.
        let other = failure(How::Exit(1), "oxitron: no room");
        for (first, second) in [
            ((gone(""), STEPPED), (gone(""), NOTHING)),
            ((gone(""), NOTHING), (gone(""), STEPPED)),
            ((gone(""), NOTHING), (other, NOTHING)),
            ((killed(), NOTHING), (killed(), NOTHING)),
        ] {
            let mut restarts = Restarts::new(9);
            again(restarts.see(&first.0, first.1));
            again(restarts.see(&second.0, second.1));
        }
    }

    #[test]
    fn a_locked_folder_is_waited_for_without_counting_but_not_for_ever() {
        let mut restarts = Restarts::new(1);
        assert_eq!(again(restarts.see(&killed(), NOTHING)), (1, Some(1)));
        let mut waited = 0;
        for _ in 0..LOCKED_LIMIT {
            let (pause, number) = again(restarts.see(&locked(), NOTHING));
            assert_eq!(number, None);
            waited += pause;
        }
        assert!((240..600).contains(&waited), "{waited} s");
        let given_up = Decision::GiveUp(Reason::Locked);
        assert_eq!(restarts.see(&locked(), NOTHING), given_up);
    }

    /// All courses of seven attempts: restarts without a checkpoint are never more than the limit,
    /// pauses lie in their bounds, and without any checkpoint there is an end.
    #[test]
    fn every_course_keeps_the_limit_and_the_bounds() {
        let kinds = [
            (killed(), NOTHING),
            (killed(), SAVED),
            (failure(How::Exit(1), "oxitron: a"), NOTHING),
            (failure(How::Exit(1), "oxitron: b"), STEPPED),
            (locked(), NOTHING),
        ];
        const LENGTH: u32 = 7;
        for limit in 1..4 {
            for course in 0..5_usize.pow(LENGTH) {
                let mut restarts = Restarts::new(limit);
                let mut since_saved = 0;
                for place in 0..LENGTH {
                    let (failure, progress) = &kinds[course / 5_usize.pow(place) % 5];
                    if progress.saved {
                        since_saved = 0;
                    }
                    let Decision::Again(again) = restarts.see(failure, *progress) else {
                        break;
                    };
                    assert!((FIRST_PAUSE..=LONGEST_PAUSE).contains(&again.after));
                    since_saved += u32::from(again.number.is_some());
                    assert!(since_saved <= limit, "course {course}, limit {limit}");
                    assert!(
                        again
                            .number
                            .is_none_or(|(n, of)| n == since_saved && of == limit)
                    );
                }
            }
        }
        // Without a checkpoint: at most `limit` counted restarts with the lock's in between.
        let longest = (LOCKED_LIMIT + 1) * 4 + 1;
        for kind in [0, 2, 3, 4] {
            let mut restarts = Restarts::new(3);
            let ends = (0..longest).any(|turn| {
                let lock = turn % (LOCKED_LIMIT + 1) != 0;
                let (failure, progress) = &kinds[if lock { 4 } else { kind }];
                matches!(restarts.see(failure, *progress), Decision::GiveUp(_))
            });
            assert!(ends, "kind {kind} goes on for ever");
        }
    }

    #[test]
    fn missing_machines_count_like_failures() {
        let mut restarts = Restarts::new(3);
        again(restarts.see(&killed(), NOTHING));
        assert_eq!(again(restarts.machines_missing()), (2, Some(2)));
        assert_eq!(again(restarts.machines_missing()), (4, Some(3)));
        let given_up = Decision::GiveUp(Reason::UsedUp { limit: 3 });
        assert_eq!(restarts.machines_missing(), given_up);
    }

    #[test]
    fn a_restart_is_announced_in_one_line() {
        let decision = Restarts::new(3).see(&killed(), NOTHING);
        let Decision::Again(again) = decision else {
            panic!("{decision:?}");
        };
        assert_eq!(again.to_string(), "restart 1 of 3 in 1 s");
    }
}
