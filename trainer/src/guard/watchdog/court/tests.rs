#![allow(clippy::unwrap_used, clippy::panic)]

use super::super::gate::Mark;
use super::*;

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// A court whose ranks have all joined, with a clock of its own.
struct Bench {
    court: Court,
    now: Instant,
    progress: u64,
}

impl Bench {
    fn new(ranks: usize) -> Self {
        let mut bench = Self::empty(ranks);
        for rank in 0..ranks {
            bench.court.joined(rank, bench.now);
        }
        bench
    }

    fn empty(ranks: usize) -> Self {
        let now = Instant::now();
        Self {
            court: Court::new(ranks, &Settings::default(), now),
            now,
            progress: 0,
        }
    }

    /// `rank` says that it goes on in `phase`.
    fn goes_on(&mut self, rank: usize, phase: Phase) {
        self.progress += 1;
        self.says(rank, phase, self.progress, None);
    }

    fn says(&mut self, rank: usize, phase: Phase, progress: u64, waits_for: Option<&str>) {
        let state = PulseState {
            phase,
            progress,
            waits_for: waits_for.map(str::to_owned),
            ..PulseState::default()
        };
        self.court.heard(rank, FromRank::State(state), self.now);
    }

    /// One second passes.
    fn second(&mut self) {
        self.now += seconds(1);
        self.court.tick(self.now);
    }

    /// Everything ordered since the last call, without the answers to signs of life.
    fn orders(&mut self) -> Vec<Order> {
        let mut orders = self.court.orders();
        orders.retain(|order| !matches!(order, Order::Tell(_, ToRank::Heard)));
        orders
    }

    /// The verdict among the orders.
    fn verdict(&mut self) -> Option<Verdict> {
        self.orders().into_iter().find_map(|order| match order {
            Order::Announce(verdict) => Some(verdict),
            _ => None,
        })
    }
}

#[test]
fn every_sign_of_life_is_answered() {
    let mut bench = Bench::new(2);
    bench.goes_on(1, Phase::Forward);
    assert_eq!(bench.court.orders(), [Order::Tell(1, ToRank::Heard)]);
}

/// Rank 1 waits for rank 0, which saves for longer than any time-out, and then hangs.
#[test]
fn who_waits_for_a_rank_that_goes_on_is_not_stalled() {
    let mut bench = Bench::new(2);
    let limit = Settings::default().hang_timeout.as_secs();
    let waiting = Some("all-reduce on lane 0 (ranks 0, 1)");
    for _ in 0..3 * limit {
        bench.goes_on(0, Phase::Save);
        bench.says(1, Phase::Save, 1, waiting);
        bench.second();
        assert!(bench.verdict().is_none());
    }
    let stands = bench.progress;
    let mut found = None;
    for _ in 0..limit + 2 {
        bench.says(0, Phase::Save, stands, None);
        bench.says(1, Phase::Save, 1, waiting);
        bench.second();
        found = found.or(bench.verdict());
    }
    let line = found.unwrap().line;
    assert!(line.starts_with("watchdog: lost rank 0 "), "{line}");
}

#[test]
fn a_closed_connection_is_a_death_at_once_and_the_end() {
    let mut bench = Bench::new(3);
    bench.court.closed(1);
    bench.court.tick(bench.now);
    let orders = bench.orders();
    let [
        Order::Announce(verdict),
        Order::TellAll(ToRank::End { dump: false, .. }),
    ] = &*orders
    else {
        panic!("{orders:?}")
    };
    assert!(
        verdict.line.starts_with("watchdog: lost rank 1 "),
        "{}",
        verdict.line
    );
    // The others have their time, but no more than they need.
    bench.court.heard(0, FromRank::Dumped, bench.now);
    bench.court.tick(bench.now);
    assert_eq!(bench.orders(), []);
    bench.court.heard(2, FromRank::Dumped, bench.now);
    bench.court.tick(bench.now);
    let line = verdict.line.clone();
    assert_eq!(
        bench.orders(),
        [Order::TellAll(ToRank::Exit), Order::Exit(line)]
    );
    bench.second();
    assert_eq!(bench.orders(), [], "the end comes once");
}

#[test]
fn the_end_does_not_wait_for_ever() {
    let mut bench = Bench::new(2);
    bench.court.closed(1);
    bench.court.tick(bench.now);
    bench.orders();
    bench.second();
    assert_eq!(bench.orders(), []);
    bench.second();
    assert!(matches!(
        &*bench.orders(),
        [Order::TellAll(ToRank::Exit), Order::Exit(_)]
    ));
}

#[test]
fn silence_is_judged_after_the_lease() {
    let mut bench = Bench::new(2);
    for _ in 0..30 {
        bench.goes_on(0, Phase::Forward);
        bench.second();
    }
    assert_eq!(bench.verdict(), None);
    bench.goes_on(0, Phase::Forward);
    bench.second();
    let line = bench.verdict().unwrap().line;
    assert!(
        line.starts_with("watchdog: lost rank 1 ") && line.contains("no word"),
        "{line}"
    );
}

#[test]
fn a_pause_of_rank_0_itself_is_forgiven() {
    let mut bench = Bench::new(2);
    bench.now += seconds(3600);
    bench.court.tick(bench.now);
    assert_eq!(bench.verdict(), None);
    // But not what comes after it.
    for _ in 0..31 {
        bench.goes_on(0, Phase::Forward);
        bench.second();
    }
    assert!(bench.verdict().unwrap().line.contains("lost rank 1 "));
}

#[test]
fn a_rank_that_never_joins_is_lost_after_the_start() {
    let mut bench = Bench::empty(2);
    bench.court.joined(0, bench.now);
    for _ in 0..1800 {
        bench.goes_on(0, Phase::Forward);
        bench.second();
    }
    assert_eq!(bench.verdict(), None);
    bench.second();
    let line = bench.verdict().unwrap().line;
    assert!(
        line.starts_with("watchdog: lost rank 1 (host unknown): it did not join"),
        "{line}"
    );
}

#[test]
fn a_stall_is_judged_by_the_phase() {
    for (phase, limit) in [(Phase::Starting, 1800), (Phase::Backward, 600)] {
        let mut bench = Bench::new(2);
        bench.says(1, phase, 1, None);
        for _ in 0..limit {
            bench.goes_on(0, Phase::Forward);
            bench.says(1, phase, 1, None);
            bench.second();
        }
        assert_eq!(bench.verdict(), None, "{phase:?}");
        bench.goes_on(0, Phase::Forward);
        bench.says(1, phase, 1, None);
        bench.second();
        let verdict = bench.verdict().unwrap();
        assert!(verdict.line.starts_with("watchdog: lost rank 1 ") && verdict.dump);
    }
}

#[test]
fn the_one_that_is_waited_for_is_judged_not_the_one_that_waits() {
    let mut bench = Bench::new(3);
    // Rank 1 computes for a while and gets stuck; the others have waited for it all the time.
    let mut verdict = None;
    for second in 0..700 {
        for rank in [0, 2] {
            bench.says(rank, Phase::Control, 1, Some("all-reduce on lane 0"));
        }
        let progress = 2 + second.min(50);
        bench.says(1, Phase::Forward, progress, None);
        bench.second();
        verdict = verdict.or(bench.verdict());
    }
    let line = verdict.unwrap().line;
    assert!(line.starts_with("watchdog: lost rank 1 "), "{line}");
}

#[test]
fn a_goodbye_is_answered_and_no_death() {
    let mut bench = Bench::new(2);
    bench.court.heard(1, FromRank::Goodbye, bench.now);
    assert_eq!(bench.orders(), [Order::Tell(1, ToRank::Farewell)]);
    bench.court.closed(1);
    for _ in 0..100 {
        bench.goes_on(0, Phase::Forward);
        bench.second();
    }
    assert_eq!(bench.verdict(), None);
    assert!(!bench.court.is_empty());
    bench.court.heard(0, FromRank::Goodbye, bench.now);
    assert!(bench.court.is_empty());
}

#[test]
fn a_seat_is_taken_once() {
    let mut bench = Bench::empty(2);
    assert!(bench.court.admits(1) && !bench.court.admits(2));
    bench.court.joined(1, bench.now);
    assert!(!bench.court.admits(1));
    bench.court.closed(1);
    assert!(!bench.court.admits(1), "the dead do not come back");
}

#[test]
fn a_rank_that_joins_late_hears_of_the_stop() {
    let mut bench = Bench::empty(2);
    bench.court.joined(0, bench.now);
    let reason = "time".to_owned();
    bench.court.heard(
        0,
        FromRank::Stop {
            reason: reason.clone(),
        },
        bench.now,
    );
    bench.orders();
    bench.court.joined(1, bench.now);
    assert_eq!(bench.orders(), [Order::Tell(1, ToRank::Stop { reason })]);
}

/// Orders within `limit` seconds after a request to stop, with ranks in these phases.
fn after_a_stop(phases: &[Phase], limit: u64) -> Vec<Order> {
    let mut bench = Bench::new(phases.len());
    for (rank, &phase) in phases.iter().enumerate() {
        bench.goes_on(rank, phase);
    }
    bench
        .court
        .heard(0, FromRank::Stop { reason: "t".into() }, bench.now);
    bench.orders();
    for _ in 0..limit {
        for (rank, &phase) in phases.iter().enumerate() {
            bench.goes_on(rank, phase);
        }
        bench.second();
    }
    bench.orders()
}

#[test]
fn a_step_is_frozen_only_when_it_is_late() {
    let freeze = [Order::TellAll(ToRank::Freeze)];
    assert_eq!(after_a_stop(&[Phase::Forward; 2], 9), []);
    assert_eq!(after_a_stop(&[Phase::Forward; 2], 10), freeze);
    assert_eq!(after_a_stop(&[Phase::Save, Phase::Forward], 10), freeze);
    assert_eq!(after_a_stop(&[Phase::Save, Phase::Finishing], 30), []);
    assert_eq!(after_a_stop(&[Phase::Starting, Phase::Control], 30), []);
}

#[test]
fn a_rank_that_leaves_a_frozen_step_spoils_the_save() {
    let mut bench = Bench::new(2);
    for rank in 0..2 {
        bench.goes_on(rank, Phase::Forward);
    }
    bench
        .court
        .heard(0, FromRank::Stop { reason: "t".into() }, bench.now);
    for _ in 0..10 {
        bench.second();
    }
    let mark = Mark {
        beginnings: 1,
        step: 3,
    };
    bench.court.heard(0, FromRank::Frozen { mark }, bench.now);
    bench.orders();
    bench.court.heard(1, FromRank::Goodbye, bench.now);
    let orders = bench.orders();
    let left = orders.iter().any(|order| {
        matches!(
            order,
            Order::TellAll(ToRank::Leave {
                complete: false,
                ..
            })
        )
    });
    assert!(left, "{orders:?}");
}

#[test]
fn after_leave_a_closed_connection_is_no_death() {
    let mut bench = Bench::new(1);
    bench.goes_on(0, Phase::Forward);
    bench
        .court
        .heard(0, FromRank::Stop { reason: "t".into() }, bench.now);
    for _ in 0..10 {
        bench.second();
    }
    let mark = Mark {
        beginnings: 1,
        step: 3,
    };
    bench.court.heard(0, FromRank::Frozen { mark }, bench.now);
    bench.court.heard(
        0,
        FromRank::Saved {
            step: 3,
            error: None,
        },
        bench.now,
    );
    bench
        .court
        .heard(0, FromRank::Committed { error: None }, bench.now);
    let orders = bench.orders();
    let last = orders.last();
    assert!(
        matches!(
            last,
            Some(Order::TellAll(ToRank::Leave { complete: true, .. }))
        ),
        "{orders:?}"
    );
    bench.court.closed(0);
    bench.second();
    assert_eq!(bench.verdict(), None);
}

#[test]
fn a_slow_rank_is_found() {
    let mut bench = Bench::new(2);
    for (rank, own) in [(0, 1.0), (1, 2.0)] {
        let state = PulseState {
            busy: (0..16).map(|step| (step, own)).collect(),
            ..PulseState::default()
        };
        bench.court.heard(rank, FromRank::State(state), bench.now);
    }
    for _ in 0..6 {
        bench.second();
    }
    let found = bench.court.slow_found();
    assert_eq!(found.len(), 1);
    assert_eq!(
        (found[0].rank, found[0].busy_seconds, found[0].step),
        (1, 2.0, 15)
    );
    assert!(bench.court.slow_found().is_empty());
}
