//! The end of a step: what it came to, and what follows from that.
//!
//! A step is **taken** when all of its work has been issued. A GPU is then still busy with it, and
//! what the ranks have agreed on is not known on the host. Instead of waiting, the host goes on to
//! issue the next step, and **concludes** the one before it just before the next agreement, which
//! needs its limits: by then its figures have long been there.
//!
//! ```text
//! host   issue k ──▶ forward, backward of k+1 ──▶ conclude k ──▶ agreement, update of k+1 ──▶ …
//! GPU         step k ───────────────▶ step k+1 ───────────────▶ …
//! ```
//!
//! So decisions about a step do not depend on how far the host is ahead. Only what they come to is
//! later: where a run has to go back, the step under way is **moot**: it is issued without an
//! agreement to its end, and updates nothing, because the last decision was not to.
//!
//! A step is concluded at once where the processor computes, and where something comes after it that
//! needs to know: a save, a validation, the end of a stage.

use std::ops::Range;
use std::time::{Duration, Instant};

use oxitron_kernels::decision;

use super::{
    RunError,
    bad_steps::Answer,
    control::{Agreement, Flags, Verdict},
    stage::Stage,
    trainer::Trainer,
};
use crate::config::SpikePolicy;
use crate::zero::CommClock;

/// A step that has been taken.
#[derive(Debug)]
pub(super) struct Taken {
    /// Counted from 1 over the whole run.
    pub(super) number: u64,
    /// Index of its stage.
    pub(super) stage: usize,
    /// Positions trained on, its own among them.
    pub(super) tokens: u64,
    /// Indices in the run of its samples.
    pub(super) samples: Range<u64>,
    /// How many of them it has trained on.
    pub(super) sample_count: u64,
    /// Squared lengths of their documents, summed.
    pub(super) attention_cost: u64,
    pub(super) lr: f64,
    pub(super) began: Instant,
    pub(super) data_wait: Duration,
    pub(super) comm: CommClock,
    pub(super) optimizer: Duration,
}

/// What a step has come to.
#[derive(Debug, Default)]
pub(super) struct Conclusion {
    /// What the ranks have told each other.
    pub(super) flags: Flags,
    pub(super) answer: Answer,
}

impl Trainer<'_> {
    /// Whether the state after the step just taken is looked at before the next one: what it came
    /// to must be known then.
    pub(super) fn pauses(&self, stage: &Stage<'_>) -> bool {
        let ended = self.progress.stage != stage.index;
        self.purpose(ended, false).is_some()
            || self.config.guard.checks_replicas_after(self.progress.step)
            || self.due(self.config.validation.every_steps)
    }

    /// Concludes the step before the one under way, if that has not been done.
    ///
    /// # Errors
    /// As [`Trainer::conclude`]; a step that was given up can still be concluded.
    pub(super) fn conclude_before(
        &mut self,
        given_up: &dyn Fn() -> bool,
    ) -> Result<Conclusion, RunError> {
        let Some(before) = self.taken.take() else {
            return Ok(Conclusion::default());
        };
        let conclusion = self.conclude(&before, given_up);
        if matches!(conclusion, Err(RunError::Abandoned)) {
            self.taken = Some(before);
        }
        conclusion
    }

    /// Concludes the last step of a run that is given up, without a word to other ranks.
    ///
    /// # Errors
    /// As [`Trainer::conclude`]; [`RunError::BadSteps`] for a step after which the run would have
    /// gone back.
    pub(super) fn conclude_last(&mut self, within: Duration) -> Result<(), RunError> {
        let Some(last) = self.taken.take() else {
            return Ok(());
        };
        let deadline = Instant::now() + within;
        let late = || Instant::now() > deadline;
        let verdict = self.control.read(&late)?.verdict(&self.spikes);
        let goes_back = self.config.guard.spike_policy == SpikePolicy::Rollback;
        if goes_back && verdict != Verdict::Update {
            return Err(RunError::BadSteps(format!(
                "step {} must not be learned from, and going back to a checkpoint takes all ranks",
                last.number
            )));
        }
        self.conclude(&last, &late).map(drop)
    }

    /// Learns what a step has come to, writes it down, and answers it if it must not be learned
    /// from. All ranks come to the same answer.
    ///
    /// # Errors
    /// [`RunError::Abandoned`] when `given_up` says so before it is known; [`RunError::BadSteps`]
    /// when the limits of `[guard]` are reached.
    pub(super) fn conclude(
        &mut self,
        taken: &Taken,
        given_up: &dyn Fn() -> bool,
    ) -> Result<Conclusion, RunError> {
        // What is awaited never comes where the GPUs have lost each other, and is no agreement where
        // they have been torn apart.
        let lost = || given_up() || self.ranks.world.check().is_err();
        let agreement = self.control.read(&lost);
        self.ranks.world.check()?;
        let agreement = agreement?;
        let verdict = agreement.verdict(&self.spikes);
        let flags = agreement.flags;
        self.hear(flags);
        self.count(&agreement);
        let now = Instant::now();
        // Steps that run ahead of their conclusion overlap; each lasts from that of the one before.
        let began = self.concluded.map_or(taken.began, |at| at.max(taken.began));
        self.concluded = Some(now);
        let elapsed = now - began;
        let busy = elapsed.saturating_sub(taken.comm.exposed);
        self.watch.done(busy.as_secs_f64());
        self.record(taken, &agreement, elapsed.as_secs_f64())?;
        self.report_slow_ranks();
        let answer = match verdict {
            Verdict::Update => Answer::GoOn,
            Verdict::Skip { cause } => self.answer_bad_step(taken, &agreement, cause)?,
        };
        Ok(Conclusion { flags, answer })
    }

    /// Takes note of what the others have told.
    fn hear(&mut self, flags: Flags) {
        if flags.save_failed {
            // A part will never come.
            self.saver.give_up();
        }
        if flags.stop_requested {
            tracing::info!("asked to stop after this step: {}", self.stop_reason());
        }
    }

    /// Moves the counters that a skipped step leaves alone.
    fn count(&mut self, agreement: &Agreement) {
        let record = &agreement.record;
        self.progress.adam_step = record.adam_steps;
        if record.cause == decision::Cause::Update {
            self.bad_steps.applied();
            if self.bad_steps.watches_spikes() {
                self.spikes.accept(record.mean_loss, record.grad_norm);
            }
        }
    }
}
