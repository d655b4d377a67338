//! The step's verdict, taken where the tensors are: update, with which factor, or skip.
//!
//! All ranks add up the same few numbers and then decide alike. On a GPU nothing of it comes to the
//! host before the next step is on its way: [`decide`] leaves a [`Decision`] on the device, which
//! the optimizer reads there, and a record for the host to read when it likes.

use bytemuck::{Pod, Zeroable};
use tch::{Device, Kind, Tensor};

use crate::error::torch;
use crate::sys::operands::{Operands, as_slice};
use crate::{Error, cuda};

mod on_gpu;

const OP: &str = "decision.decide";

/// Numbers that ranks add up for it: loss, targets, and squares of the gradient of the summed loss.
pub const SUMS: usize = 3;

/// Numbers of a record.
pub const RECORD: usize = 8;

/// Why a step updates or does not. The first that holds is named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Cause {
    /// It updates.
    Update = 0,
    /// The batch has no target token.
    NoTarget = 1,
    /// The loss is infinite or NaN.
    LossNotFinite = 2,
    /// The gradient norm is infinite or NaN.
    NormNotFinite = 3,
    /// The mean loss is above its limit.
    LossAboveLimit = 4,
    /// The gradient norm is above its limit.
    NormAboveLimit = 5,
}

impl Cause {
    /// In the order of their numbers.
    const ALL: [Cause; 6] = [
        Cause::Update,
        Cause::NoTarget,
        Cause::LossNotFinite,
        Cause::NormNotFinite,
        Cause::LossAboveLimit,
        Cause::NormAboveLimit,
    ];
}

/// What a step may not exceed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// The gradient norm is brought down to this; 0 clips nothing.
    pub clip_norm: f64,
    /// A mean loss above this is not learned from; infinite where nothing is watched.
    pub loss: f64,
    /// A gradient norm above this is not learned from; infinite where nothing is watched.
    pub grad_norm: f64,
}

impl Limits {
    /// Clipping alone.
    pub fn clip(clip_norm: f64) -> Self {
        Limits {
            clip_norm,
            loss: f64::INFINITY,
            grad_norm: f64::INFINITY,
        }
    }
}

/// The decision as it lies in memory, on every device (see `cuda/decision.cuh`).
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct State {
    /// The gradient is multiplied by this: clip factor over the number of targets.
    pub(crate) gradient_scale: f64,
    /// `1 − beta^adam_steps` for the first moment, as of the last update.
    pub(crate) correction1: f64,
    /// The same for the second moment.
    pub(crate) correction2: f64,
    /// Updates so far: Adam's time.
    adam_steps: i64,
    /// Whether this step updates.
    pub(crate) update: i32,
    /// A [`Cause`].
    cause: i32,
}

/// What a step decided, for the optimizer; it counts Adam's time from step to step.
#[derive(Debug)]
pub struct Decision {
    /// `[size_of::<State>()]` bytes.
    state: Tensor,
}

impl Decision {
    /// Before the first step after `adam_steps` updates, on `device`. Nothing is updated until
    /// [`decide`] says so.
    ///
    /// # Errors
    /// [`Error::Torch`] if libtorch cannot allocate.
    pub fn new(adam_steps: u64, device: Device) -> Result<Self, Error> {
        let state = State {
            adam_steps: i64::try_from(adam_steps).unwrap_or(i64::MAX),
            ..State::zeroed()
        };
        let bytes = Tensor::f_from_slice(bytemuck::bytes_of(&state));
        let state = bytes.and_then(|bytes| bytes.f_to_device(device));
        Ok(Decision {
            state: state.map_err(torch(OP))?,
        })
    }

    /// To update in Adam's step number `time`.
    #[cfg(test)]
    pub(crate) fn updating(scale: f64, time: u64, betas: [f64; 2], device: Device) -> Self {
        let [correction1, correction2] = betas.map(|beta| 1.0 - beta.powi(time as i32));
        let state = State {
            gradient_scale: scale,
            correction1,
            correction2,
            adam_steps: time as i64,
            update: 1,
            cause: Cause::Update as i32,
        };
        Decision {
            state: Tensor::from_slice(bytemuck::bytes_of(&state)).to_device(device),
        }
    }

    /// Its bytes, for a kernel.
    pub(crate) fn tensor(&self) -> &Tensor {
        &self.state
    }

    /// What it says, on the CPU.
    pub(crate) fn state(&self, op: &'static str) -> Result<State, Error> {
        let bytes = Operands::new(op).read::<u8>("decision", &self.state, &[size_of::<State>()])?;
        Ok(bytemuck::pod_read_unaligned(bytes))
    }
}

/// Betas of Adam, whose powers correct the moments' bias.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Betas {
    /// Decay of the first moment.
    pub first: f64,
    /// Decay of the second moment.
    pub second: f64,
}

/// Decides from `sums: [n]` fp64, whose first [`SUMS`] numbers are those of all ranks together;
/// `record: [RECORD]` fp64 is written, for [`Record::read`]. Adam's time moves on in a step that
/// updates. The same bits on every device.
///
/// # Errors
/// The argument errors of [`Error`].
pub fn decide(
    sums: &Tensor,
    limits: &Limits,
    betas: Betas,
    record: &mut Tensor,
    decision: &mut Decision,
) -> Result<(), Error> {
    let numbers = sums.numel();
    if numbers < SUMS {
        let message = format!("`sums` must have at least {SUMS} numbers, found {numbers}");
        return Err(Error::Argument { op: OP, message });
    }
    if let Some(gpu) = cuda::of(OP, "sums", sums)? {
        return on_gpu::decide(&gpu, sums, limits, betas, record, decision);
    }
    let mut operands = Operands::new(OP);
    let sums = operands.read::<f64>("sums", sums, &[numbers])?;
    let record = operands.write::<f64>("record", record, &[RECORD])?;
    let bytes = operands.write::<u8>("decision", &mut decision.state, &[size_of::<State>()])?;
    let mut state: State = bytemuck::pod_read_unaligned(bytes);
    let (loss, targets) = (sums[0], sums[1].max(0.0).floor());
    let mean = if targets > 0.0 { loss / targets } else { 0.0 };
    let norm = sums[2].sqrt() / targets.max(1.0);
    let cause = if targets == 0.0 {
        Cause::NoTarget
    } else if !loss.is_finite() {
        Cause::LossNotFinite
    } else if !norm.is_finite() {
        Cause::NormNotFinite
    } else if mean > limits.loss {
        Cause::LossAboveLimit
    } else if norm > limits.grad_norm {
        Cause::NormAboveLimit
    } else {
        Cause::Update
    };
    state.gradient_scale = 0.0;
    if cause == Cause::Update {
        // The small constant is that of torch.nn.utils.clip_grad_norm_, kept for parity.
        let clip = if limits.clip_norm > 0.0 {
            (limits.clip_norm / (norm + 1e-6)).min(1.0)
        } else {
            1.0
        };
        state.gradient_scale = clip / targets;
        state.adam_steps += 1;
        let power = i32::try_from(state.adam_steps).unwrap_or(i32::MAX);
        state.correction1 = 1.0 - betas.first.powi(power);
        state.correction2 = 1.0 - betas.second.powi(power);
    }
    state.update = i32::from(cause == Cause::Update);
    state.cause = cause as i32;
    bytes.copy_from_slice(bytemuck::bytes_of(&state));
    record.copy_from_slice(&[
        mean,
        norm,
        state.gradient_scale,
        f64::from(state.cause),
        state.adam_steps as f64,
        targets,
        loss,
        0.0,
    ]);
    Ok(())
}

/// What a step decided and from what, for the host.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Record {
    /// Mean loss over the targets of the whole global batch; 0 without any.
    pub mean_loss: f64,
    /// Norm of the gradient of the mean loss, before clipping.
    pub grad_norm: f64,
    /// What the gradient is multiplied by; 0 without an update.
    pub gradient_scale: f64,
    /// Why it updates, or does not.
    pub cause: Cause,
    /// Adam's time after the step.
    pub adam_steps: u64,
    /// Tokens with a target.
    pub targets: u64,
    /// Sum of the token losses.
    pub loss: f64,
}

impl Record {
    /// Reads `record: [RECORD]` fp64 of [`decide`]. On a GPU this waits until the step has decided.
    ///
    /// # Errors
    /// The argument errors of [`Error`]; [`Error::Argument`] for a tensor that is no record.
    pub fn read(record: &Tensor) -> Result<Record, Error> {
        let here = record.f_to_device(Device::Cpu).map_err(torch(OP))?;
        let numbers = as_slice::<f64>(&here)?;
        let &[
            mean_loss,
            grad_norm,
            gradient_scale,
            cause,
            adam_steps,
            targets,
            loss,
            _,
        ] = numbers
        else {
            let message = format!("a record has {RECORD} numbers, found {}", numbers.len());
            return Err(Error::Argument { op: OP, message });
        };
        let named = Cause::ALL
            .into_iter()
            .find(|one| *one as i32 as f64 == cause);
        Ok(Record {
            mean_loss,
            grad_norm,
            gradient_scale,
            cause: named.ok_or_else(|| Error::Argument {
                op: OP,
                message: format!("{cause} is no cause: the record has not been written"),
            })?,
            adam_steps: adam_steps as u64,
            targets: targets as u64,
            loss,
        })
    }

    /// An empty record on `device`.
    ///
    /// # Errors
    /// [`Error::Torch`] if libtorch cannot allocate.
    pub fn empty(device: Device) -> Result<Tensor, Error> {
        Tensor::f_full([RECORD as i64], -1.0, (Kind::Double, device)).map_err(torch(OP))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::testing::*;

    const BETAS: Betas = Betas {
        first: 0.9,
        second: 0.95,
    };

    fn step(sums: [f64; 3], limits: Limits, decision: &mut Decision) -> Record {
        let mut record = Record::empty(device()).unwrap();
        assert!(Record::read(&record).is_err(), "nothing has been decided");
        let sums = Tensor::from_slice(&sums).to_device(device());
        decide(&sums, &limits, BETAS, &mut record, decision).unwrap();
        Record::read(&record).unwrap()
    }

    fn fresh(adam_steps: u64) -> Decision {
        Decision::new(adam_steps, device()).unwrap()
    }

    #[test]
    fn clipping_scales_down_only() {
        everywhere(|| {
            // A norm of 10 over 4 targets.
            let sums = |norm: f64| [8.0, 4.0, (norm * 4.0f64).powi(2)];
            let scale =
                |norm, clip| step(sums(norm), Limits::clip(clip), &mut fresh(0)).gradient_scale;
            assert!((scale(10.0, 1.0) - 1.0 / (10.0 + 1e-6) / 4.0).abs() < 1e-15);
            assert_eq!(scale(0.5, 1.0), 0.25);
            assert_eq!(scale(10.0, 0.0), 0.25);
            let record = step(sums(10.0), Limits::clip(1.0), &mut fresh(6));
            assert_eq!((record.mean_loss, record.grad_norm), (2.0, 10.0));
            assert_eq!((record.targets, record.adam_steps), (4, 7));
            assert_eq!(record.cause, Cause::Update);
        });
    }

    #[test]
    fn what_must_not_be_learned_from_is_skipped_and_adams_time_stands_still() {
        everywhere(|| {
            let none = Limits::clip(1.0);
            let watched = Limits {
                loss: 3.0,
                grad_norm: 0.5,
                ..none
            };
            for (sums, limits, cause) in [
                ([0.0, 0.0, 0.0], none, Cause::NoTarget),
                ([f64::NAN, 4.0, 1.0], none, Cause::LossNotFinite),
                ([f64::NEG_INFINITY, 4.0, 1.0], none, Cause::LossNotFinite),
                ([1.0, 4.0, f64::INFINITY], none, Cause::NormNotFinite),
                ([1.0, 4.0, f64::NAN], none, Cause::NormNotFinite),
                ([12.1, 4.0, 1.0], watched, Cause::LossAboveLimit),
                ([12.0, 4.0, 4.1], watched, Cause::NormAboveLimit),
                ([12.0, 4.0, 4.0], watched, Cause::Update),
            ] {
                let mut decision = fresh(3);
                let record = step(sums, limits, &mut decision);
                assert_eq!(record.cause, cause, "{sums:?}");
                let updates = cause == Cause::Update;
                assert_eq!(record.adam_steps, if updates { 4 } else { 3 });
                assert_eq!(record.gradient_scale > 0.0, updates);
            }
        });
    }

    #[test]
    fn a_gpu_decides_as_the_cpu_does_to_the_bit() {
        let run = || {
            let mut decision = fresh(0);
            let mut bits = Vec::new();
            for number in 1..400u32 {
                let x = f64::from(number);
                let sums = [x * 1.7, x * 3.0, x.powi(3) * 0.123];
                let record = step(sums, Limits::clip(0.9), &mut decision);
                bits.extend([record.mean_loss, record.grad_norm, record.gradient_scale]);
                let here = decision.state.to_device(Device::Cpu);
                let state: State = bytemuck::pod_read_unaligned(as_slice::<u8>(&here).unwrap());
                bits.extend([state.correction1, state.correction2]);
            }
            bits.into_iter().map(f64::to_bits).collect::<Vec<_>>()
        };
        let expected = run();
        on_gpu(|| assert!(run() == expected));
    }

    #[test]
    fn too_few_sums_are_refused() {
        let mut record = Record::empty(Device::Cpu).unwrap();
        let sums = Tensor::from_slice(&[1.0, 2.0]);
        let error = decide(&sums, &Limits::clip(1.0), BETAS, &mut record, &mut fresh(0));
        assert!(error.unwrap_err().to_string().contains("at least 3"));
    }
}
