//! When a run saves, and what becomes of it.

use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use super::{
    RunError,
    control::Flags,
    saver::{CommitJob, PartError, SaveJob, Saved, spec},
    trainer::Trainer,
};
use crate::checkpoint::{self, GuardState, ManifestMeta, Purpose, Retention, SpecialTokens};
use crate::config::WhenBusy;
use crate::convert::tokenizer_attachments;
use crate::guard::watchdog::Phase;
use crate::metrics::{Event, units::bytes};

impl Trainer<'_> {
    /// The save that is due after the step just taken, if any.
    pub(super) fn purpose(&self, stage_ended: bool, stop: bool) -> Option<Purpose> {
        let policy = &self.config.checkpoint;
        if stage_ended && self.saves_state() {
            Some(Purpose::StageEnd)
        } else if self.due(policy.every_steps) {
            Some(Purpose::Regular)
        } else if stop {
            Some(Purpose::Stop)
        } else if policy
            .ephemeral_every_steps
            .is_some_and(|steps| self.due(steps))
        {
            Some(Purpose::Ephemeral)
        } else {
            None
        }
    }

    /// Whether the state of now is one to be saved where a stage or the run ends.
    fn saves_state(&self) -> bool {
        self.config.checkpoint.at_end || self.progress.stage < self.config.stages.len()
    }

    /// Saves the state of now. The step loop stands still while it is staged; it is written beside
    /// the steps that follow.
    ///
    /// What goes wrong with the files is said in the log and in an event, and does not end the run:
    /// earlier checkpoints are as they were.
    pub(super) fn save(&mut self, purpose: Purpose, flags: Flags) -> Result<(), RunError> {
        let step = self.progress.step;
        let may_skip = self.config.checkpoint.when_busy == WhenBusy::Skip
            && matches!(purpose, Purpose::Regular | Purpose::Ephemeral)
            && !flags.stop_requested;
        if flags.saving && may_skip {
            tracing::warn!("step {step} is not saved: the save before is still being written");
            self.event(Event::SaveSkipped { step });
            return Ok(());
        }
        let traced_from = self.tracer.begin();
        self.watch.phase(Phase::Save);
        if flags.saving {
            // All ranks know of it, and the leader cannot know that a part will never come.
            self.end_parts()?;
        }
        self.await_save();
        // That belongs to the save before, which has ended everywhere.
        self.save_failed = false;
        self.last_saved = None;
        let job = self.save_job(purpose)?;
        self.remove_stale(&job);
        let staging = self.saver.take_staging();
        match staging.filter(|_| self.config.checkpoint.asynchronous) {
            Some(mut staging) => {
                let began = Instant::now();
                self.zero.stage(&mut staging)?;
                let seconds = began.elapsed().as_secs_f64();
                let size = staging.bytes() as u64;
                tracing::info!(
                    "step {step} staged | {} per rank in {seconds:.3} s | writing goes on in the \
                     background",
                    bytes(size)
                );
                self.event(Event::SaveStaged {
                    step,
                    bytes: size,
                    seconds,
                });
                self.saver.start(job, staging);
            }
            None if self.config.checkpoint.asynchronous => {
                let part = job.finish_part(Err(job.writer_is_gone()));
                self.note_end(job.end(job.conclude(part, &AtomicBool::new(true))));
            }
            None => self.save_directly(&job)?,
        }
        self.tracer.note("save", traced_from);
        Ok(())
    }

    /// Writes a checkpoint without memory to stage it in: unit by unit, while the step loop waits.
    fn save_directly(&mut self, job: &SaveJob) -> Result<(), RunError> {
        let written = self.write_units(job);
        let part = job.finish_part(written);
        let everywhere = self.ranks.all(part.is_ok())?;
        let given_up = (!everywhere).into();
        self.note_end(job.end(job.conclude(part, &given_up)));
        Ok(())
    }

    pub(super) fn write_units(
        &mut self,
        job: &SaveJob,
    ) -> Result<checkpoint::PartSummary, checkpoint::Error> {
        let of_zero = |error| PartError::Zero(error).of(job);
        let all = self.zero.pieces(0..self.zero.units());
        let mut writer = job.part(all.iter().map(spec))?;
        for unit in 0..self.zero.units() {
            self.watch.phase(Phase::Save);
            let mut staging = self.zero.staging(unit..unit + 1).map_err(of_zero)?;
            self.zero.stage(&mut staging).map_err(of_zero)?;
            let write = |values: &[f32]| writer.write(values).map_err(PartError::Checkpoint);
            staging.write(write).map_err(|error| error.of(job))?;
        }
        writer.finish()
    }

    /// What every rank must agree on for a save.
    pub(super) fn save_job(&mut self, purpose: Purpose) -> Result<SaveJob, RunError> {
        let policy = &self.config.checkpoint;
        let step = self.progress.step;
        // A run that goes back takes a step again in the same attempt.
        self.saves += 1;
        let commit = if self.ranks.leads() {
            let mut meta = self.manifest_meta()?;
            meta.purpose = purpose;
            let tokenizer = self.config.data.tokenizer.as_deref().and_then(Path::parent);
            Some(CommitJob {
                meta,
                attachments: tokenizer.map(tokenizer_attachments).unwrap_or_default(),
                retention: Retention {
                    keep: policy.keep,
                    keep_every: policy.keep_every,
                },
            })
        } else {
            None
        };
        Ok(SaveJob {
            step,
            folder: policy.dir.join(checkpoint::folder_name(step)),
            save_id: format!("{}-{}-{step}", self.attempt, self.saves),
            rank: self.ranks.rank,
            ranks: self.ranks.ranks,
            requested: Instant::now(),
            commit,
        })
    }

    /// What the manifest says beside the tensors.
    pub(super) fn manifest_meta(&self) -> Result<ManifestMeta, RunError> {
        let mut meta = ManifestMeta {
            run_id: self.run_id.clone(),
            attempt: self.attempt,
            parent: self.parent.clone(),
            dataset_lock: Some(self.dataset.fingerprint().to_owned()),
            choices: self.choices()?,
            config: self.config.resolved_toml()?,
            special_tokens: SpecialTokens {
                eos: vec![self.dataset.eos_id()],
                ..SpecialTokens::default()
            },
            ..ManifestMeta::default()
        };
        meta.guard = GuardState {
            spikes: self.spikes.state().clone(),
            bad_steps: self.bad_steps.state(),
        };
        self.progress.record(self.config.stages.len(), &mut meta)?;
        Ok(meta)
    }

    /// Waits for the save under way, if there is one.
    pub(super) fn await_save(&mut self) {
        let watch = self.watch;
        if let Some(saved) = self.saver.wait(|| watch.phase(Phase::Save)) {
            self.note_end(saved);
        }
    }

    /// Looks whether a save has ended.
    pub(super) fn look_after_saves(&mut self) {
        if let Some(saved) = self.saver.poll() {
            self.note_end(saved);
        }
    }

    /// Says how a save ended.
    pub(super) fn note_end(&mut self, saved: Saved) {
        let Saved {
            step,
            folder,
            seconds,
            result,
        } = saved;
        let size = match result {
            Ok(size) => size,
            Err(error) => {
                tracing::error!(
                    "step {step} could not be saved; the run goes on, earlier checkpoints are as \
                     they were: {error}"
                );
                self.save_failed = true;
                self.event(Event::SaveFailed {
                    step,
                    reason: error.to_string(),
                });
                return;
            }
        };
        if self.ranks.leads() {
            tracing::info!(
                "step {step} durable | {} | {} in {seconds:.2} s, {:.2} GB/s",
                folder.display(),
                bytes(size),
                size as f64 / 1e9 / seconds
            );
            self.event(Event::SaveDurable {
                step,
                checkpoint: self.shown(&folder),
                bytes: size,
                seconds,
            });
            if let Some(metrics) = &mut self.metrics {
                metrics.sync();
            }
            self.parent = Some(self.shown(&folder));
        }
        self.last_saved = Some(step);
    }

    /// Waits until the parts of the save under way are there on all ranks, or gives it up. All
    /// ranks call it.
    fn end_parts(&mut self) -> Result<(), RunError> {
        let watch = self.watch;
        let mine = self.saver.wait_for_part(|| watch.phase(Phase::Save));
        if !self.ranks.all(mine)? {
            self.saver.give_up();
        }
        Ok(())
    }

    /// Ends the save under way when the run ends with an error that all ranks have.
    pub(super) fn end_saves(&mut self) {
        match self.end_parts() {
            Ok(()) => self.await_save(),
            Err(error) => tracing::error!("the save under way is lost: {error}"),
        }
    }

    /// On the leader: what failed saves have left goes before the next one needs the room.
    fn remove_stale(&self, job: &SaveJob) {
        if let (true, Some(checkpoints)) = (self.ranks.leads(), job.folder.parent())
            && let Err(error) = checkpoint::remove_stale(checkpoints, Some(&job.folder))
        {
            tracing::warn!("saves that did not finish cannot be removed: {error}");
        }
    }

    /// Waits until the last save is durable. All ranks call it, before they leave.
    ///
    /// # Errors
    /// [`RunError::LastSave`] when it could not be written.
    pub(super) fn settle(&mut self) -> Result<(), RunError> {
        self.end_parts()?;
        self.await_save();
        let last_state = if self.saves_state() {
            self.last_saved == Some(self.progress.step)
        } else {
            self.last_saved.is_some()
        };
        // A run that was done when it started saves nothing.
        let durable = self.saves == 0 || last_state;
        if self.ranks.all(durable)? {
            return Ok(());
        }
        Err(self.last_save_failed())
    }

    pub(super) fn last_save_failed(&self) -> RunError {
        RunError::LastSave {
            step: self.progress.step,
            dir: self.config.checkpoint.dir.clone(),
        }
    }
}
