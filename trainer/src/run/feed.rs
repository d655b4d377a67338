//! From the data to the micro-batches of a rank.

use std::ops::Range;
use std::time::Duration;

use oxitron_data::{
    BatchIndex, Cursor, Dataset, Loader, LoaderOptions, NO_TARGET, Next, Sample, SkipRanges, assign,
};
use tch::Device;

use super::{RunError, progress::Progress, ranks::Ranks};
use crate::config::{Config, StageConfig};
use crate::model::Batch;

/// Batches that are read ahead of the step under way.
const AHEAD: usize = 2;

/// Tokens per document of a slot without a sample, so that its attention costs little.
const EMPTY_DOCUMENT: usize = 512;

/// What a rank trains on in one step.
pub(super) struct StepData {
    /// One per micro-batch.
    pub(super) batches: Vec<Batch>,
    /// Samples of the global batch.
    pub(super) count: u64,
    /// Sum over the global batch of the squared lengths of the stretches that attend to each other.
    pub(super) attention_cost: u64,
    /// From the first of them to where the next batch begins, by index in the run; samples that are
    /// left out may lie in between.
    pub(super) samples: Range<u64>,
    /// Where the data goes on after this step.
    pub(super) cursor: Cursor,
    /// How long the step waited for it.
    pub(super) wait: Duration,
}

/// The steps of a stage, read ahead by a thread of their own.
pub(super) struct Feed {
    loader: Loader,
    seq_len: usize,
}

impl Feed {
    /// What is left of a stage after `progress`, without the samples of `left_out`.
    pub(super) fn new(
        dataset: &Dataset,
        progress: &Progress,
        left_out: SkipRanges,
        stage: &StageConfig,
        ranks: &Ranks,
    ) -> Result<Self, RunError> {
        let weights: Vec<f64> = dataset
            .source_names()
            .into_iter()
            .map(|name| stage.weights.get(name).copied().unwrap_or(0.0))
            .collect();
        let stream = dataset
            .stream(&progress.cursor, stage.seq_len, &weights)?
            .leaving_out(progress.samples, left_out);
        let options = LoaderOptions {
            samples_per_batch: stage.samples_per_batch(),
            ranks: ranks.ranks,
            rank: ranks.rank,
            micro_batch: stage.micro_batch,
            batches: stage.steps - progress.step_in_stage,
            ahead: AHEAD,
        };
        let loader = Loader::start(stream, options)?;
        Ok(Self {
            loader,
            seq_len: stage.seq_len,
        })
    }

    /// The next step. A disk may let it wait for ever: `given_up` says when to stop waiting.
    ///
    /// # Errors
    /// [`RunError::Abandoned`] when it was given up; what reading met.
    pub(super) fn next(
        &mut self,
        device: Device,
        given_up: &dyn Fn() -> bool,
    ) -> Result<StepData, RunError> {
        let (batch, wait) = match self.loader.next_batch(given_up)? {
            Next::Batch(batch, wait) => (batch, wait),
            Next::GivenUp => return Err(RunError::Abandoned),
            Next::End => {
                return Err(RunError::Defect(
                    "the stage asked for more steps than it has",
                ));
            }
        };
        let micro_batches = batch.micro_batches.iter();
        let batches = micro_batches.map(|slots| tensors(slots, self.seq_len, device));
        Ok(StepData {
            batches: batches.collect::<Result<_, _>>()?,
            count: batch.samples as u64,
            attention_cost: u64::try_from(batch.attention_cost).unwrap_or(u64::MAX),
            samples: batch.first_sample..batch.next_sample,
            cursor: batch.cursor,
            wait,
        })
    }
}

/// This rank's micro-batches of the validation set: the first samples of its fixed order, as many
/// as the configuration allows.
pub(super) fn validation_batches(
    dataset: &Dataset,
    config: &Config,
    stage: &StageConfig,
    ranks: &Ranks,
    device: Device,
) -> Result<Vec<Batch>, RunError> {
    let most = config.validation.batches * stage.samples_per_batch();
    let samples: Vec<_> = dataset
        .validation(stage.seq_len)
        .take(most)
        .collect::<Result<_, _>>()?;
    let index = BatchIndex { samples };
    let assignment = assign(&index, ranks.ranks, stage.micro_batch);
    let read = |slot: &Option<usize>| {
        slot.map(|sample| dataset.read(&index.samples[sample]))
            .transpose()
    };
    // Slots without a sample run too: every rank takes part in as many gathers.
    let mut batches = Vec::new();
    for slots in assignment.rank(ranks.rank) {
        let samples: Vec<_> = slots.iter().map(read).collect::<Result<_, _>>()?;
        batches.push(tensors(&samples, stage.seq_len, device)?);
    }
    Ok(batches)
}

/// Slots to tensors; a slot without a sample predicts nothing.
fn tensors(slots: &[Option<Sample>], seq_len: usize, device: Device) -> Result<Batch, RunError> {
    let mut tokens = Vec::with_capacity(slots.len() * seq_len);
    let mut targets = Vec::with_capacity(slots.len() * seq_len);
    let mut starts = Vec::with_capacity(slots.len());
    for slot in slots {
        match slot {
            Some(sample) => {
                tokens.extend(sample.tokens.iter().map(|&token| i64::from(token)));
                targets.extend(weighted_targets(sample)?);
                starts.push(sample.document_starts.clone());
            }
            None => {
                tokens.resize(tokens.len() + seq_len, 0);
                targets.resize(targets.len() + seq_len, NO_TARGET);
                starts.push((0..seq_len as u32).step_by(EMPTY_DOCUMENT).collect());
            }
        }
    }
    Ok(Batch::new(&tokens, &targets, &starts, seq_len, device)?)
}

/// The targets of a sample without those whose loss weight is 0.
fn weighted_targets(sample: &Sample) -> Result<Vec<i64>, RunError> {
    let Some(weights) = &sample.weights else {
        return Ok(sample.targets.clone());
    };
    let keep = |(&target, &weight): (&i64, &f32)| match weight {
        0.0 => Ok(NO_TARGET),
        1.0 => Ok(target),
        _ => Err(RunError::Unusable(format!(
            "the token shards give a token the loss weight {weight}; 0 (not a target) and 1 are \
             supported: write the shards with those"
        ))),
    };
    sample.targets.iter().zip(weights).map(keep).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn sample(weights: Option<Vec<f32>>) -> Sample {
        Sample {
            tokens: vec![5, 6, 7],
            targets: vec![6, 7, -100],
            weights,
            document_starts: vec![0],
        }
    }

    #[test]
    fn loss_weights_select_targets() {
        assert_eq!(weighted_targets(&sample(None)).unwrap(), [6, 7, -100]);
        let selected = weighted_targets(&sample(Some(vec![0.0, 1.0, 1.0]))).unwrap();
        assert_eq!(selected, [-100, 7, -100]);
        let error = weighted_targets(&sample(Some(vec![0.5, 1.0, 1.0]))).unwrap_err();
        assert!(error.to_string().contains("loss weight 0.5"), "{error}");
    }

    #[test]
    fn a_slot_without_a_sample_predicts_nothing() {
        let slots = [Some(sample(None)), None];
        let batch = tensors(&slots, 3, Device::Cpu).unwrap();
        assert_eq!((batch.samples, batch.target_count), (2, 2));
    }
}
