//! Where documents begin in a batch of packed samples.

use std::ops::Range;

use crate::Error;

const OP: &str = "document starts";

/// The documents of `[batch, seq]` packed tokens. Attention never crosses from one to another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DocumentStarts {
    batch: usize,
    seq: usize,
    /// (sample, tokens of the sample), in order.
    documents: Vec<(usize, Range<usize>)>,
}

impl DocumentStarts {
    /// One list of starts per sample: offsets in `0..seq`, rising, the first one 0.
    ///
    /// # Errors
    /// [`Error::Argument`] naming the sample and the offset.
    pub fn new<S: AsRef<[u32]>>(seq: usize, samples: &[S]) -> Result<Self, Error> {
        let mut documents = Vec::new();
        for (sample, starts) in samples.iter().enumerate() {
            let starts = starts.as_ref();
            let wrong = |message: String| Error::Argument {
                op: OP,
                message: format!("sample {sample}: {message}"),
            };
            if starts.first() != Some(&0) {
                return Err(wrong(format!(
                    "the first document must start at 0, found {:?}",
                    starts.first()
                )));
            }
            for (i, &start) in starts.iter().enumerate() {
                let start = start as usize;
                let end = starts.get(i + 1).map_or(seq, |&next| next as usize);
                if start >= end || end > seq {
                    return Err(wrong(format!(
                        "document {i} would cover tokens {start}..{end} of {seq}; starts must \
                         rise and stay below the sequence length"
                    )));
                }
                documents.push((sample, start..end));
            }
        }
        Ok(DocumentStarts {
            batch: samples.len(),
            seq,
            documents,
        })
    }

    /// Every sample is one document.
    pub fn whole(batch: usize, seq: usize) -> Self {
        let documents = (0..batch)
            .filter(|_| seq > 0)
            .map(|sample| (sample, 0..seq))
            .collect();
        DocumentStarts {
            batch,
            seq,
            documents,
        }
    }

    /// Samples.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Tokens per sample.
    pub fn seq(&self) -> usize {
        self.seq
    }

    /// (sample, tokens of the sample) of every document, in order.
    pub fn documents(&self) -> &[(usize, Range<usize>)] {
        &self.documents
    }

    /// Whether every sample is one document.
    pub fn is_whole(&self) -> bool {
        self.documents.len() == self.batch
    }

    /// Tokens of the longest document.
    pub fn longest(&self) -> usize {
        let lengths = self.documents.iter().map(|(_, tokens)| tokens.len());
        lengths.max().unwrap_or(0)
    }

    /// `[documents + 1]`: where each document begins in the whole batch, and where the last one ends.
    pub fn cumulative(&self) -> Vec<i32> {
        let starts = self.documents.iter();
        let starts = starts.map(|(sample, tokens)| sample * self.seq + tokens.start);
        let ends = [self.batch * self.seq];
        starts.chain(ends).map(|at| at as i32).collect()
    }

    /// `[batch · seq]` positions that count from 0 in each document.
    pub fn positions(&self) -> Vec<i64> {
        self.documents
            .iter()
            .flat_map(|(_, tokens)| 0..tokens.len() as i64)
            .collect()
    }

    /// Pairs (query, key) that causal attention visits: `Σ len · (len + 1) / 2`.
    pub fn attention_pairs(&self) -> u64 {
        self.documents
            .iter()
            .map(|(_, t)| (t.len() as u64) * (t.len() as u64 + 1) / 2)
            .sum()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn ranges_positions_and_pairs() {
        let packed = DocumentStarts::new(5, &[vec![0, 2, 3], vec![0]]).unwrap();
        assert_eq!(
            packed.documents(),
            [(0, 0..2), (0, 2..3), (0, 3..5), (1, 0..5)]
        );
        assert_eq!(packed.positions(), [0, 1, 0, 0, 1, 0, 1, 2, 3, 4]);
        assert_eq!(packed.attention_pairs(), 3 + 1 + 3 + 15);
        assert!(!packed.is_whole());
        assert_eq!(
            (packed.longest(), packed.cumulative()),
            (5, vec![0, 2, 3, 5, 10])
        );
        assert_eq!(
            DocumentStarts::whole(1, 5),
            DocumentStarts::new(5, &[[0]]).unwrap()
        );
    }

    #[test]
    fn bad_starts_are_named() {
        let text = |starts: &[u32]| DocumentStarts::new(4, &[starts]).unwrap_err().to_string();
        assert!(text(&[]).contains("sample 0: the first document must start at 0"));
        assert!(text(&[1]).contains("Some(1)"));
        assert!(text(&[0, 2, 2]).contains("document 1 would cover tokens 2..2 of 4"));
        assert!(text(&[0, 3, 2]).contains("3..2"));
        assert!(text(&[0, 4]).contains("document 1 would cover tokens 4..4"));
        assert!(text(&[0, 9]).contains("0..9"));
    }
}
