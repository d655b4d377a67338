//! `[[stage]]`: one context stage.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::schedule::{DecayShape, Schedule, ScheduleKind};

/// A stretch of training with one sequence length, one RoPE base and one learning-rate schedule.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StageConfig {
    /// Name of the stage.
    pub name: String,
    /// Length of a sample in tokens.
    pub seq_len: usize,
    /// RoPE base (theta).
    pub rope_base: f64,
    /// Steps of the stage; a length given in tokens is rounded up to whole steps.
    pub steps: u64,
    /// Global batch in tokens, a multiple of `seq_len`.
    pub batch_tokens: u64,
    /// Samples that a rank computes at once.
    pub micro_batch: usize,
    /// Peak learning rate.
    pub lr: f64,
    /// Linear warm-up in steps.
    pub warmup_steps: u64,
    /// What follows the warm-up.
    pub schedule: ScheduleKind,
    /// Last learning rate as a share of the peak.
    pub min_lr_ratio: f64,
    /// Length of the final decay in steps; there exactly when `schedule` is `Wsd`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decay_steps: Option<u64>,
    /// Shape of the final decay; there exactly when `schedule` is `Wsd`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decay_shape: Option<DecayShape>,
    /// What happens to AdamW's state on entry.
    pub optimizer: StageOptimizer,
    /// Shares of tokens by source name, one for every source; not normalised.
    pub weights: BTreeMap<String, f64>,
}

/// What happens to AdamW's moments and time on entry to a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StageOptimizer {
    /// They go on.
    Keep,
    /// They begin at zero.
    Reset,
}

impl StageConfig {
    /// Samples of a global batch.
    pub fn samples_per_batch(&self) -> usize {
        (self.batch_tokens / self.seq_len as u64) as usize
    }

    /// Micro-batches that each of `ranks` computes per step: as many as it takes to place every
    /// sample, `⌈samples / (ranks · micro_batch)⌉`. Slots that are left over run masked.
    pub fn accumulation(&self, ranks: usize) -> usize {
        let slots = ranks.saturating_mul(self.micro_batch).max(1);
        self.samples_per_batch().div_ceil(slots)
    }

    /// Tokens of the whole stage.
    pub fn total_tokens(&self) -> u64 {
        self.steps * self.batch_tokens
    }

    /// The learning rate as a function of the step.
    pub fn learning_rate(&self) -> Schedule {
        Schedule {
            peak: self.lr,
            steps: self.steps,
            warmup_steps: self.warmup_steps,
            min_ratio: self.min_lr_ratio,
            kind: self.schedule,
            decay_steps: self.decay_steps.unwrap_or(0),
            decay_shape: self.decay_shape.unwrap_or(DecayShape::Linear),
        }
    }

    /// The learning rate of the step that follows `step_in_stage` steps of this stage; 0 asks for
    /// the first. See [`super::schedule`] for the formula.
    pub fn lr_at(&self, step_in_stage: u64) -> f64 {
        self.learning_rate().at(step_in_stage)
    }
}
