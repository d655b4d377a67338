//! The end of a run whose last step would take too long: the state before it is saved without a
//! collective, since no rank can count on the others to take part in one.

use std::sync::atomic::AtomicBool;
use std::time::Duration;

use super::{RunError, saver::SaveJob, trainer::Outcome, trainer::Trainer};
use crate::checkpoint::{Checkpoint, Purpose};

/// How long the ranks may take to leave the step.
const LEAVING: Duration = Duration::from_secs(60);
/// How long they may take to save, and rank 0 to commit.
pub(super) const SAVING: Duration = Duration::from_secs(1800);

impl Trainer<'_> {
    /// Saves the state after the last complete step, the same on every rank, and waits until all
    /// ranks may leave.
    ///
    /// # Errors
    /// [`RunError::LastSave`] when a rank could not save.
    pub(super) fn save_and_abandon(&mut self) -> Result<Outcome, RunError> {
        let dog = self.watch.dog();
        let step = dog.pulse().wait_for_abandon(LEAVING);
        let whole = |step: &u64| *step == self.progress.step && !self.torn;
        let Some(step) = step.filter(whole) else {
            let found = self.progress.step;
            let reason = format!("it holds another state, near that after step {found}");
            dog.save_failed(step.unwrap_or(found), &reason);
            return Err(self.last_save_failed());
        };
        if let Err(error) = self.conclude_last(LEAVING) {
            self.watch.dog().save_failed(step, &error.to_string());
            return Err(self.last_save_failed());
        }
        tracing::info!(
            "step {} takes too long and is given up; the state after step {step} is saved",
            step + 1
        );
        // Parts of a save under way may never come.
        self.saver.give_up();
        self.await_save();
        let mut job = self.save_job(Purpose::Stop)?;
        // Ranks may have counted different numbers of saves.
        job.save_id = format!("{}-stop-{step}", self.attempt);
        let written = self.write_units(&job);
        match job.finish_part(written) {
            Ok(_) => self.watch.dog().saved(step),
            Err(error) => {
                tracing::error!("step {step} could not be saved: {error}");
                self.watch.dog().save_failed(step, &error.to_string());
            }
        }
        self.commit_abandoned(&job);
        match self.watch.dog().wait_for_leave(SAVING) {
            Some(departure) if departure.complete => {
                self.stops.answered();
                Ok(Outcome::Abandoned)
            }
            Some(departure) => {
                tracing::error!("the run ends without its last steps: {}", departure.detail);
                Err(self.last_save_failed())
            }
            None => Err(self.last_save_failed()),
        }
    }

    /// On the leader: makes the parts a checkpoint once they are there.
    fn commit_abandoned(&mut self, job: &SaveJob) {
        let Some(commit) = &job.commit else { return };
        if !self.watch.dog().wait_for_parts(SAVING) {
            job.discard();
            return;
        }
        if self.is_saved(job) {
            // By a save that was under way, or before this attempt; it may stay for longer.
            job.discard();
            self.watch.dog().committed(Ok(()));
            return;
        }
        let result = job.commit(commit, &AtomicBool::new(false));
        let reason = result.as_ref().err().map(ToString::to_string);
        let complete = result.is_ok();
        self.note_end(job.end(result));
        let committed = reason.as_deref().map_or(Ok(()), Err);
        self.watch.dog().committed(committed);
        if complete {
            job.retain(commit);
        }
    }

    /// Whether there is a checkpoint of this state already.
    fn is_saved(&self, job: &SaveJob) -> bool {
        Checkpoint::open(&job.folder).is_ok_and(|found| {
            let meta = found.meta();
            (meta.run_id.as_str(), meta.step) == (self.run_id.as_str(), job.step)
        })
    }
}
