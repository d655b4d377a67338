//! Which ranks are slower than the rest.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Steps that a rank is judged by.
const WINDOW: usize = 16;

/// How much slower than the median of all ranks a rank may be.
const FACTOR: f64 = 1.25;

/// How long a rank that was reported is not reported again.
const QUIET: Duration = Duration::from_secs(600);

/// A rank that holds up the others.
#[derive(Clone, Debug, PartialEq)]
pub struct SlowRank {
    /// The rank.
    pub rank: usize,
    /// Its host.
    pub host: String,
    /// The newest step that it was judged by.
    pub step: u64,
    /// The median of its own seconds over its last steps.
    pub busy_seconds: f64,
    /// The median of that over all ranks.
    pub median_seconds: f64,
}

impl std::fmt::Display for SlowRank {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "rank {} ({}) is slow: {:.3} s of its own in a step, the median of all ranks is {:.3} s \
             (median of {WINDOW} steps, up to step {}); look at the load, the clock and the memory \
             of its host",
            self.rank, self.host, self.busy_seconds, self.median_seconds, self.step
        )
    }
}

/// The last steps of every rank.
#[derive(Debug)]
pub(super) struct SlowRanks {
    ranks: Vec<Times>,
    /// Something new has come since the last look.
    news: bool,
}

#[derive(Clone, Debug, Default)]
struct Times {
    seconds: VecDeque<f64>,
    step: u64,
    reported: Option<Instant>,
}

impl SlowRanks {
    pub(super) fn new(ranks: usize) -> Self {
        Self {
            ranks: vec![Times::default(); ranks],
            news: false,
        }
    }

    /// Takes in a rank's own seconds of a step.
    pub(super) fn record(&mut self, rank: usize, step: u64, seconds: f64) {
        let Some(times) = self.ranks.get_mut(rank) else {
            return;
        };
        if !(seconds.is_finite() && seconds >= 0.0) {
            return;
        }
        if times.seconds.len() == WINDOW {
            times.seconds.pop_front();
        }
        times.seconds.push_back(seconds);
        times.step = step;
        self.news = true;
    }

    /// The ranks that are slow and were not reported lately: (rank, step, own median, median of
    /// all). Nobody is judged before every rank has a full window.
    pub(super) fn look(&mut self, now: Instant) -> Vec<(usize, u64, f64, f64)> {
        let full = self.ranks.iter().all(|times| times.seconds.len() == WINDOW);
        if !std::mem::take(&mut self.news) || !full {
            return Vec::new();
        }
        let own: Vec<f64> = self
            .ranks
            .iter()
            .map(|times| median(times.seconds.iter().copied()))
            .collect();
        let all = median(own.iter().copied());
        let mut slow = Vec::new();
        for (rank, (times, own)) in self.ranks.iter_mut().zip(own).enumerate() {
            let quiet = times
                .reported
                .is_some_and(|at| now.saturating_duration_since(at) < QUIET);
            if own > FACTOR * all && !quiet {
                times.reported = Some(now);
                slow.push((rank, times.step, own, all));
            }
        }
        slow
    }
}

/// The lower median.
fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_unstable_by(f64::total_cmp);
    let middle = values.len().saturating_sub(1) / 2;
    values.get(middle).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(slow: &mut SlowRanks, rank: usize, seconds: f64) {
        for step in 0..WINDOW as u64 {
            slow.record(rank, step, seconds);
        }
    }

    #[test]
    fn a_rank_past_the_factor_is_reported_once_in_ten_minutes() {
        let now = Instant::now();
        let mut slow = SlowRanks::new(4);
        for rank in 0..3 {
            fill(&mut slow, rank, 1.0);
        }
        assert_eq!(slow.look(now), [], "rank 3 has no window yet");
        fill(&mut slow, 3, 1.3);
        assert_eq!(slow.look(now), [(3, 15, 1.3, 1.0)]);
        assert_eq!(slow.look(now), [], "nothing new");
        slow.record(3, 16, 1.3);
        assert_eq!(slow.look(now + QUIET / 2), []);
        slow.record(3, 17, 1.3);
        assert_eq!(slow.look(now + QUIET), [(3, 17, 1.3, 1.0)]);
    }

    #[test]
    fn one_slow_step_or_a_small_lag_is_no_slow_rank() {
        let mut slow = SlowRanks::new(2);
        fill(&mut slow, 0, 1.0);
        fill(&mut slow, 1, 1.2);
        slow.record(1, 16, 50.0);
        slow.record(1, 17, f64::NAN);
        assert_eq!(slow.look(Instant::now()), []);
    }
}
