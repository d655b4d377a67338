//! A context stage while it runs: what depends on its sequence length, RoPE base and schedule.

use oxitron_kernels::RopeTable;
use tch::Device;

use super::{RunError, feed::Feed};
use crate::checkpoint::StageMark;
use crate::config::{Config, Recompute, StageConfig};
use crate::model::{Activations, Decoder};
use crate::plan::{Action, StepShape, Units, emit_step};

/// A stage, ready to take steps.
pub(super) struct Stage<'a> {
    pub(super) index: usize,
    pub(super) config: &'a StageConfig,
    /// What every step of the stage does.
    pub(super) actions: Vec<Action>,
    pub(super) rope: RopeTable,
    pub(super) activations: Activations,
    pub(super) feed: Feed,
}

impl<'a> Stage<'a> {
    /// Plans the steps and allocates the buffers of stage `index`.
    pub(super) fn new(
        config: &'a Config,
        index: usize,
        ranks: usize,
        units: &Units,
        decoder: &Decoder,
        feed: Feed,
        device: Device,
    ) -> Result<Self, RunError> {
        let stage = &config.stages[index];
        let recompute = config.parallel.recompute == Recompute::Full;
        let shape = StepShape {
            accumulation: stage.accumulation(ranks),
            overlap: config.parallel.overlap,
            recompute,
        };
        let tokens = stage.micro_batch * stage.seq_len;
        Ok(Self {
            index,
            config: stage,
            actions: emit_step(units, shape),
            rope: RopeTable::new(stage.rope_base, config.model.head_dim, stage.seq_len)?,
            activations: decoder.activations(tokens, recompute, device)?,
            feed,
        })
    }

    /// What a checkpoint tells of the stage.
    pub(super) fn mark(&self) -> StageMark {
        StageMark {
            index: self.index,
            name: self.config.name.clone(),
            seq_len: self.config.seq_len,
            rope_base: self.config.rope_base,
        }
    }
}

/// Refuses stages that cannot give every rank a sample.
///
/// # Errors
/// [`RunError::Plan`], with the numbers of the stage and what would fit.
pub fn check_ranks(config: &Config, ranks: usize) -> Result<(), RunError> {
    for stage in &config.stages {
        let samples = stage.samples_per_batch();
        if samples < ranks {
            return Err(RunError::Plan(format!(
                "stage \"{}\": a global batch of {} tokens holds {samples} samples of {} tokens, \
                 fewer than the {ranks} ranks; start at most {samples} ranks, or raise \
                 batch_tokens to {} or more",
                stage.name,
                stage.batch_tokens,
                stage.seq_len,
                ranks * stage.seq_len,
            )));
        }
    }
    Ok(())
}
