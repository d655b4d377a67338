//! A context stage while it runs, what depends on its sequence length, RoPE base and schedule; and
//! how a run enters it.

use std::sync::Arc;

use oxitron_kernels::RopeTable;
use tch::Device;

use super::{RunError, feed::Feed, memory::MemoryWatch, plan::RunPlan, trainer::Trainer};
use crate::checkpoint::StageMark;
use crate::config::{Config, Dtype, StageConfig, StageOptimizer};
use crate::faults;
use crate::guard::watchdog::Phase;
use crate::metrics::Event;
use crate::model::{Activations, Decoder};
use crate::plan::Action;

/// A stage, ready to take steps.
pub(super) struct Stage<'a> {
    pub(super) index: usize,
    pub(super) config: &'a StageConfig,
    /// What every step of the stage does.
    pub(super) actions: Arc<[Action]>,
    /// What the validation of a micro-batch does.
    pub(super) evaluation: Vec<Action>,
    pub(super) rope: RopeTable,
    pub(super) activations: Activations,
    pub(super) feed: Feed,
    /// Looks whether the stage needs what was planned.
    pub(super) memory: MemoryWatch,
}

impl<'a> Stage<'a> {
    /// Plans the steps and allocates the buffers of stage `index`.
    pub(super) fn new(
        config: &'a Config,
        index: usize,
        plan: &RunPlan,
        decoder: &Decoder,
        feed: Feed,
        (device, dtype): (Device, Dtype),
    ) -> Result<Self, RunError> {
        let stage = &config.stages[index];
        let planned = plan.figures(config, index, dtype).device();
        let recompute = plan.shapes[index].recompute;
        let tokens = stage.micro_batch * stage.seq_len;
        Ok(Self {
            index,
            config: stage,
            actions: plan.step(index).into(),
            evaluation: plan.evaluation(index),
            rope: RopeTable::new(
                stage.rope_base,
                config.model.head_dim,
                stage.seq_len,
                device,
            )?,
            activations: decoder.activations(tokens, recompute, device)?,
            feed,
            memory: MemoryWatch::begin(&stage.name, device, planned)?,
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

impl<'a> Trainer<'a> {
    /// Enters the stage that the next step belongs to.
    ///
    /// At its very beginning the optimizer is reset if the stage says so, and the data moves on to
    /// the next window edge, so that no document of the stage before comes again. A run that
    /// resumes in the middle of a stage finds both done.
    pub(super) fn begin_stage(&mut self) -> Result<Stage<'a>, RunError> {
        let index = self.progress.stage;
        let config = self.config;
        let stage = &config.stages[index];
        // New files are read through, which takes as long as a start.
        self.watch.phase(Phase::Starting);
        if index > 0 && self.progress.step_in_stage == 0 {
            faults::at("stage::begin::before");
            self.admit_new_files()?;
            let (cursor, dropped) = self.progress.cursor.next_stage(&self.dataset)?;
            tracing::info!(
                "stage {}: data goes on at the next window edge; {} documents ({} tokens) of the \
                 windows begun are left out",
                stage.name,
                dropped.documents,
                dropped.tokens
            );
            self.progress.cursor = cursor;
            if stage.optimizer == StageOptimizer::Reset {
                tracing::info!("stage {}: AdamW starts afresh", stage.name);
                self.zero.reset_moments()?;
                self.progress.adam_step = 0;
                self.control.set_adam_steps(0)?;
            }
            // Another length of context is another level of the loss.
            self.spikes.clear();
            faults::at("stage::begin::after");
        }
        let feed = Feed::new(
            &self.dataset,
            &self.progress,
            self.progress.left_out_with(&self.config.guard),
            stage,
            &self.ranks,
        )?;
        let (plan, decoder) = (&self.plan, &self.decoder);
        let place = (self.device, self.dtype);
        let entered = Stage::new(config, index, plan, decoder, feed, place)?;
        tracing::info!(
            "stage {} | seq_len {} | rope base {} | {} steps of {} tokens | {} micro-batches of {} \
             samples per rank",
            stage.name,
            stage.seq_len,
            stage.rope_base,
            stage.steps,
            stage.batch_tokens,
            stage.accumulation(self.ranks.ranks),
            stage.micro_batch
        );
        let from = self
            .progress
            .last_stage
            .as_ref()
            .map(|mark| mark.name.clone());
        if from.as_ref() != Some(&stage.name) {
            self.event(Event::StageSwitch {
                step: self.progress.step,
                tokens: self.progress.tokens,
                from,
                to: stage.name.clone(),
                seq_len: stage.seq_len as u64,
                rope_base: stage.rope_base,
            });
        }
        Ok(entered)
    }

    /// Lets files in that have appeared among the sources since the last stage.
    fn admit_new_files(&mut self) -> Result<(), RunError> {
        let new = self.dataset.new_files().len();
        // The leader writes the lock, the others read what it wrote.
        let admitted = self.ranks.in_turn(|| Ok(self.dataset.admit_new_files()?))?;
        if new > 0 {
            tracing::info!(
                "{new} new files enter the data, now {}",
                admitted.fingerprint()
            );
        }
        self.dataset = admitted;
        Ok(())
    }
}
