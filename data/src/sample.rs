//! Samples: which tokens make up a packed sequence, and the tokens themselves.

use crate::cache::RowGroupCache;
use crate::error::{Error, Result};
use crate::shard::Shard;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Target of a position that predicts nothing (PyTorch's `ignore_index`).
pub const NO_TARGET: i64 = -100;

/// A stretch of one document.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Piece {
    /// Number of the shard in the dataset.
    pub shard: u32,
    /// Row group in the shard.
    pub row_group: u32,
    /// Row in the row group.
    pub row: u32,
    /// First token, from 0.
    pub start: u32,
    /// Number of tokens.
    pub length: u32,
    /// Tokens of the whole document.
    pub document_tokens: u32,
}

impl Piece {
    /// Positions of the piece that have a token to predict: all but the document's last.
    pub fn target_tokens(&self) -> u64 {
        let ends_document = self.start + self.length == self.document_tokens;
        u64::from(self.length) - u64::from(ends_document)
    }
}

/// What a packed sample consists of. No token has been read for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SampleIndex {
    /// Number of the source.
    pub source: u32,
    /// Tokens of the sample, padding included.
    pub seq_len: u32,
    /// Pieces in order; less than `seq_len` tokens only at the end of a window.
    pub pieces: Vec<Piece>,
}

impl SampleIndex {
    /// Tokens that are not padding.
    pub fn tokens(&self) -> u64 {
        self.pieces
            .iter()
            .map(|piece| u64::from(piece.length))
            .sum()
    }

    /// Positions that predict a token.
    pub fn target_tokens(&self) -> u64 {
        self.pieces.iter().map(Piece::target_tokens).sum()
    }

    /// What attention costs: the sum of squared stretches that attend to each other, padding
    /// counting as one stretch.
    pub fn attention_cost(&self) -> u128 {
        let padding = u64::from(self.seq_len).saturating_sub(self.tokens());
        let lengths = self.pieces.iter().map(|piece| u64::from(piece.length));
        lengths
            .chain([padding])
            .map(|length| u128::from(length) * u128::from(length))
            .sum()
    }
}

/// The samples of one global batch, in the order of the data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BatchIndex {
    /// The samples.
    pub samples: Vec<SampleIndex>,
}

impl BatchIndex {
    /// Positions of the whole batch that predict a token: what the loss is averaged over where no
    /// loss weights are stored.
    pub fn target_tokens(&self) -> u64 {
        self.samples.iter().map(SampleIndex::target_tokens).sum()
    }

    /// What attention costs in the whole batch.
    pub fn attention_cost(&self) -> u128 {
        self.samples.iter().map(SampleIndex::attention_cost).sum()
    }

    /// Tokens of the whole batch that are not padding.
    pub fn tokens(&self) -> u64 {
        self.samples.iter().map(SampleIndex::tokens).sum()
    }
}

/// A packed sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// `[seq_len]` inputs; padding is 0.
    pub tokens: Vec<u32>,
    /// `[seq_len]` token after each input, [`NO_TARGET`] at the end of a document and in padding.
    pub targets: Vec<i64>,
    /// `[seq_len]` weight of each target, if a shard of the sample stores weights.
    pub weights: Option<Vec<f32>>,
    /// Offsets at which a document (or the padding) begins; the first is 0. Attention stays
    /// between two of them.
    pub document_starts: Vec<u32>,
}

/// Reads the tokens of `index`.
pub(crate) fn read(
    index: &SampleIndex,
    shards: &[Arc<Shard>],
    cache: &RowGroupCache,
    vocab_size: usize,
) -> Result<Sample> {
    let seq_len = index.seq_len as usize;
    let mut sample = Sample {
        tokens: Vec::with_capacity(seq_len),
        targets: Vec::with_capacity(seq_len),
        weights: None,
        document_starts: Vec::with_capacity(index.pieces.len() + 1),
    };
    for piece in &index.pieces {
        let shard = shards.get(piece.shard as usize).ok_or_else(|| {
            Error::Cursor(format!(
                "a sample refers to shard {} of {}",
                piece.shard,
                shards.len()
            ))
        })?;
        let group = cache.get(piece.shard, shard, piece.row_group, vocab_size)?;
        let document = group.document(piece.row as usize);
        let (start, end) = (piece.start as usize, (piece.start + piece.length) as usize);
        let Some(inputs) = document.get(start..end) else {
            return Err(Error::Row {
                path: shard.path().to_path_buf(),
                row_group: piece.row_group as usize,
                row: piece.row as usize,
                problem: format!(
                    "tokens {start}..{end} wanted of a document of {}; was the file replaced \
                     during the run?",
                    document.len()
                ),
            });
        };
        let filled = sample.tokens.len();
        sample.document_starts.push(filled as u32);
        sample.tokens.extend_from_slice(inputs);
        // A document cut by the sample's end still predicts its next token; its last token
        // predicts nothing.
        let following = document
            .get(start + 1..document.len().min(end + 1))
            .unwrap_or_default();
        sample
            .targets
            .extend(following.iter().map(|&id| i64::from(id)));
        sample.targets.resize(sample.tokens.len(), NO_TARGET);
        if let Some(stored) = group.weights(piece.row as usize) {
            let weights = sample.weights.get_or_insert_with(|| vec![1.0; filled]);
            weights.extend(
                stored
                    .get(start + 1..stored.len().min(end + 1))
                    .unwrap_or_default(),
            );
        }
        if let Some(weights) = &mut sample.weights {
            weights.resize(sample.tokens.len(), 1.0);
        }
    }
    if sample.tokens.len() < seq_len {
        sample.document_starts.push(sample.tokens.len() as u32);
        sample.tokens.resize(seq_len, 0);
        sample.targets.resize(seq_len, NO_TARGET);
        if let Some(weights) = &mut sample.weights {
            weights.resize(seq_len, 1.0);
        }
    }
    Ok(sample)
}
