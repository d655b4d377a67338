//! Validation: the loss on held-back documents.

use std::time::Instant;

use super::{RunError, control, feed::validation_batches, stage::Stage, trainer::Trainer};
use crate::metrics::Event;
use crate::model::{Loss, Objective};
use crate::zero::CommClock;

impl Trainer<'_> {
    /// Measures the loss on the validation documents with the stage's sequence length and RoPE
    /// base. The mean is over all target tokens, whatever the number of ranks.
    pub(super) fn validate(&mut self, stage: &mut Stage<'_>) -> Result<(), RunError> {
        let began = Instant::now();
        if self.config.validation.fraction == 0.0 {
            return Ok(());
        }
        let (config, device) = (self.config, self.device);
        let read = validation_batches(&self.dataset, config, stage.config, &self.ranks, device);
        let batches = self.ranks.together(read)?;
        let mut loss = Loss::default();
        let last_layer = self.decoder.layers() - 1;
        for batch in &batches {
            for layer in 0..last_layer {
                let weights = self.zero.weights(layer)?;
                let (rope, activations) = (&stage.rope, &mut stage.activations);
                self.decoder
                    .forward(layer, &weights, batch, rope, activations)?;
            }
            let weights = self.zero.weights(last_layer)?;
            let activations = &mut stage.activations;
            loss += self
                .decoder
                .head(&weights, batch, activations, Objective::Loss)?;
        }
        let mine = [loss.sum, loss.targets as f64];
        let sums = control::sum(&self.ranks.world, &mine, &mut CommClock::default())?;
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
        })
    }
}
