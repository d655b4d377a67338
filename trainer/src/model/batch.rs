//! A micro-batch of packed samples as tensors.

use oxitron_kernels::{DocumentStarts, cuda::upload, embedding::TokenIds};
use tch::{Device, Tensor};

use super::ModelError;

/// Packed samples of equal length.
///
/// Positions restart at zero with every document: attention never leaves a document, and under that
/// mask RoPE depends on differences of positions only.
#[derive(Debug)]
pub struct Batch {
    /// `samples · seq_len` of them.
    pub tokens: TokenIds,
    /// `[samples · seq_len]` i64; -100 where nothing is predicted.
    pub targets: Tensor,
    /// `[samples · seq_len]` i64.
    pub positions: Tensor,
    /// Where documents begin, per sample.
    pub documents: DocumentStarts,
    /// The same over the whole batch, `[documents + 1]` i32, where a GPU computes.
    pub starts: Option<Tensor>,
    /// Tokens with a target.
    pub target_count: u64,
    /// Samples.
    pub samples: usize,
    /// Tokens per sample.
    pub seq_len: usize,
}

impl Batch {
    /// Builds a batch from rows of equal length.
    ///
    /// `tokens` and `targets` hold the rows one after the other; `starts[row]` lists the offsets at
    /// which the documents of a row begin, ascending, the first being 0.
    ///
    /// # Errors
    /// When the lengths do not agree or the starts are not ascending from 0.
    pub fn new(
        tokens: &[i64],
        targets: &[i64],
        starts: &[Vec<u32>],
        seq_len: usize,
        device: Device,
    ) -> Result<Self, ModelError> {
        let samples = starts.len();
        for length in [tokens.len(), targets.len()] {
            if length != samples * seq_len {
                return Err(ModelError::BatchShape {
                    expected: samples * seq_len,
                    found: length,
                });
            }
        }
        let failed = |source| ModelError::Kernel {
            layer: "batch".into(),
            source,
        };
        let documents = DocumentStarts::new(seq_len, starts).map_err(failed)?;
        // Nobody waits here for what a GPU is doing.
        let tensor = |values: &[i64]| upload(values, device).map_err(failed);
        let starts = device
            .is_cuda()
            .then(|| upload(&documents.cumulative(), device).map_err(failed));
        Ok(Self {
            target_count: targets.iter().filter(|&&target| target >= 0).count() as u64,
            tokens: TokenIds::new(tokens, device).map_err(failed)?,
            starts: starts.transpose()?,
            targets: tensor(targets)?,
            positions: tensor(&documents.positions())?,
            documents,
            samples,
            seq_len,
        })
    }

    /// Tokens of the batch.
    pub fn token_count(&self) -> usize {
        self.samples * self.seq_len
    }
}
