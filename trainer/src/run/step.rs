//! The interpreter of a step's action list.

use std::time::{Duration, Instant};

use oxitron_kernels::{RopeTable, adamw::AdamW};

use super::{
    RunError,
    control::{self, Agreement, Contribution, Verdict},
};
use crate::comm::Lane;
use crate::model::{Activations, Batch, Decoder, Loss, Objective};
use crate::plan::Action;
use crate::zero::{CommClock, Zero};

/// What a step works on.
pub(super) struct Step<'a> {
    pub(super) actions: &'a [Action],
    /// One per micro-batch.
    pub(super) batches: &'a [Batch],
    pub(super) decoder: &'a Decoder,
    pub(super) rope: &'a RopeTable,
    pub(super) activations: &'a mut Activations,
    pub(super) zero: &'a mut Zero,
    /// All ranks.
    pub(super) world: &'a Lane,
    /// Settings of this step's update; the gradient scale is the control action's to decide.
    pub(super) adamw: AdamW,
    pub(super) clip_norm: f64,
    pub(super) stop_requested: bool,
}

/// What a step did.
#[derive(Clone, Copy, Debug)]
pub(super) struct StepReport {
    pub(super) agreement: Agreement,
    pub(super) verdict: Verdict,
    pub(super) comm: CommClock,
    pub(super) optimizer: Duration,
}

impl Step<'_> {
    /// Walks the actions in order.
    pub(super) fn run(mut self) -> Result<StepReport, RunError> {
        let last_layer = self.decoder.layers() - 1;
        let mut loss = Loss::default();
        let mut agreement = Agreement::default();
        let mut verdict = Verdict::Skip {
            reason: "the step has no control action",
        };
        let mut control_clock = CommClock::default();
        let mut optimizer = Duration::ZERO;

        for &action in self.actions {
            match action {
                Action::Forward { micro_batch, layer } if layer == last_layer => {
                    loss += self.head(micro_batch)?;
                }
                Action::Forward { micro_batch, layer }
                | Action::Recompute { micro_batch, layer } => self.forward(micro_batch, layer)?,
                Action::Backward { micro_batch, layer } => self.backward(micro_batch, layer)?,
                Action::Reduce { unit } => self.zero.reduce(unit)?,
                Action::Gather { unit } => self.zero.gather(unit)?,
                Action::Await { unit } => self.zero.settle(unit)?,
                Action::Control => {
                    let gradient = self.zero.sum_of_squares()?;
                    let stop_requested = self.stop_requested;
                    let mine = Contribution {
                        loss,
                        gradient,
                        stop_requested,
                    };
                    agreement = control::agree(self.world, mine, &mut control_clock)?;
                    verdict = agreement.verdict(self.clip_norm);
                }
                Action::Update { unit } => {
                    let began = Instant::now();
                    self.update(unit, verdict)?;
                    optimizer += began.elapsed();
                }
            }
        }
        let mut comm = self.zero.take_clock();
        comm += control_clock;
        Ok(StepReport {
            agreement,
            verdict,
            comm,
            optimizer,
        })
    }

    fn forward(&mut self, micro_batch: usize, layer: usize) -> Result<(), RunError> {
        let weights = self.zero.weights(layer)?;
        let batch = &self.batches[micro_batch];
        self.decoder
            .forward(layer, &weights, batch, self.rope, self.activations)?;
        Ok(())
    }

    fn head(&mut self, micro_batch: usize) -> Result<Loss, RunError> {
        let layer = self.decoder.layers() - 1;
        let weights = self.zero.weights(layer)?;
        let mut gradients = self.zero.gradients(layer)?;
        let objective = Objective::LossAndGradient {
            gradients: &mut gradients,
        };
        let batch = &self.batches[micro_batch];
        Ok(self
            .decoder
            .head(&weights, batch, self.activations, objective)?)
    }

    fn backward(&mut self, micro_batch: usize, layer: usize) -> Result<(), RunError> {
        let weights = self.zero.weights(layer)?;
        let mut gradients = self.zero.gradients(layer)?;
        let batch = &self.batches[micro_batch];
        let Self {
            decoder,
            rope,
            activations,
            ..
        } = self;
        decoder.backward(layer, &weights, &mut gradients, batch, rope, activations)?;
        Ok(())
    }

    fn update(&mut self, unit: usize, verdict: Verdict) -> Result<(), RunError> {
        match verdict {
            Verdict::Update { gradient_scale } => {
                let adamw = AdamW {
                    grad_scale: gradient_scale,
                    ..self.adamw
                };
                self.zero.update(unit, &adamw)?;
            }
            Verdict::Skip { .. } => self.zero.skip(unit)?,
        }
        Ok(())
    }
}
