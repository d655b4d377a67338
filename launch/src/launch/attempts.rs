//! The attempts of one launch: run, and after a failure wait, look who is left, and run again.
//!
//! An attempt is a whole life of all ranks; when it has failed, nobody of it is left on this machine.
//! Nothing is handed over from one to the next but the run directory: the ranks find the newest
//! valid checkpoint by themselves, as they do when a person starts the command again.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Result;
use oxitron_trainer::metrics::{Event, EventLog, next_attempt};

use super::crew::{Accepts, Crew, choose};
use super::reach::Reach;
use crate::ranks::{Decision, Ending, Failure, Job, Requests, Restarts, View, probe, supervise};

/// How often a pause looks for a request to stop.
const TICK: Duration = Duration::from_millis(100);

/// What is started, and how often.
pub(super) struct Attempts<'a> {
    /// The ranks of the first attempt.
    pub(super) job: Job,
    /// Restarts without a new checkpoint.
    pub(super) max_restarts: u32,
    /// The fewest ranks to go on with when machines are gone; all of them where not given.
    pub(super) min_ranks: Option<usize>,
    /// The run directory.
    pub(super) run_dir: &'a Path,
    /// Where its checkpoints lie.
    pub(super) checkpoints: &'a Path,
    /// Which numbers of ranks can run.
    pub(super) accepts: Accepts<'a>,
    /// How long a machine may take to answer.
    pub(super) probe_limit: Duration,
}

/// Who shows a person what happens between attempts as well.
pub(super) trait Watcher: View {
    /// An attempt that began at `begun` has failed.
    fn failed(&mut self, failure: &Failure, begun: SystemTime);
    /// Something that is worth a line.
    fn say(&mut self, words: &str);
    /// The ranks start again, as this attempt of the run.
    fn again(&mut self, attempt: u32);
}

impl Attempts<'_> {
    /// Runs until the end, whichever it is: of the last attempt.
    ///
    /// # Errors
    /// `mpirun` is missing or cannot be started.
    pub(super) fn run<W: Watcher>(&self, watcher: &mut W) -> Result<Ending> {
        let mut requests = Requests::watch()?;
        let mut restarts = Restarts::new(self.max_restarts);
        let mut reach = Reach::new(self.run_dir, self.checkpoints);
        let mut job = self.job.clone();
        let mut count = 0;
        loop {
            let begun = SystemTime::now();
            let failure = match supervise(&job, watcher, &mut requests)? {
                Ending::Failed(failure) => failure,
                ending => return Ok(ending),
            };
            watcher.failed(&failure, begun);
            let stop = requests.seen() > 0;
            let elsewhere = self.job.hosts.is_some();
            let decision = restarts.after(&failure, reach.look(), stop, elsewhere);
            let next = self.next(
                &failure,
                decision,
                &mut restarts,
                &mut requests,
                &reach,
                watcher,
            );
            let Some((next, note)) = next? else {
                return Ok(Ending::Failed(failure));
            };
            job = next;
            count += 1;
            let reason = match note {
                Some(note) => format!("{}; {note}", failure.headline()),
                None => failure.headline(),
            };
            let attempt = self.note(count, &failure, reason).unwrap_or_else(|error| {
                watcher.say(&format!(
                    "warning: the restart is not in events.jsonl: {error}"
                ));
                count + 1
            });
            watcher.again(attempt);
        }
    }

    /// Waits as decided and finds out where the next attempt runs, with what is worth saying about
    /// that; none when there is no next one.
    fn next<W: Watcher>(
        &self,
        failure: &Failure,
        mut decision: Decision,
        restarts: &mut Restarts,
        requests: &mut Requests,
        reach: &Reach,
        watcher: &mut W,
    ) -> Result<Option<(Job, Option<String>)>> {
        let mut what = failure.headline();
        let from = reach.from();
        loop {
            match decision {
                // As if there were no restarts: the report of the failure is all.
                Decision::GiveUp(_) if self.max_restarts == 0 => return Ok(None),
                Decision::GiveUp(reason) => {
                    watcher.say(&format!("{what}; {reason}"));
                    return Ok(None);
                }
                Decision::Again(again) => {
                    watcher.say(&format!("{what}; {again}, from {from}"));
                    if !pause(again.after, requests, watcher) {
                        return Ok(interrupted(&from, watcher));
                    }
                }
            }
            let mut job = self.job.clone();
            let Some(hosts) = &self.job.hosts else {
                return Ok(Some((job, None)));
            };
            let wanted = || {
                watcher.tick();
                requests.seen() > 0
            };
            let Some(answers) = probe(&hosts.names(), self.probe_limit, wanted)? else {
                return Ok(interrupted(&from, watcher));
            };
            let ranks = (self.job.ranks, self.min_ranks);
            match choose(hosts, &answers, ranks, self.accepts)? {
                Crew::Ready { hosts, ranks, note } => {
                    if let Some(note) = &note {
                        watcher.say(&format!("starting {note}"));
                    }
                    (job.hosts, job.ranks) = (Some(hosts), ranks);
                    return Ok(Some((job, note)));
                }
                Crew::Short(words) => {
                    what = words;
                    decision = restarts.machines_missing();
                }
            }
        }
    }

    /// Writes the restart down; returns the number of the attempt that begins with it. An attempt
    /// that failed before it left a trace has none.
    fn note(&self, count: u32, failure: &Failure, reason: String) -> Result<u32> {
        let failed = next_attempt(self.run_dir)?.saturating_sub(1).max(1);
        std::fs::create_dir_all(self.run_dir)?;
        EventLog::open(self.run_dir, failed)?.append(Event::Restart {
            restarts: count,
            failed_rank: failure.rank.and_then(|rank| u32::try_from(rank).ok()),
            reason,
        })?;
        Ok(failed + 1)
    }
}

/// Waits; false when a request to stop came meanwhile.
fn pause<W: Watcher>(length: Duration, requests: &mut Requests, watcher: &mut W) -> bool {
    let until = Instant::now() + length;
    loop {
        if requests.seen() > 0 {
            return false;
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return true;
        }
        watcher.tick();
        std::thread::sleep(left.min(TICK));
    }
}

fn interrupted<T, W: Watcher>(from: &str, watcher: &mut W) -> Option<T> {
    watcher.say(&format!(
        "stopped on request before the ranks were started again; the same command goes on from \
         {from}"
    ));
    None
}
