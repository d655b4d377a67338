//! The times that the watchdog lives by.

use std::time::Duration;

/// The times that the watchdog lives by, the same on every rank.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Between two signs of life of a rank.
    pub heartbeat: Duration,
    /// A rank, or rank 0 as seen by the others, that is not heard of for so long is lost although
    /// its connection stands.
    pub lease: Duration,
    /// A rank that makes no progress for so long hangs.
    pub hang_timeout: Duration,
    /// The same while a rank starts: it loads weights, plans, compiles.
    pub start_timeout: Duration,
    /// How long a step may go on after a request to stop, before it is abandoned.
    pub stop_grace: Duration,
    /// How long the ranks may take to save after a step was abandoned, and rank 0 to commit.
    pub save_timeout: Duration,
    /// How long [`Watchdog::join`](super::Watchdog::join) tries to reach rank 0.
    pub join_timeout: Duration,
    /// How long ranks may write down their stacks before the run ends.
    pub end_wait: Duration,
    /// The interface (`ib0`) or the address of rank 0's host on which it listens when the world
    /// spans several hosts; all of its interfaces otherwise.
    pub interface: Option<String>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_secs(1),
            lease: Duration::from_secs(30),
            hang_timeout: Duration::from_secs(600),
            start_timeout: Duration::from_secs(1800),
            stop_grace: Duration::from_secs(10),
            save_timeout: Duration::from_secs(120),
            join_timeout: Duration::from_secs(30),
            end_wait: Duration::from_secs(2),
            interface: None,
        }
    }
}

impl Settings {
    /// How long a thread of the watchdog sleeps at most: short against the heartbeat, so that
    /// requests do not lie around, and long enough to cost nothing.
    pub(super) fn tick(&self) -> Duration {
        (self.heartbeat / 4).clamp(Duration::from_millis(2), Duration::from_millis(100))
    }
}
