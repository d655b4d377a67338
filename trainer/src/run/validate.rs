//! Validation: the loss on held-back documents.

use std::time::Instant;

use super::{
    RunError, control, feed::validation_batches, stage::Stage, step::Pass, trainer::Trainer,
};
use crate::guard::watchdog::Phase;
use crate::metrics::Event;
use crate::model::Loss;

impl Trainer<'_> {
    /// Measures the loss on the validation documents with the stage's sequence length and RoPE
    /// base. The mean is over all target tokens, whatever the number of ranks.
    pub(super) fn validate(&mut self, stage: &mut Stage<'_>) -> Result<(), RunError> {
        self.watch.phase(Phase::Validate);
        let began = Instant::now();
        if self.config.validation.fraction == 0.0 {
            return Ok(());
        }
        let traced_from = self.tracer.begin();
        let (config, device) = (self.config, self.device);
        let read = validation_batches(&self.dataset, config, stage.config, &self.ranks, device);
        let batches = self.ranks.together(read)?;
        stage.activations.loss.clear()?;
        for batch in &batches {
            let mut pass = Pass {
                batches: std::slice::from_ref(batch),
                decoder: &self.decoder,
                rope: &stage.rope,
                activations: &mut stage.activations,
                zero: &mut self.zero,
            };
            for &action in &stage.evaluation {
                self.watch.act(self.progress.step + 1, action)?;
                let began = self.tracer.begin();
                pass.act(action)?;
                self.tracer.action(action, began, pass.activations);
            }
        }
        let loss = stage.activations.loss.read()?;
        let mine = [loss.sum, loss.targets as f64];
        let sums = control::sum(&self.ranks.world, &mine, &mut self.zero.clock)?;
        // What validation has cost does not belong to the next step.
        self.tracer.collectives(&self.zero.clock.take());
        self.tracer.note("validation", traced_from);
        let loss = Loss {
            sum: sums[0],
            targets: sums[1] as u64,
        };
        if loss.targets == 0 {
            return Ok(());
        }
        tracing::info!(
            "validation | {} | loss {:.4} on {} tokens | {:.1} s",
            stage.config.name,
            loss.mean(),
            loss.targets,
            began.elapsed().as_secs_f64()
        );
        self.event(Event::Validation {
            step: self.progress.step,
            tokens: self.progress.tokens,
            stage: stage.config.name.clone(),
            loss: loss.mean(),
            target_tokens: loss.targets,
            seconds: began.elapsed().as_secs_f64(),
        });
        Ok(())
    }
}
