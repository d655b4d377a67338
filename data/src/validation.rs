//! The validation set as packed samples in one fixed order.

use crate::dataset::Dataset;
use crate::error::Result;
use crate::mix;
use crate::order::{Document, Group};
use crate::permutation::Permutation;
use crate::sample::{Piece, SampleIndex};
use std::collections::VecDeque;

/// Key of the order in which row groups are visited, so that the first samples come from all over
/// the data; it never changes, and the seed has no part in it.
const ORDER_KEY: u64 = 0x6f72_6465_7276_616c;

/// Packed validation samples: sources take turns, and within a source documents come in an order
/// that depends on the data alone. Only the last sample of a source is padded. Taking the first
/// `n` gives the same documents in every run on this dataset.
#[derive(Debug)]
pub struct ValidationSamples {
    dataset: Dataset,
    seq_len: usize,
    sources: Vec<SourceSamples>,
    turn: usize,
}

/// What is left of one source.
#[derive(Debug)]
struct SourceSamples {
    number: usize,
    groups: VecDeque<Group>,
    documents: VecDeque<Document>,
    /// Tokens taken of the first document.
    offset: u32,
}

impl ValidationSamples {
    pub(crate) fn new(dataset: &Dataset, seq_len: usize) -> Self {
        let sources = (0..dataset.source_names().len())
            .map(|number| {
                let mut groups = VecDeque::new();
                for (generation, members) in dataset.groups(number).iter().enumerate() {
                    let key = mix::key(&[ORDER_KEY, generation as u64]);
                    let order = Permutation::new(members.len() as u64, key);
                    let visited = (0..order.len()).map(|i| &members[order.apply(i) as usize]);
                    groups.extend(visited.filter(|g| g.validation_documents > 0).cloned());
                }
                SourceSamples {
                    number,
                    groups,
                    documents: VecDeque::new(),
                    offset: 0,
                }
            })
            .collect();
        // A sample of no tokens would never end.
        Self {
            dataset: dataset.clone(),
            seq_len: seq_len.max(1),
            sources,
            turn: 0,
        }
    }
}

impl Iterator for ValidationSamples {
    type Item = Result<SampleIndex>;

    fn next(&mut self) -> Option<Self::Item> {
        for _ in 0..self.sources.len() {
            let source = &mut self.sources[self.turn];
            self.turn = (self.turn + 1) % self.dataset.source_names().len();
            match source.next(&self.dataset, self.seq_len) {
                Ok(None) => {}
                Ok(Some(sample)) => return Some(Ok(sample)),
                Err(error) => {
                    // Nothing sensible follows a shard that cannot be read.
                    self.sources.clear();
                    return Some(Err(error));
                }
            }
        }
        None
    }
}

impl SourceSamples {
    fn next(&mut self, dataset: &Dataset, seq_len: usize) -> Result<Option<SampleIndex>> {
        let mut pieces: Vec<Piece> = Vec::new();
        let mut left = seq_len as u64;
        while left > 0 {
            let Some(document) = self.documents.front() else {
                let Some(group) = self.groups.pop_front() else {
                    break;
                };
                self.documents.extend(dataset.validation_documents(&group)?);
                continue;
            };
            let rest = u64::from(document.length - self.offset);
            let length = rest.min(left) as u32;
            pieces.push(document.piece(self.offset, length));
            left -= u64::from(length);
            self.offset += length;
            if self.offset == document.length {
                self.documents.pop_front();
                self.offset = 0;
            }
        }
        let (source, seq_len) = (self.number as u32, seq_len as u32);
        Ok((!pieces.is_empty()).then_some(SampleIndex {
            source,
            seq_len,
            pieces,
        }))
    }
}
