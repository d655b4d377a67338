//! Who trains on which sample of a global batch.

use crate::sample::{BatchIndex, SampleIndex};

/// The samples of one global batch as slots: `[rank][accumulation step][slot of the micro-batch]`.
/// All ranks have the same number of accumulation steps; a slot may be empty and is then run fully
/// masked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assignment {
    slots: Vec<Vec<Vec<Option<usize>>>>,
}

impl Assignment {
    /// `[accumulation step][slot]` of one rank: indices into the batch's samples. Empty for a rank
    /// outside the world.
    pub fn rank(&self, rank: usize) -> &[Vec<Option<usize>>] {
        self.slots.get(rank).map(Vec::as_slice).unwrap_or_default()
    }

    /// Number of ranks.
    pub fn ranks(&self) -> usize {
        self.slots.len()
    }

    /// Micro-batches per rank and step.
    pub fn accumulation(&self) -> usize {
        self.slots.first().map_or(0, Vec::len)
    }
}

/// Distributes a batch over `ranks` ranks with micro-batches of `micro_batch` samples (each at
/// least 1; zero counts as 1), so that all ranks carry about the same attention cost.
///
/// A pure function of the arguments: samples go, the costliest first, to the rank with the least
/// cost that has a free slot (Graham's longest processing time first). A rank then runs its samples
/// in the order of the batch, and empty slots come last.
pub fn assign(batch: &BatchIndex, ranks: usize, micro_batch: usize) -> Assignment {
    let costs: Vec<u128> = batch
        .samples
        .iter()
        .map(SampleIndex::attention_cost)
        .collect();
    let (ranks, micro_batch) = (ranks.max(1), micro_batch.max(1));
    let accumulation = costs.len().div_ceil(ranks * micro_batch);
    let capacity = accumulation * micro_batch;

    let mut costliest_first: Vec<usize> = (0..costs.len()).collect();
    costliest_first.sort_by_key(|&sample| (std::cmp::Reverse(costs[sample]), sample));
    let mut loads: Vec<(u128, Vec<usize>)> = vec![(0, Vec::new()); ranks];
    for sample in costliest_first {
        // Among equal loads the rank with fewer samples comes first: then a batch of equal samples
        // spreads evenly.
        let lightest = loads
            .iter_mut()
            .filter(|(_, samples)| samples.len() < capacity)
            .min_by_key(|(load, samples)| (*load, samples.len()));
        if let Some((load, samples)) = lightest {
            *load += costs[sample];
            samples.push(sample);
        }
    }
    let slots = loads
        .into_iter()
        .map(|(_, mut samples)| {
            samples.sort_unstable();
            let mut slots = samples.into_iter().map(Some).chain(std::iter::repeat(None));
            (0..accumulation)
                .map(|_| slots.by_ref().take(micro_batch).collect())
                .collect()
        })
        .collect();
    Assignment { slots }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::sample::Piece;
    use proptest::prelude::*;

    /// A batch of full samples of 64 tokens, cut into documents as `cuts` says.
    fn batch(cuts: &[Vec<u32>]) -> BatchIndex {
        let sample = |cuts: &Vec<u32>| {
            let mut left = 64;
            let mut pieces = Vec::new();
            for (row, &cut) in cuts.iter().enumerate() {
                let length = cut.min(left);
                let piece = Piece {
                    shard: 0,
                    row_group: 0,
                    row: row as u32,
                    start: 0,
                    length,
                    document_tokens: 64,
                };
                pieces.extend((length > 0).then_some(piece));
                left -= length;
            }
            SampleIndex {
                source: 0,
                seq_len: 64,
                pieces,
            }
        };
        BatchIndex {
            samples: cuts.iter().map(sample).collect(),
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        #[test]
        fn every_sample_once_and_balanced(
            cuts in prop::collection::vec(prop::collection::vec(1u32..64, 1..6), 1..40),
            ranks in 1usize..7,
            micro_batch in 1usize..5,
        ) {
            let batch = batch(&cuts);
            let assignment = assign(&batch, ranks, micro_batch);
            prop_assert_eq!(assignment.ranks(), ranks);
            let mut seen = vec![0; cuts.len()];
            let mut loads = Vec::new();
            for rank in 0..ranks {
                let steps = assignment.rank(rank);
                prop_assert_eq!(steps.len(), assignment.accumulation());
                prop_assert!(steps.iter().all(|step| step.len() == micro_batch));
                let mine: Vec<usize> = steps.iter().flatten().flatten().copied().collect();
                prop_assert!(mine.is_sorted());
                mine.iter().for_each(|&sample| seen[sample] += 1);
                loads.push(mine.iter().map(|&s| batch.samples[s].attention_cost()).sum::<u128>());
            }
            prop_assert!(seen.iter().all(|&n| n == 1));
            let costliest = batch.samples.iter().map(SampleIndex::attention_cost).max().unwrap();
            let spread = loads.iter().max().unwrap() - loads.iter().min().unwrap();
            prop_assert!(spread <= costliest, "loads {loads:?}, costliest sample {costliest}");
        }
    }

    #[test]
    fn equal_samples_spread_evenly() {
        let assignment = assign(&batch(&vec![vec![64]; 6]), 4, 1);
        let counts: Vec<usize> = (0..4)
            .map(|r| assignment.rank(r).iter().flatten().flatten().count())
            .collect();
        assert_eq!(counts, [2, 2, 1, 1]);
        assert_eq!(assign(&batch(&[]), 2, 2).accumulation(), 0);
    }
}
