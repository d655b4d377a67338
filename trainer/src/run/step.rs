//! The interpreter of action lists.

use std::time::{Duration, Instant};

use oxitron_kernels::{
    RopeTable,
    adamw::AdamW,
    decision::{Betas, Limits},
};

use super::{
    RunError,
    control::{Contribution, Control, Flags},
    stops::Stops,
    trace::Tracer,
    watch::Watch,
};
use crate::comm::Lane;
use crate::faults;
use crate::model::{Activations, Batch, Decoder, Objective};
use crate::plan::Action;
use crate::zero::Zero;

/// What the actions of a step work on.
pub(super) struct Step<'a> {
    pub(super) pass: Pass<'a>,
    /// All ranks.
    pub(super) world: &'a Lane,
    /// Decides whether and how the step updates. What it decides stays on the device.
    pub(super) control: &'a mut Control,
    /// Settings of this step's update.
    pub(super) adamw: AdamW,
    /// Needed from the agreement on.
    pub(super) rules: Option<Rules>,
    /// Who may ask the run to stop; absent in tests of single steps.
    pub(super) stops: Option<&'a Stops>,
    /// Counted from 1 over the whole run.
    pub(super) number: u64,
    /// Absent where nobody watches, in tests of single steps.
    pub(super) watch: Option<&'a Watch>,
    pub(super) tracer: &'a mut Tracer,
}

/// What goes into the agreement of a step beside its figures.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    /// What the step may not exceed.
    pub(super) limits: Limits,
    /// What this rank tells the others, but for requests to stop.
    pub(super) flags: Flags,
}

impl Step<'_> {
    /// Walks the actions in order. Returns how long those of the optimizer took.
    pub(super) fn run(mut self, actions: &[Action]) -> Result<Duration, RunError> {
        let mut optimizer = Duration::ZERO;
        for &action in actions {
            let began = self.tracer.begin();
            if let Some(watch) = self.watch {
                watch.act(self.number, action)?;
            }
            faults::at(point(action));
            match action {
                Action::Norm { piece } => {
                    let squares = self.control.squares();
                    self.pass.zero.add_sum_of_squares(piece, squares)?;
                }
                Action::Control => self.agree()?,
                Action::Update { piece } => {
                    let began = Instant::now();
                    let decision = self.control.decision();
                    self.pass.zero.update(piece, &self.adamw, decision)?;
                    optimizer += began.elapsed();
                }
                other => self.pass.act(other)?,
            }
            self.tracer.action(action, began, self.pass.activations);
        }
        Ok(optimizer)
    }

    fn agree(&mut self) -> Result<(), RunError> {
        let Rules { limits, flags } = self.rules.ok_or(RunError::Defect("no rules to agree by"))?;
        // As late as can be: a request in the middle of a step is answered after it.
        let stop_requested = self.stops.is_some_and(Stops::requested);
        let mine = Contribution {
            loss: &self.pass.activations.loss,
            flags: Flags {
                stop_requested,
                ..flags
            },
        };
        let betas = Betas {
            first: self.adamw.beta1,
            second: self.adamw.beta2,
        };
        let clock = &mut self.pass.zero.clock;
        self.control.agree(self.world, mine, &limits, betas, clock)
    }
}

/// The fault point before an action.
fn point(action: Action) -> &'static str {
    match action {
        Action::Forward { .. } | Action::Recompute { .. } | Action::Evaluate { .. } => {
            "step::forward"
        }
        Action::Backward { .. } => "step::backward",
        Action::Exchange(_) => "step::exchange",
        Action::Norm { .. } => "step::norm",
        Action::Control => "step::control",
        Action::Update { .. } => "step::update",
    }
}

/// Micro-batches on their way through the layers.
pub(super) struct Pass<'a> {
    /// One per micro-batch.
    pub(super) batches: &'a [Batch],
    pub(super) decoder: &'a Decoder,
    pub(super) rope: &'a RopeTable,
    pub(super) activations: &'a mut Activations,
    pub(super) zero: &'a mut Zero,
}

impl Pass<'_> {
    /// Does what one action says; losses are added to those of the activations. The actions of the
    /// optimizer are the step's.
    pub(super) fn act(&mut self, action: Action) -> Result<(), RunError> {
        let last_layer = self.decoder.layers() - 1;
        match action {
            Action::Forward { micro_batch, layer } if layer == last_layer => {
                self.head(micro_batch)?;
            }
            Action::Forward { micro_batch, layer } => self.forward(micro_batch, layer)?,
            Action::Recompute { micro_batch, layer } => self.recompute(micro_batch, layer)?,
            Action::Evaluate { micro_batch } => self.evaluate(micro_batch)?,
            Action::Backward { micro_batch, layer } => self.backward(micro_batch, layer)?,
            Action::Exchange(exchange) => self.zero.exchange(exchange)?,
            Action::Norm { .. } | Action::Control | Action::Update { .. } => {}
        }
        Ok(())
    }

    fn forward(&mut self, micro_batch: usize, layer: usize) -> Result<(), RunError> {
        let weights = self.zero.weights(layer)?;
        let batch = &self.batches[micro_batch];
        self.decoder
            .forward(layer, &weights, batch, self.rope, self.activations)?;
        Ok(())
    }

    fn recompute(&mut self, micro_batch: usize, layer: usize) -> Result<(), RunError> {
        let weights = self.zero.weights(layer)?;
        let batch = &self.batches[micro_batch];
        self.decoder
            .recompute(layer, &weights, batch, self.rope, self.activations)?;
        Ok(())
    }

    fn head(&mut self, micro_batch: usize) -> Result<(), RunError> {
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

    fn evaluate(&mut self, micro_batch: usize) -> Result<(), RunError> {
        let weights = self.zero.weights(self.decoder.layers() - 1)?;
        let batch = &self.batches[micro_batch];
        Ok(self
            .decoder
            .head(&weights, batch, self.activations, Objective::Loss)?)
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
}
