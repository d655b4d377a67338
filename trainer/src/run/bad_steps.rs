//! What follows a step whose update was not applied: the run goes on without it, goes back to a
//! checkpoint, or gives up.

use std::ops::Range;

use super::{
    RunError, conclude::Taken, control::Agreement, open::open_dataset, restore::read_state,
    trainer::Trainer,
};
use crate::checkpoint::{self, Checkpoint, Scrutiny, SkippedRange};
use crate::config::SpikePolicy;
use crate::guard::{BadStep, Cause, Decision, watchdog::Phase};
use crate::metrics::Event;

/// A checkpoint that the run can go back to.
#[derive(Clone, Copy, Debug)]
struct Earlier {
    step: u64,
    /// Where its data stood.
    samples: u64,
}

/// What follows a step.
#[derive(Debug, Default)]
pub(super) enum Answer {
    /// The next one.
    #[default]
    GoOn,
    /// Steps from a checkpoint on.
    GoBack(WayBack),
}

/// Why and how a run goes back.
#[derive(Debug)]
pub(super) struct WayBack {
    bad: BadStep,
    /// The newest checkpoint before the bad step.
    target: Earlier,
    /// Samples that are left out from there on.
    leave_out: Range<u64>,
}

impl Trainer<'_> {
    /// Answers a step whose update was not applied. All ranks come to the same answer.
    ///
    /// # Errors
    /// [`RunError::BadSteps`] when the limits of `[guard]` are reached.
    pub(super) fn answer_bad_step(
        &mut self,
        taken: &Taken,
        agreement: &Agreement,
        cause: Cause,
    ) -> Result<Answer, RunError> {
        let earlier = self.newest_before(taken.number)?;
        let bad = BadStep {
            step: taken.number,
            samples: taken.samples.clone(),
            loss: agreement.record.mean_loss,
            grad_norm: agreement.record.grad_norm,
            cause,
            checkpoint_sample: earlier.map(|earlier| earlier.samples),
        };
        match (self.bad_steps.decide(&bad), earlier) {
            (Decision::GiveUp(message), _) => Err(RunError::BadSteps(message)),
            (Decision::Rollback { leave_out }, Some(target)) => Ok(Answer::GoBack(WayBack {
                bad,
                target,
                leave_out,
            })),
            _ => {
                self.skip(&bad);
                Ok(Answer::GoOn)
            }
        }
    }

    /// Goes back to a checkpoint, an older one where the newest is damaged.
    ///
    /// # Errors
    /// [`RunError::BadSteps`] when none is sound.
    pub(super) fn go_back(&mut self, way: WayBack) -> Result<(), RunError> {
        let WayBack {
            bad,
            target,
            mut leave_out,
        } = way;
        let mut earlier = Some(target);
        while let Some(target) = earlier {
            leave_out.start = leave_out.start.min(target.samples);
            if self.go_back_to(&bad, target, leave_out.clone())? {
                return Ok(());
            }
            earlier = self.newest_before(target.step)?;
        }
        Err(RunError::BadSteps(format!(
            "{bad}. No checkpoint that the run could go back to is sound, see the log; bring one \
             back and start again"
        )))
    }

    /// Goes on without the update.
    fn skip(&mut self, bad: &BadStep) {
        let Range { start, end } = bad.samples;
        tracing::warn!("update skipped: {bad}");
        self.progress.skipped.push(SkippedRange {
            step: bad.step,
            first_sample: start,
            samples: end - start,
        });
        self.event(Event::Skip {
            step: bad.step,
            reason: bad.to_string(),
            first_sample: start,
            end_sample: end,
        });
    }

    /// The newest checkpoint of a step before `step`, as the leader finds it, if that is the
    /// policy.
    fn newest_before(&mut self, step: u64) -> Result<Option<Earlier>, RunError> {
        if self.config.guard.spike_policy != SpikePolicy::Rollback {
            return Ok(None);
        }
        // The save under way may be the newest.
        self.await_save();
        let dir = &self.config.checkpoint.dir;
        let [found, step, samples] = self.ranks.leaders_choice(|| {
            let newest = checkpoint::newest_valid_before(dir, step, Scrutiny::Structure)?;
            let ours = newest.checkpoint.as_ref().map(Checkpoint::meta);
            let ours = ours.filter(|meta| meta.run_id == self.run_id);
            Ok(ours.map_or([0; 3], |meta| [1, meta.step, meta.samples]))
        })?;
        Ok((found == 1).then_some(Earlier { step, samples }))
    }

    /// Goes back to a checkpoint and leaves out samples from there on; false when the checkpoint is
    /// damaged.
    ///
    /// The samples are left out for good before anything else happens: the checkpoint's manifest is
    /// rewritten. A run that is killed before that meets the same step again and decides again; so
    /// does one that could not write it and was killed before its next save.
    fn go_back_to(
        &mut self,
        bad: &BadStep,
        target: Earlier,
        leave_out: Range<u64>,
    ) -> Result<bool, RunError> {
        let dir = self.config.checkpoint.dir.clone();
        let folder = dir.join(checkpoint::folder_name(target.step));
        tracing::warn!("going back to {}: {bad}", folder.display());
        // Loading may take as long as it does at the start.
        self.watch.phase(Phase::Starting);
        let opened = Checkpoint::open(&folder).map_err(RunError::from);
        let checkpoint = self.ranks.together(opened)?;
        let watch = self.watch;
        let alive = || watch.phase(Phase::Starting);
        // From here until everything is taken over, tensors and counters are of different steps.
        self.torn = true;
        if let Some(reason) = read_state(&mut self.zero, &checkpoint, &self.ranks, true, alive)? {
            self.reject(target.step, reason);
            return Ok(false);
        }
        self.take_over(&checkpoint)?;
        self.torn = false;
        self.progress.left_out.insert(leave_out.clone());
        if let Err(error) = self.abandon_later(&folder, target.step) {
            tracing::error!(
                "{}: what is left out cannot be written down; the next save does it, and until \
                 then a restart comes to the same step again: {error}",
                folder.display()
            );
        }
        self.ranks.together(Ok(()))?;
        self.reopen_dataset(&checkpoint)?;
        self.open_exchanges()?;
        self.watch.begin(target.step)?;
        self.event(Event::Rollback {
            step: bad.step,
            to_step: target.step,
            reason: bad.to_string(),
            first_sample: leave_out.start,
            end_sample: leave_out.end,
        });
        Ok(true)
    }

    /// On the leader: the checkpoint says what is left out, and what came after it goes. In this
    /// order: a run that is killed in between finds the later ones damaged again and comes here.
    fn abandon_later(&self, folder: &std::path::Path, step: u64) -> Result<(), RunError> {
        if !self.ranks.leads() {
            return Ok(());
        }
        let ours = self.manifest_meta()?;
        checkpoint::amend(folder, |meta| {
            meta.left_out = ours.left_out;
            meta.guard = ours.guard;
        })?;
        checkpoint::retire(&self.config.checkpoint.dir, step)?;
        Ok(())
    }

    /// Files that were admitted after the checkpoint wait for their stage again.
    fn reopen_dataset(&mut self, checkpoint: &Checkpoint) -> Result<(), RunError> {
        let recorded = checkpoint.meta().dataset_lock.as_deref();
        if recorded != Some(self.dataset.fingerprint()) {
            let allow_change = self.allow_data_change;
            let (dataset, differences) =
                open_dataset(self.config, &self.ranks, recorded, allow_change)?;
            self.dataset = dataset;
            self.take_changed_data(differences);
        }
        Ok(())
    }
}
