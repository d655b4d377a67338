//! A context stage while it runs: what depends on its sequence length, RoPE base and schedule.

use oxitron_kernels::RopeTable;
use tch::Device;

use super::{RunError, feed::Feed, plan::RunPlan};
use crate::checkpoint::StageMark;
use crate::config::{Config, Recompute, StageConfig};
use crate::model::{Activations, Decoder};
use crate::plan::Action;

/// A stage, ready to take steps.
pub(super) struct Stage<'a> {
    pub(super) index: usize,
    pub(super) config: &'a StageConfig,
    /// What every step of the stage does.
    pub(super) actions: Vec<Action>,
    /// What the validation of a micro-batch does.
    pub(super) evaluation: Vec<Action>,
    pub(super) rope: RopeTable,
    pub(super) activations: Activations,
    pub(super) feed: Feed,
}

impl<'a> Stage<'a> {
    /// Plans the steps and allocates the buffers of stage `index`.
    pub(super) fn new(
        config: &'a Config,
        index: usize,
        plan: &RunPlan,
        decoder: &Decoder,
        feed: Feed,
        device: Device,
    ) -> Result<Self, RunError> {
        let stage = &config.stages[index];
        let recompute = config.parallel.recompute == Recompute::Full;
        let tokens = stage.micro_batch * stage.seq_len;
        Ok(Self {
            index,
            config: stage,
            actions: plan.step(index),
            evaluation: plan.evaluation(index),
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
