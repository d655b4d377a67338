//! The loop over stages and steps.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use oxitron_data::Dataset;
use oxitron_kernels::{adamw::AdamW, memory};
use tch::Device;

use super::{
    RunError,
    control::Verdict,
    feed::{Feed, StepData},
    folder::RunFolder,
    plan::RunPlan,
    progress::Progress,
    ranks::Ranks,
    replicas,
    stage::Stage,
    step::{Pass, Step, StepReport},
    trace::Tracer,
};
use crate::checkpoint::{ManifestMeta, SkippedRange, SpecialTokens};
use crate::comm::Comm;
use crate::config::{Config, Dtype, StageOptimizer};
use crate::metrics::{Event, MetricsWriter, StepRecord, StopReason};
use crate::model::Decoder;
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
}

/// Trains a model, or goes on with a run that has begun in the configured directory.
///
/// Every rank of `comm` calls it with the same configuration.
///
/// # Errors
/// Whatever keeps the run from starting or going on; when one rank fails, the others return an
/// error too.
pub fn train(config: &Config, comm: &Comm, options: &Options) -> Result<Outcome, RunError> {
    let mut trainer = Trainer::open(config, comm, options)?;
    let outcome = trainer.run();
    let closed = trainer.close(&outcome);
    // What ended the run matters more than that it could not be written down.
    let outcome = outcome?;
    closed?;
    Ok(outcome)
}

/// A run under way on one rank.
pub(super) struct Trainer<'a> {
    pub(super) config: &'a Config,
    pub(super) options: &'a Options,
    pub(super) ranks: Ranks,
    pub(super) device: Device,
    pub(super) dtype: Dtype,
    pub(super) plan: RunPlan,
    pub(super) decoder: Decoder,
    pub(super) zero: Zero,
    pub(super) dataset: Dataset,
    pub(super) progress: Progress,
    pub(super) run_id: String,
    /// How often the run has been started, this time included.
    pub(super) attempt: u32,
    /// The checkpoint that this attempt goes on from, later the newest it has written.
    pub(super) parent: Option<String>,
    /// The leader holds the run directory and writes the figures.
    pub(super) _folder: Option<RunFolder>,
    pub(super) metrics: Option<MetricsWriter>,
    pub(super) tracer: Tracer,
}

impl<'a> Trainer<'a> {
    fn run(&mut self) -> Result<Outcome, RunError> {
        let stages = self.config.stages.len();
        if self.progress.stage >= stages {
            tracing::info!(
                "all stages of this run are done after step {}; to train further, add a stage",
                self.progress.step
            );
        }
        while self.progress.stage < stages {
            let mut stage = self.begin_stage()?;
            while self.progress.stage == stage.index {
                let stop = self.step(&mut stage)?;
                let ended = self.progress.step_in_stage == stage.config.steps;
                let saves = ended || stop || self.due(self.config.checkpoint.every_steps);
                let (guard, step) = (&self.config.guard, self.progress.step);
                if guard.checks_replicas_after(step) || (saves && guard.checks_replicas()) {
                    self.check_replicas()?;
                }
                if ended || self.due(self.config.validation.every_steps) {
                    self.validate(&mut stage)?;
                }
                if ended {
                    self.progress.stage += 1;
                    self.progress.step_in_stage = 0;
                }
                if saves {
                    let began = self.tracer.begin();
                    let saved = self.save();
                    self.ranks.together(saved)?;
                    self.tracer.note("save", began);
                }
                if stop && self.progress.stage < stages {
                    return Ok(Outcome::Stopped);
                }
            }
        }
        Ok(Outcome::Finished)
    }

    fn due(&self, every_steps: u64) -> bool {
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

    /// Enters the stage that the next step belongs to.
    ///
    /// At its very beginning the optimizer is reset if the stage says so, and the data moves on to
    /// the next window edge, so that no document of the stage before comes again. A run that
    /// resumes in the middle of a stage finds both done.
    fn begin_stage(&mut self) -> Result<Stage<'a>, RunError> {
        let index = self.progress.stage;
        let config = self.config;
        let stage = &config.stages[index];
        if index > 0 && self.progress.step_in_stage == 0 {
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
            }
        }
        let left = stage.steps - self.progress.step_in_stage;
        let cursor = &self.progress.cursor;
        let feed = Feed::new(
            &self.dataset,
            cursor,
            stage,
            left,
            self.progress.samples,
            &self.ranks,
        )?;
        let (plan, decoder) = (&self.plan, &self.decoder);
        let entered = Stage::new(config, index, plan, decoder, feed, self.device)?;
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
            })?;
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

    /// Takes one step; true when somebody has asked to stop.
    fn step(&mut self, stage: &mut Stage<'a>) -> Result<bool, RunError> {
        let began = Instant::now();
        let number = self.progress.step + 1;
        self.tracer
            .enter(number, &mut self.zero, &mut stage.activations);
        let data = stage.feed.next(self.device)?;
        self.tracer.note("data", Some(began));
        let lr = stage.config.lr_at(self.progress.step_in_stage);
        let optimizer = &self.config.optimizer;
        let pass = Pass {
            batches: &data.batches,
            decoder: &self.decoder,
            rope: &stage.rope,
            activations: &mut stage.activations,
            zero: &mut self.zero,
        };
        let report = Step {
            pass,
            world: &self.ranks.world,
            adamw: AdamW {
                lr,
                beta1: optimizer.betas.0,
                beta2: optimizer.betas.1,
                eps: optimizer.eps,
                weight_decay: optimizer.weight_decay,
                grad_scale: 1.0,
                step: self.progress.adam_step + 1,
            },
            clip_norm: optimizer.clip_norm,
            stop_requested: self.options.stop.load(Ordering::Relaxed),
            tracer: &mut self.tracer,
        }
        .run(&stage.actions)?;
        self.advance(stage, &data, report.verdict)?;
        self.record(stage, &data, &report, lr, began.elapsed().as_secs_f64())?;
        let (zero, activations) = (&mut self.zero, &mut stage.activations);
        self.tracer
            .leave(number, began, &report.comm, zero, activations);
        Ok(report.agreement.stop_requested)
    }

    /// Moves every counter behind the step. A skipped step counts for all but Adam.
    fn advance(
        &mut self,
        stage: &Stage<'_>,
        data: &StepData,
        verdict: Verdict,
    ) -> Result<(), RunError> {
        self.progress.step += 1;
        self.progress.step_in_stage += 1;
        self.progress.tokens += stage.config.batch_tokens;
        self.progress.samples += data.samples;
        self.progress.cursor = data.cursor.clone();
        self.progress.last_stage = Some(stage.mark());
        match verdict {
            Verdict::Update { .. } => self.progress.adam_step += 1,
            Verdict::Skip { reason } => {
                self.progress.skipped.push(SkippedRange {
                    step: self.progress.step,
                    first_sample: data.first_sample,
                    samples: data.samples,
                });
                self.event(Event::Skip {
                    step: self.progress.step,
                    reason: reason.to_owned(),
                })?;
            }
        }
        Ok(())
    }

    fn record(
        &mut self,
        stage: &Stage<'_>,
        data: &StepData,
        report: &StepReport,
        lr: f64,
        step_seconds: f64,
    ) -> Result<(), RunError> {
        let Some(metrics) = &mut self.metrics else {
            return Ok(());
        };
        let tokens_per_second = stage.config.batch_tokens as f64 / step_seconds;
        let record = StepRecord {
            step: self.progress.step,
            attempt: self.attempt,
            stage: stage.config.name.clone(),
            seq_len: stage.config.seq_len as u64,
            loss: report.agreement.loss.mean(),
            grad_norm: report.agreement.grad_norm,
            lr,
            tokens: self.progress.tokens,
            target_tokens: report.agreement.loss.targets,
            samples: data.samples,
            tokens_per_second,
            tgs: tokens_per_second / self.ranks.ranks as f64,
            // Nobody states the peak of a CPU; the share of an unknown peak is not a figure.
            mfu: None,
            hfu: None,
            step_seconds,
            data_wait_seconds: data.wait.as_secs_f64(),
            comm_seconds: report.comm.busy.as_secs_f64(),
            exposed_comm_seconds: report.comm.exposed.as_secs_f64(),
            optimizer_seconds: report.optimizer.as_secs_f64(),
            peak_bytes: memory::stats().peak_bytes,
            skipped: matches!(report.verdict, Verdict::Skip { .. }),
        };
        metrics.step(&record)?;
        let last_step = self.config.stages.iter().map(|stage| stage.steps).sum();
        tracing::info!("{}", record.log_line(Some(last_step)));
        Ok(())
    }

    /// Writes an event, on the rank that writes them.
    pub(super) fn event(&mut self, event: Event) -> Result<(), RunError> {
        if let Some(metrics) = &mut self.metrics {
            metrics.event(event)?;
        }
        Ok(())
    }

    /// What the manifest says beside the tensors.
    pub(super) fn manifest_meta(&self) -> Result<ManifestMeta, RunError> {
        let mut meta = ManifestMeta {
            run_id: self.run_id.clone(),
            attempt: self.attempt,
            parent: self.parent.clone(),
            dataset_lock: Some(self.dataset.fingerprint().to_owned()),
            choices: [("dtype".to_owned(), dtype_name(self.dtype).into())].into(),
            config: self.config.resolved_toml()?,
            special_tokens: SpecialTokens {
                eos: vec![self.dataset.eos_id()],
                ..SpecialTokens::default()
            },
            ..ManifestMeta::default()
        };
        self.progress.record(self.config.stages.len(), &mut meta)?;
        Ok(meta)
    }

    /// A path as people see it: relative to the run directory where it lies inside.
    pub(super) fn shown(&self, path: &Path) -> String {
        path.strip_prefix(&self.config.run.dir)
            .unwrap_or(path)
            .display()
            .to_string()
    }

    /// Says how the run ended.
    fn close(&mut self, outcome: &Result<Outcome, RunError>) -> Result<(), RunError> {
        self.tracer.close();
        let (reason, detail) = match outcome {
            Ok(Outcome::Finished) => (StopReason::Finished, None),
            Ok(Outcome::Stopped) => (StopReason::Requested, None),
            Err(error) => (StopReason::Failed, Some(error.to_string())),
        };
        self.event(Event::Stop {
            step: self.progress.step,
            reason,
            detail,
        })
    }
}

/// The name of a dtype in a manifest's choices.
pub(super) fn dtype_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::Bf16 => "bf16",
        Dtype::Fp32 => "fp32",
    }
}
