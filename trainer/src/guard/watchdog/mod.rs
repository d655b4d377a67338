//! The watchdog: notices ranks that die, hang or lag, and ends or saves the run.
//!
//! A rank that dies or hangs leaves the others waiting in a collective for ever: MPI between hosts
//! does not notice, and a job is paid for until somebody looks. So each rank has a watchdog thread
//! with a TCP connection of its own to rank 0. It works under any launcher, does not use MPI, and so
//! keeps working when MPI does not.
//!
//! ```text
//! step thread           watchdog thread of each rank              rank 0: Host
//! pulse.phase(…) ─┐
//! pulse.progress()├──▶ State, once a heartbeat ────────────────▶ table of all ranks
//! pulse.step(n)  ─┘    Heard ◀──────────────────────────────────┘   │
//!                                                                   ▼ every tick
//!   connection closed ─▶ dead      silence > lease ─▶ stopped      no progress > hang_timeout
//!                          └──────────────┬───────────────────────────┘
//!                      End ◀──────────────┘ table and verdict on standard error
//!                      stacks into the log, Dumped ─▶
//!                      Exit ◀── all have, or end_wait is over          hooks.exit(verdict)
//!
//! stop flag, request_stop ─▶ Stop ─▶ Stop to all: each stop flag becomes true
//!                      (the step ends within stop_grace: the ordinary stop, nothing more)
//!                      Freeze ◀────────── the step does not end
//! submit_control → Err Frozen{submitted} ─▶ m = the least
//! abandoned() = m      Abandon{m} ◀───────┘
//! saved(m) ─────────▶  Saved ───────────▶ all: Parts ─▶ rank 0 commits ─▶ committed() ─▶ Leave
//! ```
//!
//! # What it promises
//!
//! - A rank whose process dies is noticed within a few ticks; one that is stopped or whose host is
//!   gone within `lease`; one that makes no progress within `hang_timeout` (`start_timeout` while it
//!   starts). When rank 0 is the one, every other rank notices by itself.
//! - The verdict names the rank that keeps the others waiting, not one that waits ([`parse_verdict`]
//!   reads it), and after a hang each rank's log shows the stacks of all its threads.
//! - A request to stop on any rank reaches all. If the step cannot end in time, all ranks leave it
//!   and save the state after one and the same step, without a collective: the essay in `stop`
//!   proves it, its tests walk every interleaving.
//! - A rank that says [`Watchdog::leave`] is not missed. One that drops its watchdog without, is.
//! - Only who knows the secret of the run, which travels over MPI, can join; a frame is bounded,
//!   a stranger is read 104 bytes of.
//!
//! # What it does not
//!
//! - It exits nothing itself: the binary gives the hook that does.
//! - It cannot tell a rank that computes wrongly from one that computes; see the replica check.
//! - A run that still starts is not abandoned on a request to stop; there is nothing to save yet.
//! - After the handshake frames are neither encrypted nor signed: whoever can alter packets between
//!   the hosts of a run can end it, as they can with MPI's own.

mod client;
mod court;
mod error;
mod gate;
mod handshake;
mod host;
mod invitation;
mod link;
mod pulse;
mod settings;
mod slow;
mod stop;
mod verdict;
mod wire;

use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use client::{Client, Command, Facts, News, State};
pub use error::WatchdogError;
pub use gate::{Abandoned, Mark};
pub use host::Host;
pub use invitation::Invitation;
use link::{Link, LocalLink, TcpLink};
use pulse::lock;
pub use pulse::{Phase, Pulse};
pub use settings::Settings;
pub use slow::SlowRank;
pub use verdict::{VERDICT_MARK, parse_verdict};
use wire::{FromRank, short};

/// How long rank 0 waits for the goodbyes of the others.
const CLOSE_LIMIT: Duration = Duration::from_secs(10);

/// How long a goodbye may take.
const GOODBYE_LIMIT: Duration = Duration::from_secs(2);

/// Ends the process, given the verdict. It is called on a thread of the watchdog, while other
/// threads may be stuck; so it must not wait for them.
pub type ExitHook = Arc<dyn Fn(&str) + Send + Sync>;

/// What the watchdog calls. All are called on its own threads and should return soon.
#[derive(Clone)]
pub struct Hooks {
    /// The run is lost.
    pub exit: ExitHook,
    /// The step after this one is being abandoned; makes the step thread's waits end with an error.
    /// Waits of this step itself must go on: all ranks take part in it to its end.
    pub on_abandon: Arc<dyn Fn(u64) + Send + Sync>,
    /// The collective that the step thread waits for just now, as `all-reduce on lane 3`.
    pub waits_for: Arc<dyn Fn() -> Option<String> + Send + Sync>,
    /// Writes down what all threads are doing; [`log_stacks`] unless a test wants otherwise.
    pub dump: Arc<dyn Fn() + Send + Sync>,
}

impl Hooks {
    /// Hooks with an exit, for a step thread that waits for nothing.
    #[must_use]
    pub fn new(exit: ExitHook) -> Self {
        Self {
            exit,
            on_abandon: Arc::new(|_| {}),
            waits_for: Arc::new(|| None),
            dump: Arc::new(log_stacks),
        }
    }
}

impl std::fmt::Debug for Hooks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hooks").finish_non_exhaustive()
    }
}

/// How an abandoned run ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Departure {
    /// Every rank has saved its part, and rank 0 has committed them.
    pub complete: bool,
    /// In words.
    pub detail: String,
}

/// A rank's part in the watchdog of its run.
///
/// Rank 0's also holds the [`Host`]. End it with [`Watchdog::leave`]; dropped without, this rank
/// counts as lost.
#[derive(Debug)]
pub struct Watchdog {
    pulse: Arc<Pulse>,
    news: Arc<News>,
    commands: Sender<Command>,
    host: Option<Host>,
}

impl Watchdog {
    /// Joins the run of `invitation` as rank `rank` of `world`. Rank 0 hands in its `host`.
    ///
    /// `stop` goes both ways: once true here, all ranks are told within a tick; told by another,
    /// it becomes true here.
    ///
    /// # Errors
    /// [`WatchdogError::Unreachable`] when rank 0 does not answer, with what was tried.
    pub fn join(
        invitation: &Invitation,
        host: Option<Host>,
        rank: usize,
        world: usize,
        settings: &Settings,
        hooks: Hooks,
        stop: Arc<AtomicBool>,
    ) -> Result<Self, WatchdogError> {
        let link = TcpLink::connect(invitation, rank, world, settings)?;
        Self::start(Box::new(link), host, rank, settings, hooks, stop)
    }

    /// The watchdog of a world of one: no socket, the same promises.
    ///
    /// # Errors
    /// [`WatchdogError::System`] when there is no thread to be had.
    pub fn alone(
        settings: &Settings,
        hooks: Hooks,
        stop: Arc<AtomicBool>,
    ) -> Result<Self, WatchdogError> {
        let link = LocalLink::new(settings);
        Self::start(Box::new(link), None, 0, settings, hooks, stop)
    }

    fn start(
        link: Box<dyn Link>,
        host: Option<Host>,
        rank: usize,
        settings: &Settings,
        hooks: Hooks,
        stop: Arc<AtomicBool>,
    ) -> Result<Self, WatchdogError> {
        let system = |what, reason: String| WatchdogError::System { what, reason };
        oxitron_kernels::stacks::prepare()
            .map_err(|error| system("the signal that shows stacks", error.to_string()))?;
        let pulse = Arc::new(Pulse::default());
        let news = Arc::new(News::default());
        let (commands, received) = mpsc::channel();
        let client = Client {
            link,
            rank,
            hosted: host.is_some(),
            settings: settings.clone(),
            hooks,
            stop,
            pulse: Arc::clone(&pulse),
            commands: received,
            news: Arc::clone(&news),
            state: State::default(),
        };
        std::thread::Builder::new()
            .name(format!("watchdog-{rank}"))
            .spawn(move || client.run())
            .map_err(|error| system("the thread of the watchdog", error.to_string()))?;
        Ok(Self {
            pulse,
            news,
            commands,
            host,
        })
    }

    /// Where the step thread says what it does.
    #[must_use]
    pub fn pulse(&self) -> &Arc<Pulse> {
        &self.pulse
    }

    /// Asks the whole run to stop. Only the first request of a run counts.
    pub fn request_stop(&self, reason: &str) {
        let reason = short(reason);
        self.send(FromRank::Stop { reason });
    }

    /// Why the run is to stop, once rank 0 has said so.
    #[must_use]
    pub fn stop_reason(&self) -> Option<String> {
        lock(&self.news.facts).stop_reason.clone()
    }

    /// Ranks found to be slow since the last call; only rank 0 knows.
    #[must_use]
    pub fn take_slow(&self) -> Vec<SlowRank> {
        self.host.as_ref().map(Host::take_slow).unwrap_or_default()
    }

    /// This rank has saved its part of the state after the abandoned step's predecessor, as
    /// [`Pulse::abandoned`] gave it.
    pub fn saved(&self, step: u64) {
        self.send(FromRank::Saved { step, error: None });
    }

    /// This rank could not. All ranks are told to leave.
    pub fn save_failed(&self, step: u64, reason: &str) {
        let error = Some(short(reason));
        self.send(FromRank::Saved { step, error });
    }

    /// Waits until all ranks have saved their parts; false when they will not have, or not within
    /// `limit`. Rank 0 then commits them and says [`Watchdog::committed`].
    #[must_use]
    pub fn wait_for_parts(&self, limit: Duration) -> bool {
        let known = |facts: &Facts| facts.parts.is_some() || facts.departure.is_some();
        self.wait(limit, known, |facts| {
            facts.parts.is_some() && facts.departure.is_none()
        })
    }

    /// Rank 0 has made the parts a checkpoint, or says why it could not. All ranks are told to
    /// leave. Of other ranks this is ignored.
    pub fn committed(&self, result: Result<(), &str>) {
        let error = result.err().map(short);
        self.send(FromRank::Committed { error });
    }

    /// Waits until all ranks are told to leave; nothing when that does not happen within `limit`.
    #[must_use]
    pub fn wait_for_leave(&self, limit: Duration) -> Option<Departure> {
        let known = |facts: &Facts| facts.departure.is_some();
        self.wait(limit, known, |facts| facts.departure.clone())
    }

    /// Says goodbye: this rank is done, and its end is no death. Rank 0 waits a little for the
    /// others to say it too. Best called after [`Comm::finish`](crate::comm::Comm::finish), so that
    /// ranks that cannot leave MPI are noticed as well.
    pub fn leave(mut self) {
        // A thread that has ended has nobody left to say it to.
        let _ = self.commands.send(Command::Leave);
        self.wait(GOODBYE_LIMIT, |facts| facts.over, |_| ());
        if let Some(host) = self.host.take() {
            host.close(CLOSE_LIMIT);
        }
    }

    fn send(&self, message: FromRank) {
        // The thread has ended only when the run has.
        let _ = self.commands.send(Command::Send(message));
    }

    /// Waits until `known`, the end of the thread or the limit.
    fn wait<T>(
        &self,
        limit: Duration,
        known: impl Fn(&Facts) -> bool,
        take: impl Fn(&Facts) -> T,
    ) -> T {
        let until = Instant::now() + limit;
        let mut facts = lock(&self.news.facts);
        loop {
            let left = until.checked_duration_since(Instant::now());
            let Some(left) = left.filter(|_| !known(&facts) && !facts.over) else {
                return take(&facts);
            };
            facts = self
                .news
                .changed
                .wait_timeout(facts, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

/// Writes the stacks of all threads of this process to its log.
pub fn log_stacks() {
    for thread in oxitron_kernels::stacks::capture() {
        tracing::error!("watchdog: {thread}");
    }
}

#[cfg(test)]
mod tests;
