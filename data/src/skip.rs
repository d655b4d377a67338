//! Samples that a run leaves out.

use std::ops::Range;

/// Ranges of sample indices to leave out: sorted, merged, half-open.
///
/// A sample's index is its place in the one stream of a run, counted from 0 over all stages, those
/// that were left out included. So an index means the same before and after others are left out,
/// on any number of ranks, however often the run was resumed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SkipRanges {
    /// Neither empty nor touching each other, in order.
    ranges: Vec<Range<u64>>,
}

impl SkipRanges {
    /// The union of `ranges`, which may come in any order, overlap and be empty.
    pub fn new(ranges: impl IntoIterator<Item = Range<u64>>) -> Self {
        let mut sorted: Vec<Range<u64>> = ranges.into_iter().filter(|r| !r.is_empty()).collect();
        sorted.sort_by_key(|range| range.start);
        let mut ranges: Vec<Range<u64>> = Vec::with_capacity(sorted.len());
        for range in sorted {
            match ranges.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => ranges.push(range),
            }
        }
        Self { ranges }
    }

    /// Leaves out one more range.
    pub fn insert(&mut self, range: Range<u64>) {
        let ranges = std::mem::take(&mut self.ranges);
        *self = Self::new(ranges.into_iter().chain([range]));
    }

    /// The ranges in order; no two touch.
    pub fn ranges(&self) -> &[Range<u64>] {
        &self.ranges
    }

    /// Whether nothing is left out.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Whether a sample is left out.
    pub fn contains(&self, index: u64) -> bool {
        let after = self.ranges.partition_point(|range| range.start <= index);
        after > 0 && index < self.ranges[after - 1].end
    }

    /// How many samples of `window` are left out.
    pub fn count_within(&self, window: Range<u64>) -> u64 {
        let inside = |range: &Range<u64>| {
            let end = range.end.min(window.end);
            end.saturating_sub(range.start.max(window.start))
        };
        self.ranges.iter().map(inside).sum()
    }

    /// How many samples must be drawn, the first of them `index`, until `wanted` of them are not
    /// left out.
    pub(crate) fn draws_for(&self, index: u64, wanted: u64) -> u64 {
        let mut end = index.saturating_add(wanted);
        for range in &self.ranges {
            if range.end > index && range.start < end {
                end = end.saturating_add(range.end - range.start.max(index));
            }
        }
        end - index
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn ranges_are_the_union_of_what_was_given(
            given in prop::collection::vec((0u64..60, 0u64..60), 0..8),
            (index, wanted) in (0u64..70, 0u64..30),
        ) {
            let given: Vec<Range<u64>> = given.iter().map(|&(a, b)| a..b).collect();
            let skip = SkipRanges::new(given.clone());
            for sample in 0..70 {
                let inside = given.iter().any(|range| range.contains(&sample));
                prop_assert_eq!(skip.contains(sample), inside);
            }
            let apart = |pair: &[Range<u64>]| pair[0].end < pair[1].start;
            prop_assert!(skip.ranges().windows(2).all(apart));
            prop_assert!(skip.ranges().iter().all(|range| !range.is_empty()));
            let mut one_by_one = SkipRanges::default();
            given.into_iter().for_each(|range| one_by_one.insert(range));
            prop_assert_eq!(&one_by_one, &skip);

            let left_out = |window: Range<u64>| window.filter(|&i| skip.contains(i)).count() as u64;
            prop_assert_eq!(skip.count_within(index..70), left_out(index..70));
            let kept = (index..).filter(|&i| !skip.contains(i)).take(wanted as usize);
            let draws = kept.last().map_or(0, |last| last + 1 - index);
            // A range that touches the last sample may be drawn through, too.
            let most = draws + left_out(index + draws..index + draws + 60);
            let found = skip.draws_for(index, wanted);
            prop_assert!((draws..=most).contains(&found), "{found} of {draws}..={most}");
            prop_assert_eq!(found - skip.count_within(index..index + found), wanted);
        }
    }

    #[test]
    fn the_greatest_indices_do_not_overflow() {
        let skip = SkipRanges::new([5..u64::MAX, 0..3]);
        assert_eq!(skip.draws_for(0, 4), u64::MAX);
        assert_eq!(skip.draws_for(u64::MAX, 4), 0);
        assert_eq!(skip.count_within(0..u64::MAX), u64::MAX - 2);
        assert!(skip.contains(u64::MAX - 1) && !skip.contains(u64::MAX));
    }
}
