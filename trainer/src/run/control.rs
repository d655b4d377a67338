//! The step's one agreement between all ranks.
//!
//! Whatever ranks must agree on in a step travels in a single sum of fixed size: the loss, the
//! number of targets, the gradient norm, whether anybody asked to stop, and how saves get on.
//! Decisions are made from the sums alone, so every rank decides alike. They are made where the
//! tensors are: the optimizer acts on them without the host, to which they are on their way
//! meanwhile.

use oxitron_kernels::{
    cuda::Download,
    decision::{self, Betas, Decision, Limits, RECORD, Record},
};
use tch::{Device, Kind, Tensor};

use super::RunError;
use crate::comm::Lane;
use crate::faults;
use crate::guard::{Cause, Spikes};
use crate::model::LossSum;
use crate::zero::CommClock;

/// Numbers in the sum, fp64 each.
const VALUES: usize = 6;

/// Where the sum of losses and that of the gradient's squares stand.
const LOSS: i64 = 0;
const SQUARES: i64 = 2;

/// The most bytes that one of `ranks` ranks sends for the sum: it adds up a slice of the numbers
/// and sends that to all others, who do the same with theirs.
pub(super) fn control_bytes(ranks: usize) -> usize {
    let slice = VALUES.div_ceil(ranks);
    let to_be_summed = VALUES - slice;
    let summed = slice * (ranks - 1);
    (to_be_summed + summed) * size_of::<f64>()
}

/// What a rank brings to the agreement, beside its squares of the gradient.
#[derive(Clone, Copy, Debug)]
pub(super) struct Contribution<'a> {
    pub(super) loss: &'a LossSum,
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
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Agreement {
    /// What was decided, from which figures of the whole global batch.
    pub(super) record: Record,
    /// What at least one rank said.
    pub(super) flags: Flags,
}

/// What became of the gradient.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Verdict {
    /// Weights and moments were updated.
    Update,
    /// They were left alone.
    Skip { cause: Cause },
}

impl Agreement {
    /// What was decided, with the reason where it was to skip. A step that stood out did so of the
    /// steps that `spikes` holds.
    pub(super) fn verdict(&self, spikes: &Spikes) -> Verdict {
        let Record {
            mean_loss,
            grad_norm,
            cause,
            ..
        } = self.record;
        let cause = match cause {
            decision::Cause::Update => return Verdict::Update,
            decision::Cause::NoTarget => Cause::Unusable("the batch has no target token"),
            decision::Cause::LossNotFinite => Cause::Unusable("the loss is not finite"),
            decision::Cause::NormNotFinite => Cause::Unusable("the gradient norm is not finite"),
            decision::Cause::LossAboveLimit | decision::Cause::NormAboveLimit => {
                Cause::Spike(spikes.spike(mean_loss, grad_norm))
            }
        };
        Verdict::Skip { cause }
    }
}

/// What decides about the steps of a run, on the device on which it trains. Nothing but
/// [`Control::read`] waits until a step has come to its decision.
#[derive(Debug)]
pub(super) struct Control {
    /// `[2]` fp64: this rank's squares of the gradient of the summed loss, and how many of its
    /// elements are not finite.
    squares: Tensor,
    /// `[VALUES]` fp64, of all ranks once they have agreed, and behind them the record `[RECORD]`.
    board: Tensor,
    /// Counts Adam's time.
    decision: Decision,
    /// The board of the last step, on its way to the host.
    report: Option<Download>,
}

impl Control {
    /// After `adam_steps` updates.
    pub(super) fn new(adam_steps: u64, device: Device) -> Result<Self, RunError> {
        let zeros = |length: usize| Tensor::f_zeros([length as i64], (Kind::Double, device));
        Ok(Self {
            squares: zeros(2)?,
            board: zeros(VALUES + RECORD)?,
            decision: Decision::new(adam_steps, device)?,
            report: None,
        })
    }

    /// Goes on as after `adam_steps` updates: those of a checkpoint, or none.
    pub(super) fn set_adam_steps(&mut self, adam_steps: u64) -> Result<(), RunError> {
        self.decision = Decision::new(adam_steps, self.board.device())?;
        Ok(())
    }

    /// Forgets the squares of the step before.
    pub(super) fn begin_step(&mut self) -> Result<(), RunError> {
        let _ = self.squares.f_zero_()?;
        Ok(())
    }

    /// To add this rank's squares to.
    pub(super) fn squares(&mut self) -> &mut Tensor {
        &mut self.squares
    }

    /// For the optimizer, once the ranks have agreed.
    pub(super) fn decision(&self) -> &Decision {
        &self.decision
    }

    /// Sums the contributions of all ranks of `lane` and decides, and sends word to the host.
    pub(super) fn agree(
        &mut self,
        lane: &Lane,
        mine: Contribution,
        limits: &Limits,
        betas: Betas,
        clock: &mut CommClock,
    ) -> Result<(), RunError> {
        let Contribution { loss, flags } = mine;
        let mine: [f64; VALUES] = [
            0.0,
            loss.targets() as f64,
            0.0,
            f64::from(u8::from(flags.stop_requested)),
            f64::from(u8::from(flags.saving)),
            f64::from(u8::from(flags.save_failed)),
        ];
        let sums = self.board.f_narrow(0, 0, VALUES as i64)?;
        for (index, number) in (0..).zip(mine) {
            // Filled in, not copied: a copy from the host waits for a GPU.
            let _ = sums.f_narrow(0, index, 1)?.f_fill_(number)?;
        }
        // Loss and squares do not pass through the host.
        self.put(LOSS, loss.sum())?;
        self.put(SQUARES, &self.squares.f_narrow(0, 0, 1)?)?;
        self.spoil("step::loss", LOSS)?;
        self.spoil("step::gradient", SQUARES)?;
        let sums = reduce(lane, sums, clock)?;
        let mut record = record_of(&self.board)?;
        decision::decide(&sums, limits, betas, &mut record, &mut self.decision)?;
        self.report = Some(Download::start(&self.board)?);
        Ok(())
    }

    /// Takes over one number, `[1]` fp64.
    fn put(&self, index: i64, number: &Tensor) -> Result<(), RunError> {
        Ok(self.board.f_narrow(0, index, 1)?.f_copy_(number)?)
    }

    /// Changes one number where a test asks for it.
    fn spoil(&self, point: &'static str, index: i64) -> Result<(), RunError> {
        if let Some(fault) = faults::at(point) {
            let spoiled = fault.apply(self.board.f_double_value(&[index])?);
            let _ = self.board.f_narrow(0, index, 1)?.f_fill_(spoiled)?;
        }
        Ok(())
    }

    /// What the ranks have agreed on last, once this is known here.
    ///
    /// # Errors
    /// [`RunError::Abandoned`] when `given_up` says so before.
    pub(super) fn read(&self, given_up: &dyn Fn() -> bool) -> Result<Agreement, RunError> {
        let report = self.report.as_ref();
        let report = report.ok_or(RunError::Defect("read before the ranks have agreed"))?;
        let board = report.wait(given_up)?.ok_or(RunError::Abandoned)?;
        let record = Record::read(&record_of(board)?)?;
        let sums = Vec::<f64>::try_from(board)?;
        Ok(Agreement {
            record,
            flags: Flags {
                stop_requested: sums[3] > 0.0,
                saving: sums[4] > 0.0,
                save_failed: sums[5] > 0.0,
            },
        })
    }
}

/// The record on a board.
fn record_of(board: &Tensor) -> Result<Tensor, RunError> {
    Ok(board.f_narrow(0, VALUES as i64, RECORD as i64)?)
}

/// Sums vectors of equal length over the ranks of `lane`, in rank order.
pub(super) fn sum(
    lane: &Lane,
    values: &[f64],
    clock: &mut CommClock,
) -> Result<Vec<f64>, RunError> {
    let sums = reduce(lane, Tensor::f_from_slice(values)?, clock)?;
    Ok(Vec::<f64>::try_from(&sums)?)
}

/// As [`sum`], where the values are.
fn reduce(lane: &Lane, values: Tensor, clock: &mut CommClock) -> Result<Tensor, RunError> {
    let began = std::time::Instant::now();
    let (sums, traffic) = lane.all_reduce(values).wait()?;
    clock.count("control", None, began, traffic);
    Ok(sums)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::comm::Comm;
    use crate::config::Config;

    const BETAS: Betas = Betas {
        first: 0.9,
        second: 0.95,
    };

    /// A step of one rank.
    fn step(control: &mut Control, loss: LossSum, squares: f64, limits: &Limits) -> Agreement {
        let lane = Comm::solo().lane(&[0]).unwrap();
        control.begin_step().unwrap();
        let _ = control.squares().get(0).fill_(squares);
        let mine = Contribution {
            loss: &loss,
            flags: Flags::default(),
        };
        let clock = &mut CommClock::default();
        control.agree(&lane, mine, limits, BETAS, clock).unwrap();
        control.read(&|| false).unwrap()
    }

    #[test]
    fn ranks_decide_alike_from_what_they_bring_together() {
        let rank = |comm: Comm| {
            let lane = comm.lane(&[0, 1]).unwrap();
            let mut control = Control::new(3, Device::Cpu).unwrap();
            let mut agreements = Vec::new();
            for step in 0..2 {
                control.begin_step().unwrap();
                // 36 in the first step and 64 in the second, over 3 targets.
                let squares = [[18.0, 18.0], [0.0, 64.0]][step][comm.rank()];
                let _ = control.squares().get(0).fill_(squares);
                let mine = Contribution {
                    loss: &LossSum::of(1.5, 1 + comm.rank() as u64),
                    flags: Flags {
                        saving: comm.rank() == step,
                        stop_requested: step == 1,
                        save_failed: false,
                    },
                };
                let limits = Limits {
                    grad_norm: 2.5,
                    ..Limits::clip(1.0)
                };
                let clock = &mut CommClock::default();
                control.agree(&lane, mine, &limits, BETAS, clock).unwrap();
                agreements.push(control.read(&|| false).unwrap());
            }
            comm.finish().unwrap();
            agreements
        };
        let comms = Comm::threads(2).unwrap();
        let found: Vec<Vec<Agreement>> = std::thread::scope(|scope| {
            let threads: Vec<_> = comms
                .into_iter()
                .map(|comm| scope.spawn(|| rank(comm)))
                .collect();
            let join = |thread: std::thread::ScopedJoinHandle<'_, _>| thread.join().unwrap();
            threads.into_iter().map(join).collect()
        });
        assert_eq!(found[0], found[1]);
        let [first, second] = [found[0][0], found[0][1]];
        assert_eq!((first.record.mean_loss, first.record.targets), (1.0, 3));
        assert_eq!((first.record.grad_norm, first.record.adam_steps), (2.0, 4));
        assert!((first.record.gradient_scale - 0.5 / 3.0).abs() < 1e-6);
        assert!(first.flags.saving && !first.flags.stop_requested);
        assert_eq!(second.record.cause, decision::Cause::NormAboveLimit);
        assert_eq!(second.record.adam_steps, 4);
        assert!(second.flags.saving && second.flags.stop_requested);
        assert!(!second.flags.save_failed);
    }

    #[test]
    fn what_is_not_finite_or_stands_out_is_skipped_for_a_reason() {
        let text = "[model]\npreset = \"llama-7b\"\n[data]\n[[data.source]]\nname = \"a\"\n\
                    path = \"a\"\n[optimizer]\nlr = 1e-3\n[[stage]]\nname = \"s\"\nseq_len = 64\n\
                    steps = 1\nbatch_tokens = 64\n";
        let config = Config::from_text(text, "test", std::path::Path::new("/"), &[]);
        let mut spikes = Spikes::new(&config.unwrap().guard);
        for _ in 0..128 {
            spikes.accept(2.0, 1.0);
        }
        let limits = Limits {
            clip_norm: 1.0,
            ..spikes.limits()
        };
        let mut control = Control::new(0, Device::Cpu).unwrap();
        for (bad, squares, reason) in [
            (LossSum::of(0.0, 0), 0.0, "the batch has no target token"),
            (LossSum::of(f64::NAN, 4), 1.0, "the loss is not finite"),
            (
                LossSum::of(8.0, 4),
                f64::INFINITY,
                "the gradient norm is not finite",
            ),
        ] {
            let verdict = step(&mut control, bad, squares, &limits).verdict(&spikes);
            let cause = Cause::Unusable(reason);
            assert_eq!(verdict, Verdict::Skip { cause });
        }
        let verdict = step(&mut control, LossSum::of(12.0, 4), 16.0, &limits).verdict(&spikes);
        let cause = Cause::Spike(spikes.spike(3.0, 1.0));
        assert_eq!(verdict, Verdict::Skip { cause });
        let verdict = step(&mut control, LossSum::of(8.0, 4), 16.0, &limits).verdict(&spikes);
        assert_eq!(verdict, Verdict::Update);
    }

    #[test]
    fn adams_time_is_that_of_the_run() {
        let limits = Limits::clip(1.0);
        let mut control = Control::new(6, Device::Cpu).unwrap();
        let after = |control: &mut Control, loss| {
            let agreement = step(control, loss, 1.0, &limits);
            agreement.record.adam_steps
        };
        assert_eq!(after(&mut control, LossSum::of(8.0, 4)), 7);
        assert_eq!(after(&mut control, LossSum::of(f64::NAN, 4)), 7);
        assert_eq!(after(&mut control, LossSum::of(8.0, 4)), 8);
        control.set_adam_steps(0).unwrap();
        assert_eq!(after(&mut control, LossSum::of(8.0, 4)), 1);
    }
}
