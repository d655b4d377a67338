//! Learning rates at the edges of each schedule.

use crate::config::{DecayShape, Schedule, ScheduleKind};

fn schedule(kind: ScheduleKind, warmup_steps: u64) -> Schedule {
    Schedule {
        peak: 2.0,
        steps: 100,
        warmup_steps,
        min_ratio: 0.1,
        kind,
        decay_steps: 20,
        decay_shape: DecayShape::Linear,
    }
}

const KINDS: [ScheduleKind; 4] = [
    ScheduleKind::Cosine,
    ScheduleKind::Linear,
    ScheduleKind::Constant,
    ScheduleKind::Wsd,
];

#[test]
fn warmup_is_that_of_lambda_lr() {
    for kind in KINDS {
        let schedule = schedule(kind, 10);
        for k in 0..10u64 {
            let factor = f64::min(1.0, (k + 1) as f64 / 10.0);
            assert_eq!(schedule.at(k), 2.0 * factor, "{kind:?} at {k}");
        }
    }
}

#[test]
fn the_last_step_has_the_least_rate_and_later_ones_repeat_it() {
    for kind in KINDS {
        for warmup in [0, 1, 10, 80] {
            let schedule = schedule(kind, warmup);
            let last = if kind == ScheduleKind::Constant {
                2.0
            } else {
                0.2
            };
            assert!(
                (schedule.at(99) - last).abs() < 1e-15,
                "{kind:?} {}",
                schedule.at(99)
            );
            assert_eq!(schedule.at(100), schedule.at(99));
            assert_eq!(schedule.at(u64::MAX), schedule.at(99));
        }
    }
}

#[test]
fn halfway_values() {
    // Warm-up 10, so 90 steps fall and the 45th of them, s = 55, is at p = 1/2.
    assert!((schedule(ScheduleKind::Cosine, 10).at(54) - 1.1).abs() < 1e-15);
    assert!((schedule(ScheduleKind::Linear, 10).at(54) - 1.1).abs() < 1e-15);
    // A quarter of the way: (1 + cos π/4) / 2 of the height, steps 0 to 100 without warm-up.
    let quarter = 2.0 * (0.1 + 0.9 * 0.5 * (1.0 + std::f64::consts::FRAC_1_SQRT_2));
    assert!((schedule(ScheduleKind::Cosine, 0).at(24) - quarter).abs() < 1e-15);
}

#[test]
fn without_warmup_the_first_step_is_near_the_peak() {
    assert_eq!(schedule(ScheduleKind::Constant, 0).at(0), 2.0);
    assert!((schedule(ScheduleKind::Linear, 0).at(0) - 2.0 * (0.1 + 0.9 * 0.99)).abs() < 1e-15);
    assert_eq!(schedule(ScheduleKind::Wsd, 0).at(0), 2.0);
}

#[test]
fn wsd_is_stable_and_then_decays_in_its_shape() {
    let mut wsd = schedule(ScheduleKind::Wsd, 10);
    // s = 80 is the last stable step, s = 81 the first of the decay; s = 85 is q = 1/4.
    for (shape, quarter) in [
        (DecayShape::Linear, 0.75),
        (DecayShape::Sqrt, 0.5),
        (
            DecayShape::Cosine,
            0.5 * (1.0 + std::f64::consts::FRAC_1_SQRT_2),
        ),
    ] {
        wsd.decay_shape = shape;
        assert_eq!(wsd.at(10), 2.0);
        assert_eq!(wsd.at(79), 2.0);
        assert!(wsd.at(80) < 2.0);
        assert!(
            (wsd.at(84) - 2.0 * (0.1 + 0.9 * quarter)).abs() < 1e-15,
            "{shape:?}"
        );
        assert!((wsd.at(99) - 0.2).abs() < 1e-15);
    }
}

#[test]
fn degenerate_lengths() {
    for kind in KINDS {
        let mut whole = schedule(kind, 100);
        whole.decay_steps = 0;
        assert_eq!(
            whole.at(99),
            2.0,
            "a stage that is all warm-up ends at its peak"
        );
        let mut one = schedule(kind, 0);
        (one.steps, one.decay_steps) = (1, 1);
        assert!(one.at(0).is_finite());
    }
}

#[test]
fn rates_never_rise_after_the_warmup_nor_fall_within_it() {
    for kind in KINDS {
        let rates: Vec<f64> = (0..100).map(|k| schedule(kind, 10).at(k)).collect();
        assert!(rates[..10].windows(2).all(|pair| pair[0] < pair[1]));
        assert!(rates[9..].windows(2).all(|pair| pair[0] >= pair[1]));
    }
}
