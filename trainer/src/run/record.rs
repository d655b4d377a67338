//! What a run writes down while it goes: figures, events, and how it ended.

use std::path::Path;

use oxitron_kernels::decision::Cause;

use super::{
    RunError,
    conclude::Taken,
    control::Agreement,
    device,
    trainer::{Outcome, Trainer},
};
use crate::guard::watchdog::Phase;
use crate::metrics::{Event, StepRecord, StopReason, flops::DecoderShape};

impl Trainer<'_> {
    /// Writes down the figures of a step, on the rank that writes them.
    pub(super) fn record(
        &mut self,
        taken: &Taken,
        agreement: &Agreement,
        step_seconds: f64,
    ) -> Result<(), RunError> {
        let Some(metrics) = &mut self.metrics else {
            return Ok(());
        };
        let stage = &self.config.stages[taken.stage];
        let tokens_per_second = stage.batch_tokens as f64 / step_seconds;
        let shape = DecoderShape::of(&self.config.model);
        let seq_len = stage.seq_len as u64;
        let recompute = self.plan.shapes[taken.stage].recompute;
        let flops = shape.step(
            taken.sample_count * seq_len,
            taken.attention_cost,
            recompute,
        );
        let full = shape.full_attention_step(taken.sample_count, seq_len);
        let used = flops.utilisation(step_seconds, self.ranks.ranks, self.peak_flops);
        let record = StepRecord {
            step: taken.number,
            attempt: self.attempt,
            stage: stage.name.clone(),
            seq_len,
            loss: agreement.record.mean_loss,
            grad_norm: agreement.record.grad_norm,
            lr: taken.lr,
            tokens: taken.tokens,
            target_tokens: agreement.record.targets,
            samples: taken.sample_count,
            tokens_per_second,
            tgs: tokens_per_second / self.ranks.ranks as f64,
            mfu: used.map(|used| used.mfu),
            mfu_full: used.map(|used| used.mfu * full / flops.model),
            hfu: used.map(|used| used.hfu),
            step_seconds,
            data_wait_seconds: taken.data_wait.as_secs_f64(),
            comm_seconds: taken.comm.busy.as_secs_f64(),
            exposed_comm_seconds: taken.comm.exposed.as_secs_f64(),
            optimizer_seconds: taken.optimizer.as_secs_f64(),
            peak_bytes: device::peak_bytes(self.device),
            skipped: agreement.record.cause != Cause::Update,
        };
        metrics.step(&record);
        let last_step = self.config.stages.iter().map(|stage| stage.steps).sum();
        tracing::info!("{}", record.log_line(Some(last_step)));
        Ok(())
    }

    /// Writes an event, on the rank that writes them.
    pub(super) fn event(&mut self, event: Event) {
        if let Some(metrics) = &mut self.metrics {
            metrics.event(event);
        }
    }

    /// Writes down which ranks hold the others up.
    pub(super) fn report_slow_ranks(&mut self) {
        for slow in self.watch.dog().take_slow() {
            self.event(Event::SlowRank {
                step: self.progress.step,
                rank: slow.rank as u32,
                seconds: slow.busy_seconds,
                median_seconds: slow.median_seconds,
            });
        }
    }

    /// Who has asked the run to stop.
    pub(super) fn stop_reason(&self) -> String {
        let here = self.stops.reason().map(str::to_owned);
        let told = || self.watch.dog().stop_reason();
        here.or_else(told).unwrap_or_else(|| "a signal".to_owned())
    }

    /// Says how the run ended.
    pub(super) fn close(&mut self, outcome: &Result<Outcome, RunError>) {
        self.watch.phase(Phase::Finishing);
        self.tracer.close();
        let (reason, detail) = match outcome {
            Ok(Outcome::Finished) => (StopReason::Finished, None),
            Ok(Outcome::Stopped | Outcome::Abandoned) => {
                (StopReason::Requested, Some(self.stop_reason()))
            }
            Err(error) => (StopReason::Failed, Some(error.to_string())),
        };
        self.event(Event::Stop {
            step: self.progress.step,
            reason,
            detail,
        });
    }

    /// A path as people see it: relative to the run directory where it lies inside.
    pub(super) fn shown(&self, path: &Path) -> String {
        path.strip_prefix(&self.config.run.dir)
            .unwrap_or(path)
            .display()
            .to_string()
    }
}
