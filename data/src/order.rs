//! The order of a source: row groups permuted, grouped in windows, documents permuted inside.
//!
//! Reading a window touches a few row groups as a whole, so shuffling costs no random access, and
//! the window bounds both the memory and what a stage switch can drop. Permutations are keyed by
//! (seed, source name, generation, epoch), so an order needs no state and any place in it can be
//! found directly.

use crate::error::{Error, Result};
use crate::mix;
use crate::permutation::Permutation;
use crate::sample::Piece;
use crate::shard::Shard;
use crate::split;
use std::sync::Arc;

/// Keeps the keys of row groups and documents apart.
const ROW_GROUPS: u64 = 1;
const DOCUMENTS: u64 = 2;

/// One row group of a source.
#[derive(Debug, Clone)]
pub(crate) struct Group {
    /// Index of the shard in the dataset.
    pub shard: u32,
    /// Row group in the shard.
    pub row_group: u32,
    /// Documents and tokens to train on.
    pub documents: u64,
    pub tokens: u64,
    /// Documents kept for validation.
    pub validation_documents: u64,
}

/// A source: its row groups by generation.
#[derive(Debug, Clone)]
pub(crate) struct Source {
    pub name: String,
    pub max_epochs: Option<f64>,
    pub generations: Vec<Vec<Group>>,
}

/// A few row groups whose documents are read in one permuted order.
#[derive(Debug, Clone)]
pub(crate) struct Window {
    pub generation: usize,
    /// Indices into the generation's groups, in reading order.
    pub groups: Vec<usize>,
    pub documents: u64,
    pub tokens: u64,
}

/// All windows of one epoch of a source.
#[derive(Debug)]
pub(crate) struct EpochPlan {
    pub windows: Vec<Window>,
}

/// A document of a window.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Document {
    pub shard: u32,
    pub row_group: u32,
    pub row: u32,
    /// Length in tokens.
    pub length: u32,
}

/// The documents of a window in training order.
#[derive(Debug)]
pub(crate) struct WindowIndex {
    documents: Vec<Document>,
    /// Tokens up to and including each document.
    ends: Vec<u64>,
}

impl Source {
    /// Training tokens of one epoch.
    pub fn tokens(&self) -> u64 {
        self.generations
            .iter()
            .flatten()
            .map(|group| group.tokens)
            .sum()
    }

    /// Training documents of one epoch.
    pub fn documents(&self) -> u64 {
        self.generations
            .iter()
            .flatten()
            .map(|group| group.documents)
            .sum()
    }

    /// Lays out an epoch: windows of at least `window_tokens`, the last of a generation perhaps
    /// smaller. Row groups that are all validation are left out.
    pub fn plan(&self, seed: u64, epoch: u64, window_tokens: u64) -> EpochPlan {
        let mut windows = Vec::new();
        for (generation, groups) in self.generations.iter().enumerate() {
            let key = self.key(seed, generation, epoch, ROW_GROUPS);
            let permutation = Permutation::new(groups.len() as u64, key);
            let empty = Window {
                generation,
                groups: Vec::new(),
                documents: 0,
                tokens: 0,
            };
            let mut window = empty.clone();
            for position in 0..groups.len() as u64 {
                let index = permutation.apply(position) as usize;
                let group = &groups[index];
                if group.tokens == 0 {
                    continue;
                }
                window.groups.push(index);
                window.documents += group.documents;
                window.tokens += group.tokens;
                if window.tokens >= window_tokens {
                    windows.push(std::mem::replace(&mut window, empty.clone()));
                }
            }
            if window.tokens > 0 {
                windows.push(window);
            }
        }
        EpochPlan { windows }
    }

    /// Reads which documents a window holds and puts them in order. `number` is the window's place
    /// in its epoch.
    pub fn index(
        &self,
        seed: u64,
        epoch: u64,
        number: u64,
        window: &Window,
        shards: &[Arc<Shard>],
        validation_fraction: f64,
    ) -> Result<WindowIndex> {
        let mut unordered = Vec::with_capacity(window.documents as usize);
        for &index in &window.groups {
            let group = &self.generations[window.generation][index];
            unordered.extend(group.read(shards, validation_fraction, false)?);
        }
        let key = mix::key(&[self.key(seed, window.generation, epoch, DOCUMENTS), number]);
        let permutation = Permutation::new(unordered.len() as u64, key);
        let documents: Vec<Document> = (0..unordered.len() as u64)
            .map(|position| unordered[permutation.apply(position) as usize])
            .collect();
        let ends = documents
            .iter()
            .scan(0, |end, document| {
                *end += u64::from(document.length);
                Some(*end)
            })
            .collect();
        Ok(WindowIndex { documents, ends })
    }

    fn key(&self, seed: u64, generation: usize, epoch: u64, purpose: u64) -> u64 {
        mix::key(&[
            seed,
            mix::name_word(&self.name),
            generation as u64,
            epoch,
            purpose,
        ])
    }
}

impl Group {
    /// The row group's documents of one side of the split, in row order.
    pub fn read(
        &self,
        shards: &[Arc<Shard>],
        fraction: f64,
        validation: bool,
    ) -> Result<Vec<Document>> {
        let shard = &shards[self.shard as usize];
        // Ids are the larger part of the index; they are needed only where both sides are present.
        let index = shard.read_index(self.row_group as usize, self.validation_documents > 0)?;
        let on_side = |row: usize| match &index.ids {
            Some(ids) => split::is_validation(&ids[row], fraction) == validation,
            None => !validation,
        };
        let documents: Vec<Document> = (0..index.lengths.len())
            .filter(|&row| on_side(row))
            .map(|row| Document {
                shard: self.shard,
                row_group: self.row_group,
                row: row as u32,
                length: index.lengths[row],
            })
            .collect();
        let expected = if validation {
            self.validation_documents
        } else {
            self.documents
        };
        if documents.len() as u64 != expected {
            // The file was replaced under the running process.
            return Err(Error::Corrupt {
                path: shard.path().to_path_buf(),
                row_group: self.row_group as usize,
                what: "document ids",
            });
        }
        Ok(documents)
    }
}

impl EpochPlan {
    /// Training tokens before window `number`.
    pub fn tokens_before(&self, number: u64) -> u64 {
        self.windows
            .iter()
            .take(number as usize)
            .map(|window| window.tokens)
            .sum()
    }
}

impl WindowIndex {
    /// Training tokens of the window.
    pub fn tokens(&self) -> u64 {
        self.ends.last().copied().unwrap_or(0)
    }

    /// Documents of which at least one token lies at or after `offset`.
    pub fn documents_after(&self, offset: u64) -> u64 {
        (self.ends.len() - self.ends.partition_point(|&end| end <= offset)) as u64
    }

    /// The pieces of documents that `tokens` tokens from `offset` on consist of; fewer at the end
    /// of the window.
    pub fn pieces(&self, offset: u64, tokens: u64) -> Vec<Piece> {
        let last = self.tokens().min(offset.saturating_add(tokens));
        let mut pieces = Vec::new();
        let mut at = offset;
        let mut number = self.ends.partition_point(|&end| end <= offset);
        while at < last {
            let document = &self.documents[number];
            let begin = self.ends[number] - u64::from(document.length);
            let end = self.ends[number].min(last);
            pieces.push(document.piece((at - begin) as u32, (end - at) as u32));
            at = end;
            number += 1;
        }
        pieces
    }
}

impl Document {
    /// The piece of `length` tokens from `start` on.
    pub fn piece(&self, start: u32, length: u32) -> Piece {
        Piece {
            shard: self.shard,
            row_group: self.row_group,
            row: self.row,
            start,
            length,
            document_tokens: self.length,
        }
    }
}
