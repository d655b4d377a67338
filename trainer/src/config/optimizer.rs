//! `[optimizer]`: AdamW, and the learning rate that stages begin from.

use serde::{Deserialize, Serialize};

use super::model::Dtype;
use super::patterns::Patterns;
use super::schedule::{DecayShape, ScheduleKind};

/// AdamW with decoupled weight decay.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OptimizerConfig {
    /// Peak learning rate of the stages that do not set their own.
    pub lr: f64,
    /// Decay rates of the first and second moment.
    pub betas: (f64, f64),
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay per step, times the learning rate.
    pub weight_decay: f64,
    /// Tensors without weight decay.
    pub no_decay: Patterns,
    /// Number format in which the moments are kept; they are computed in fp32.
    pub moments_dtype: Dtype,
    /// Whether master weights and moments lie in host memory, where a GPU computes.
    pub offload: bool,
    /// Greatest global gradient norm; 0 turns clipping off (see [`OptimizerConfig::clip`]).
    pub clip_norm: f64,
    /// Linear warm-up of the stages that do not set their own, in steps.
    pub warmup_steps: u64,
    /// Schedule of the stages that do not set their own.
    pub schedule: ScheduleKind,
    /// Last learning rate as a share of the peak, for the stages that do not set their own.
    pub min_lr_ratio: f64,
    /// Length of the final decay of `wsd` stages that do not set their own, in steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decay_steps: Option<u64>,
    /// Shape of the final decay of `wsd` stages that do not set their own.
    pub decay_shape: DecayShape,
}

impl OptimizerConfig {
    /// The norm to clip to, if clipping is on.
    pub fn clip(&self) -> Option<f64> {
        (self.clip_norm > 0.0).then_some(self.clip_norm)
    }

    /// The weight decay of a tensor by its canonical name.
    pub fn weight_decay_of(&self, tensor: &str) -> f64 {
        if self.no_decay.matches(tensor) {
            0.0
        } else {
            self.weight_decay
        }
    }
}
