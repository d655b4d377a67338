//! The loop over stages and steps.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use oxitron_data::Dataset;
use oxitron_kernels::{adamw::AdamW, decision::Limits};
use tch::Device;

use super::{
    RunError,
    bad_steps::Answer,
    conclude::{Conclusion, Taken},
    control::{Control, Flags},
    feed::StepData,
    folder::RunFolder,
    plan::RunPlan,
    progress::Progress,
    ranks::Ranks,
    replicas,
    saver::Saver,
    stage::Stage,
    step::{Pass, Rules, Step},
    stops::Stops,
    trace::Tracer,
    watch::Watch,
};
use crate::comm::Comm;
use crate::config::{Config, Dtype};
use crate::faults;
use crate::guard::{BadSteps, Spikes, watchdog::Phase};
use crate::metrics::MetricsWriter;
use crate::model::Decoder;
use crate::plan::Action;
use crate::zero::Zero;

/// What a run is told beside its configuration.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Resume although the configuration differs in what changes the result.
    pub allow_config_change: bool,
    /// Resume although the token data differ from those that the run was trained on.
    pub allow_data_change: bool,
    /// Resume from a checkpoint whose payload has not been read over to compare its checksums.
    pub no_verify: bool,
    /// Set from outside to end the run after the step under way, with a checkpoint.
    pub stop: Arc<AtomicBool>,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All stages are done.
    Finished,
    /// It was asked to stop, has saved, and can be resumed.
    Stopped,
    /// The same in the middle of a step: collectives are under way that will never end, so the
    /// process must end without meeting the others ([`Comm::desert`]).
    Abandoned,
}

/// Trains a model, or goes on with a run that has begun in the configured directory.
///
/// Every rank of `comm` calls it with the same configuration, under the `watch` that it has set up
/// with the others.
///
/// # Errors
/// Whatever keeps the run from starting or going on; when one rank fails, the others return an
/// error too.
pub fn train(
    config: &Config,
    comm: &Comm,
    watch: &Watch,
    options: &Options,
) -> Result<Outcome, RunError> {
    let mut trainer = Trainer::open(config, comm, watch, options)?;
    let mut outcome = trainer.run();
    match &outcome {
        // This rank may leave the step before it is known which state all ranks keep.
        Err(error) if error.is_given_up() => outcome = trainer.save_and_abandon(),
        Err(error) if watch.abandoning() => watch.cannot_save(&error.to_string()),
        // All ranks are here; what they began to save is worth having.
        Err(RunError::BadSteps(_) | RunError::ReplicasDiffer { .. }) => trainer.end_saves(),
        _ => {}
    }
    trainer.close(&outcome);
    outcome
}

/// A run under way on one rank.
pub(super) struct Trainer<'a> {
    pub(super) config: &'a Config,
    pub(super) watch: &'a Watch,
    pub(super) ranks: Ranks,
    pub(super) device: Device,
    pub(super) dtype: Dtype,
    /// Of this rank's device, in operations per second, where it is known.
    pub(super) peak_flops: Option<f64>,
    pub(super) plan: RunPlan,
    pub(super) decoder: Decoder,
    pub(super) zero: Zero,
    pub(super) control: Control,
    /// Whether steps are issued before it is known what the one before came to.
    pub(super) runs_ahead: bool,
    /// The step before, where that is so.
    pub(super) taken: Option<Taken>,
    /// When the last step was concluded.
    pub(super) concluded: Option<Instant>,
    pub(super) dataset: Dataset,
    pub(super) progress: Progress,
    pub(super) run_id: String,
    /// How often the run has been started, this time included.
    pub(super) attempt: u32,
    /// The checkpoint that this attempt goes on from, later the newest it has written.
    pub(super) parent: Option<String>,
    pub(super) stops: Stops,
    pub(super) saver: Saver,
    /// Saves begun in this attempt.
    pub(super) saves: u64,
    /// A save has failed on this rank since the last step told the others.
    pub(super) save_failed: bool,
    /// The step whose save was the last to do well on this rank.
    pub(super) last_saved: Option<u64>,
    /// The run is going back to a checkpoint: its state is no state of any step.
    pub(super) torn: bool,
    /// Whether the data may differ from those of a checkpoint.
    pub(super) allow_data_change: bool,
    pub(super) spikes: Spikes,
    pub(super) bad_steps: BadSteps,
    /// The leader holds the run directory and writes the figures.
    pub(super) _folder: Option<RunFolder>,
    pub(super) metrics: Option<MetricsWriter>,
    pub(super) tracer: Tracer,
}

/// What a step leaves to be done after it, decided alike on all ranks.
pub(super) struct StepEnd {
    /// What the ranks have told each other in the steps that were concluded.
    flags: Flags,
    /// The run has gone back to a checkpoint, perhaps to an earlier stage.
    went_back: bool,
}

impl StepEnd {
    fn of(flags: Flags) -> Self {
        Self {
            flags,
            went_back: false,
        }
    }

    fn went_back(flags: Flags) -> Self {
        Self {
            flags,
            went_back: true,
        }
    }
}

impl<'a> Trainer<'a> {
    pub(super) fn run(&mut self) -> Result<Outcome, RunError> {
        let stages = self.config.stages.len();
        if self.progress.stage >= stages {
            tracing::info!(
                "all stages of this run are done after step {}; to train further, add a stage or \
                 give the last one more steps",
                self.progress.step
            );
        }
        while self.progress.stage < stages {
            let mut stage = self.begin_stage()?;
            while self.progress.stage == stage.index {
                let StepEnd { flags, went_back } = self.step(&mut stage)?;
                if went_back {
                    break;
                }
                self.between_steps(&mut stage, flags)?;
                if flags.stop_requested && self.progress.stage < stages {
                    self.settle()?;
                    self.stops.answered();
                    return Ok(Outcome::Stopped);
                }
            }
        }
        self.settle()?;
        self.stops.answered();
        Ok(Outcome::Finished)
    }

    /// What happens after a step: checks, validation, the end of the stage, a save.
    fn between_steps(&mut self, stage: &mut Stage<'a>, flags: Flags) -> Result<(), RunError> {
        let ended = self.progress.stage != stage.index;
        let save = self.purpose(ended, flags.stop_requested);
        let guard = &self.config.guard;
        if guard.checks_replicas_after(self.progress.step)
            || (save.is_some() && guard.checks_replicas())
        {
            self.check_replicas()?;
        }
        if ended || self.due(self.config.validation.every_steps) {
            self.validate(stage)?;
        }
        match save {
            Some(purpose) => self.save(purpose, flags),
            None => Ok(()),
        }
    }

    pub(super) fn due(&self, every_steps: u64) -> bool {
        self.progress.step.is_multiple_of(every_steps)
    }

    /// Compares the weights of all ranks. It happens before every save too: a checkpoint is put
    /// together from what different ranks hold, and would hide for ever that they differ.
    fn check_replicas(&mut self) -> Result<(), RunError> {
        let (mesh, step) = (&self.plan.layout.mesh, self.progress.step);
        let began = self.tracer.begin();
        replicas::check(&mut self.zero, &self.ranks, mesh, step)?;
        self.tracer.note("replica check", began);
        Ok(())
    }

    /// Takes one step, and concludes it or the one before.
    pub(super) fn step(&mut self, stage: &mut Stage<'a>) -> Result<StepEnd, RunError> {
        let began = Instant::now();
        let number = self.progress.step + 1;
        faults::set_step(number);
        self.watch.enter(number);
        self.watch.phase(Phase::Data);
        self.tracer
            .enter(number, &mut self.zero, &mut stage.activations);
        let watch = self.watch;
        let given_up = || watch.gives_up(number);
        let data = stage.feed.next(self.device, &given_up)?;
        self.tracer.note("data", Some(began));
        let lr = stage.config.lr_at(self.progress.step_in_stage);
        self.control.begin_step()?;
        stage.activations.loss.clear()?;

        let actions = Arc::clone(&stage.actions);
        let is_control = |action: &Action| *action == Action::Control;
        let at = actions.iter().position(is_control);
        let at = at.ok_or(RunError::Defect("a step without an agreement"))?;
        let (gradient, control, update) = (&actions[..at], &actions[at..=at], &actions[at + 1..]);
        self.walk(stage, &data, lr, gradient, None)?;
        let before = self.conclude_before(&given_up)?;
        if let Answer::GoBack(way) = before.answer {
            // A stop before the run has gone back leaves what is no state to go on from.
            self.torn = true;
            self.walk(stage, &data, lr, update, None)?;
            self.go_back(way)?;
            return Ok(StepEnd::went_back(before.flags));
        }
        let rules = Rules {
            limits: self.limits(),
            flags: self.flags(),
        };
        self.walk(stage, &data, lr, control, Some(rules))?;
        // Nobody has waited for the agreement: a stop from here on leaves unknown state.
        self.torn = self.runs_ahead;
        let optimizer = self.walk(stage, &data, lr, update, None)?;
        self.advance(stage, &data);
        self.torn = false;
        // The tensors and counters of this step are complete here, or will be when it is concluded.
        self.watch.enter(number + 1);
        let comm = self.zero.clock.take();
        self.tracer
            .leave(number, began, &comm, &mut self.zero, &mut stage.activations);
        stage.memory.step();
        let taken = Taken {
            number,
            stage: stage.index,
            tokens: self.progress.tokens,
            samples: data.samples,
            sample_count: data.count,
            attention_cost: data.attention_cost,
            lr,
            began,
            data_wait: data.wait,
            comm,
            optimizer,
        };
        if self.runs_ahead && !before.flags.stop_requested && !self.pauses(stage) {
            self.taken = Some(taken);
            return Ok(StepEnd::of(before.flags));
        }
        let Conclusion { mut flags, answer } = self.conclude(&taken, &given_up)?;
        flags.stop_requested |= before.flags.stop_requested;
        if let Answer::GoBack(way) = answer {
            self.go_back(way)?;
            return Ok(StepEnd::went_back(flags));
        }
        Ok(StepEnd::of(flags))
    }

    /// Issues some of the actions of a step. Returns how long those of the optimizer took.
    fn walk(
        &mut self,
        stage: &mut Stage<'a>,
        data: &StepData,
        lr: f64,
        actions: &[Action],
        rules: Option<Rules>,
    ) -> Result<Duration, RunError> {
        let optimizer = &self.config.optimizer;
        let pass = Pass {
            batches: &data.batches,
            decoder: &self.decoder,
            rope: &stage.rope,
            activations: &mut stage.activations,
            zero: &mut self.zero,
        };
        Step {
            pass,
            world: &self.ranks.world,
            control: &mut self.control,
            adamw: AdamW {
                lr,
                beta1: optimizer.betas.0,
                beta2: optimizer.betas.1,
                eps: optimizer.eps,
                weight_decay: optimizer.weight_decay,
            },
            rules,
            stops: Some(&self.stops),
            number: self.progress.step + 1,
            watch: Some(self.watch),
            tracer: &mut self.tracer,
        }
        .run(actions)
    }

    /// What a step may not exceed. Where spikes have no consequences, that is nothing but the norm
    /// that is clipped.
    fn limits(&self) -> Limits {
        let clip_norm = self.config.optimizer.clip_norm;
        if self.bad_steps.watches_spikes() {
            Limits {
                clip_norm,
                ..self.spikes.limits()
            }
        } else {
            Limits::clip(clip_norm)
        }
    }

    /// What this rank has to tell the others in the step's agreement.
    fn flags(&mut self) -> Flags {
        self.look_after_saves();
        Flags {
            stop_requested: false,
            saving: self.saver.busy(),
            save_failed: std::mem::take(&mut self.save_failed),
        }
    }

    /// Moves the counters behind the step that do not depend on what it came to.
    fn advance(&mut self, stage: &Stage<'_>, data: &StepData) {
        self.progress.step += 1;
        self.progress.step_in_stage += 1;
        self.progress.steps_of_last_stage = self.progress.step_in_stage;
        if self.progress.step_in_stage == stage.config.steps {
            self.progress.stage += 1;
            self.progress.step_in_stage = 0;
        }
        self.progress.tokens += stage.config.batch_tokens;
        self.progress.samples = data.samples.end;
        self.progress.cursor = data.cursor.clone();
        self.progress.last_stage = Some(stage.mark());
    }
}
