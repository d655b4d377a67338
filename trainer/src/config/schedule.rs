//! Learning-rate schedules.
//!
//! Let `k` be the number of steps of the stage already taken (0 before its first step, as in
//! PyTorch's `LambdaLR`), `s = k + 1`, `N` the stage's steps, `W` its warm-up steps, `D` its decay
//! steps and `r` its `min_lr_ratio`. The learning rate is the peak times
//!
//! | range of `s` | schedule | factor |
//! |---|---|---|
//! | `s ≤ W` | all | `s / W` |
//! | `s > W`, with `p = (s − W) / (N − W)` | `cosine` | `r + (1 − r)·(1 + cos πp) / 2` |
//! | | `linear` | `r + (1 − r)·(1 − p)` |
//! | | `constant` | `1` |
//! | `W < s ≤ N − D` | `wsd` | `1` |
//! | `s > N − D`, with `q = (s − N + D) / D` | `wsd`, shape `sqrt` | `r + (1 − r)·(1 − √q)` |
//! | | shape `linear` | `r + (1 − r)·(1 − q)` |
//! | | shape `cosine` | `r + (1 − r)·(1 + cos πq) / 2` |
//!
//! So the first step already moves, the last step of the warm-up has the peak, the last step of the
//! stage has exactly `r` times the peak (except `constant`), and steps past the end repeat the last.
//! `wsd` is warm-up, stable, decay; its `sqrt` shape is the one of Hägele et al. 2024,
//! arXiv 2405.18392.

use serde::{Deserialize, Serialize};

/// Names of schedules, as in the config.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    /// Half a cosine from the peak to the end.
    Cosine,
    /// A straight line from the peak to the end.
    Linear,
    /// The peak, after the warm-up.
    Constant,
    /// Warm-up, stable, decay.
    Wsd,
}

/// Shapes of the final decay of [`ScheduleKind::Wsd`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DecayShape {
    /// One minus the square root of the progress.
    Sqrt,
    /// A straight line.
    Linear,
    /// Half a cosine.
    Cosine,
}

/// The learning rate of one stage as a function of its step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// Greatest learning rate.
    pub peak: f64,
    /// Steps of the stage, at least 1.
    pub steps: u64,
    /// Steps of linear warm-up, at most `steps`.
    pub warmup_steps: u64,
    /// Last learning rate as a share of the peak.
    pub min_ratio: f64,
    /// What follows the warm-up.
    pub kind: ScheduleKind,
    /// Length of the final decay; only `Wsd` reads it. At most `steps - warmup_steps`.
    pub decay_steps: u64,
    /// Shape of the final decay; only `Wsd` reads it.
    pub decay_shape: DecayShape,
}

impl Schedule {
    /// The learning rate of the step that follows `step_in_stage` steps of the stage: 0 asks for
    /// the first. The formula stands at the top of this module.
    pub fn at(&self, step_in_stage: u64) -> f64 {
        let step = step_in_stage.saturating_add(1).min(self.steps);
        if step <= self.warmup_steps {
            return self.peak * (step as f64 / self.warmup_steps as f64);
        }
        // The part that falls: its length, and how far the step has come in it (0 at its start).
        let (length, shape) = match self.kind {
            ScheduleKind::Constant => return self.peak,
            ScheduleKind::Linear => (self.steps - self.warmup_steps, DecayShape::Linear),
            ScheduleKind::Cosine => (self.steps - self.warmup_steps, DecayShape::Cosine),
            ScheduleKind::Wsd => (self.decay_steps, self.decay_shape),
        };
        let start = self.steps.saturating_sub(length);
        if step <= start {
            return self.peak;
        }
        let progress = (step - start) as f64 / length as f64;
        let height = match shape {
            DecayShape::Sqrt => 1.0 - progress.sqrt(),
            DecayShape::Linear => 1.0 - progress,
            DecayShape::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
        };
        self.peak * (self.min_ratio + (1.0 - self.min_ratio) * height)
    }
}
