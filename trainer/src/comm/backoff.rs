//! Back-off: how a thread waits for something that nobody will wake it for.
//!
//! Neither mailboxes nor MPI wake a sleeper, so the communication thread has to look again and again.
//! How often depends on whether anybody waits for the result. If the step does, it leaves its core
//! free, messages follow each other closely, and a pause would cost more than it saves. If it
//! computes, every look takes the core away from it, and what is under way fills the network for
//! longer than a pause lasts.

use std::time::{Duration, Instant};

/// How long to pause between polls.
///
/// While somebody waits: not at all right after something moved, then giving way to other threads,
/// then asleep, a tenth of the time waited so far. While everybody computes: asleep from the start,
/// half of that time. Either way at most [`Backoff::LONGEST`] and [`Backoff::LONGEST_BEHIND`].
#[derive(Default)]
pub(super) struct Backoff {
    since: Option<Instant>,
    awaited: bool,
}

/// What to do before the next poll.
pub(super) enum Pause {
    /// Poll again at once.
    Spin,
    /// Give way to another thread that can run.
    Yield,
    /// Sleep as long.
    Sleep(Duration),
}

impl Backoff {
    const SPIN: Duration = Duration::from_micros(20);
    const YIELD: Duration = Duration::from_micros(200);
    const SHORTEST: Duration = Duration::from_micros(20);
    const LONGEST: Duration = Duration::from_micros(200);
    const SHORTEST_BEHIND: Duration = Duration::from_micros(200);
    const LONGEST_BEHIND: Duration = Duration::from_micros(800);

    /// Something moved: begins with the shortest pause again.
    pub(super) fn reset(&mut self) {
        self.since = None;
    }

    /// The next pause; `awaited` says whether somebody waits. Who begins to wait is served at once.
    pub(super) fn next(&mut self, awaited: bool) -> Pause {
        if awaited && !self.awaited {
            self.reset();
        }
        self.awaited = awaited;
        let waited = self.since.get_or_insert_with(Instant::now).elapsed();
        if !awaited {
            Pause::Sleep((waited / 2).clamp(Self::SHORTEST_BEHIND, Self::LONGEST_BEHIND))
        } else if waited < Self::SPIN {
            Pause::Spin
        } else if waited < Self::YIELD {
            Pause::Yield
        } else {
            Pause::Sleep((waited / 10).clamp(Self::SHORTEST, Self::LONGEST))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_wait_sleeps_and_a_reset_wakes_it_up() {
        let mut backoff = Backoff::default();
        assert!(matches!(backoff.next(true), Pause::Spin));
        std::thread::sleep(Duration::from_millis(5));
        assert!(matches!(backoff.next(true), Pause::Sleep(pause) if pause == Backoff::LONGEST));
        backoff.reset();
        assert!(matches!(backoff.next(true), Pause::Spin));
    }

    #[test]
    fn behind_compute_it_sleeps_from_the_start() {
        let mut backoff = Backoff::default();
        let first = backoff.next(false);
        assert!(matches!(first, Pause::Sleep(pause) if pause == Backoff::SHORTEST_BEHIND));
        let awaited = backoff.next(true);
        assert!(!matches!(awaited, Pause::Sleep(pause) if pause > Backoff::LONGEST));
    }
}
