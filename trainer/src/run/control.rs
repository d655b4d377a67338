//! The step's one agreement between all ranks.
//!
//! Whatever ranks must agree on in a step travels in a single sum of fixed size: the loss, the
//! number of targets, the gradient norm, whether anybody asked to stop, and how saves get on.
//! Decisions are made from the sums alone, so every rank decides alike.

use oxitron_kernels::norm::SumOfSquares;
use tch::Tensor;

use super::RunError;
use crate::comm::Lane;
use crate::faults;
use crate::guard::{self, Cause, Spikes};
use crate::model::Loss;
use crate::zero::CommClock;

/// Numbers in the sum, fp64 each.
const VALUES: usize = 6;

/// The most bytes that one of `ranks` ranks sends for the sum: it adds up a slice of the numbers
/// and sends that to all others, who do the same with theirs.
pub(super) fn control_bytes(ranks: usize) -> usize {
    let slice = VALUES.div_ceil(ranks);
    let to_be_summed = VALUES - slice;
    let summed = slice * (ranks - 1);
    (to_be_summed + summed) * size_of::<f64>()
}

/// What a rank brings to the agreement.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Contribution {
    pub(super) loss: Loss,
    /// Over the rank's slices, of the gradient of the summed loss.
    pub(super) gradient: SumOfSquares,
    pub(super) flags: Flags,
}

/// What a rank has to say beside its share of the step; summed up, whether any rank says so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Flags {
    /// Somebody asked the run to stop.
    pub(super) stop_requested: bool,
    /// A checkpoint is still being written.
    pub(super) saving: bool,
    /// A part of a checkpoint could not be written since the last step.
    pub(super) save_failed: bool,
}

/// What all ranks know afterwards.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Agreement {
    /// Over the whole global batch.
    pub(super) loss: Loss,
    /// Norm of the gradient of the mean loss, before clipping.
    pub(super) grad_norm: f64,
    /// What at least one rank said.
    pub(super) flags: Flags,
}

impl Contribution {
    /// Spoiled, where a test asks for it.
    pub(super) fn with_faults(mut self) -> Self {
        if let Some(fault) = faults::at("step::loss") {
            self.loss.sum = fault.apply(self.loss.sum);
        }
        if let Some(fault) = faults::at("step::gradient") {
            self.gradient.sum = fault.apply(self.gradient.sum);
        }
        self
    }
}

/// What to do with the gradient.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Verdict {
    /// Update with the gradient times this factor, which averages over the targets and clips.
    Update { gradient_scale: f64 },
    /// Leave weights and moments alone.
    Skip { cause: Cause },
}

impl Agreement {
    /// Clips to `clip_norm` (0 for no clipping), or skips what is not finite or, where `spikes` are
    /// watched, stands out.
    pub(super) fn verdict(&self, clip_norm: f64, spikes: Option<&mut Spikes>) -> Verdict {
        let skip = |reason| Verdict::Skip {
            cause: Cause::Unusable(reason),
        };
        if self.loss.targets == 0 {
            return skip("the batch has no target token");
        }
        if !self.loss.sum.is_finite() {
            return skip("the loss is not finite");
        }
        if !self.grad_norm.is_finite() {
            return skip("the gradient norm is not finite");
        }
        let look = |spikes: &mut Spikes| spikes.observe(self.loss.mean(), self.grad_norm);
        if let Some(guard::Verdict::Spike(spike)) = spikes.map(look) {
            return Verdict::Skip {
                cause: Cause::Spike(spike),
            };
        }
        // The small constant is that of torch.nn.utils.clip_grad_norm_, kept for parity.
        let clip = if clip_norm > 0.0 {
            (clip_norm / (self.grad_norm + 1e-6)).min(1.0)
        } else {
            1.0
        };
        Verdict::Update {
            gradient_scale: clip / self.loss.targets as f64,
        }
    }
}

/// Sums the contributions of all ranks of `lane`.
pub(super) fn agree(
    lane: &Lane,
    mine: Contribution,
    clock: &mut CommClock,
) -> Result<Agreement, RunError> {
    let mine: [f64; VALUES] = [
        mine.loss.sum,
        mine.loss.targets as f64,
        mine.gradient.sum,
        f64::from(u8::from(mine.flags.stop_requested)),
        f64::from(u8::from(mine.flags.saving)),
        f64::from(u8::from(mine.flags.save_failed)),
    ];
    let sums = sum(lane, &mine, clock)?;
    let targets = sums[1] as u64;
    Ok(Agreement {
        loss: Loss {
            sum: sums[0],
            targets,
        },
        grad_norm: sums[2].sqrt() / targets.max(1) as f64,
        flags: Flags {
            stop_requested: sums[3] > 0.0,
            saving: sums[4] > 0.0,
            save_failed: sums[5] > 0.0,
        },
    })
}

/// Sums vectors of equal length over the ranks of `lane`, in rank order.
pub(super) fn sum(
    lane: &Lane,
    values: &[f64],
    clock: &mut CommClock,
) -> Result<Vec<f64>, RunError> {
    let began = std::time::Instant::now();
    let tensor = Tensor::f_from_slice(values)?;
    let (tensor, traffic) = lane.all_reduce(tensor).wait()?;
    clock.count("control", None, began, traffic);
    Ok(Vec::<f64>::try_from(&tensor)?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::panic)]

    use super::*;

    fn agreement(sum: f64, targets: u64, grad_norm: f64) -> Agreement {
        Agreement {
            loss: Loss { sum, targets },
            grad_norm,
            flags: Flags::default(),
        }
    }

    #[test]
    fn clipping_scales_down_only() {
        let Verdict::Update { gradient_scale } = agreement(8.0, 4, 10.0).verdict(1.0, None) else {
            panic!("a finite step is not skipped")
        };
        assert!((gradient_scale - 1.0 / (10.0 + 1e-6) / 4.0).abs() < 1e-15);
        assert_eq!(
            agreement(8.0, 4, 0.5).verdict(1.0, None),
            Verdict::Update {
                gradient_scale: 0.25
            }
        );
        assert_eq!(
            agreement(8.0, 4, 10.0).verdict(0.0, None),
            Verdict::Update {
                gradient_scale: 0.25
            }
        );
    }

    #[test]
    fn what_is_not_finite_is_skipped() {
        for bad in [
            agreement(f64::NAN, 4, 1.0),
            agreement(1.0, 4, f64::INFINITY),
            agreement(0.0, 0, 0.0),
        ] {
            assert!(matches!(bad.verdict(1.0, None), Verdict::Skip { .. }));
        }
    }
}
