//! Back-off: how a thread waits for something that nobody will wake it for.
//!
//! Neither mailboxes nor MPI wake a sleeper, so the communication thread has to look again and again.
//! Messages mostly follow each other closely, and then a pause would cost more than it saves; but a
//! slow peer must not cost a core that computes. Hence a pause that grows with the time waited.

use std::time::{Duration, Instant};

/// How long to pause between polls: not at all right after something moved, then giving way to
/// other threads, then asleep, a tenth of the time waited so far but at most [`Backoff::LONGEST`].
#[derive(Default)]
pub(super) struct Backoff {
    since: Option<Instant>,
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

    /// Something moved: begins with the shortest pause again.
    pub(super) fn reset(&mut self) {
        self.since = None;
    }

    /// The next pause.
    pub(super) fn next(&mut self) -> Pause {
        let waited = self.since.get_or_insert_with(Instant::now).elapsed();
        if waited < Self::SPIN {
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
        assert!(matches!(backoff.next(), Pause::Spin));
        std::thread::sleep(Duration::from_millis(5));
        assert!(matches!(backoff.next(), Pause::Sleep(pause) if pause == Backoff::LONGEST));
        backoff.reset();
        assert!(matches!(backoff.next(), Pause::Spin));
    }
}
