//! Optimizer state that lies in host memory, and how it passes through the device.
//!
//! A piece's slice passes in portions, through two buffers as large as the largest portion.

use std::ops::Range;

use super::shards::{GRANULE, ShardMap};
use super::units::BufferKind;

/// Elements of a portion at most: 48 MiB of master weights and fp32 moments, which take longer to
/// copy than a copy takes to begin.
const MOST: usize = 1 << 22;

/// Buffers that portions take turns in.
const BUFFERS: usize = 2;

const FP32: usize = 4;

/// Cuts `range` into equal portions of at most `most` elements, a multiple of [`GRANULE`]; only the
/// last may be shorter.
pub fn portions(range: Range<usize>, most: usize) -> impl Iterator<Item = Range<usize>> {
    let count = range.len().div_ceil(most.max(1)).max(1);
    let size = range.len().div_ceil(count).next_multiple_of(GRANULE);
    let starts = range.clone().step_by(size.max(1));
    starts.map(move |start| start..(start + size).min(range.end))
}

/// Elements of the largest portion of any piece that the optimizer updates.
pub fn portion_len(map: &ShardMap) -> usize {
    let trainable = map.pieces().iter().enumerate();
    let trainable = trainable.filter(|(_, piece)| piece.buffer == BufferKind::Trainable);
    let slices = trainable.map(|(index, _)| map.slice(index, 0).len());
    slices.max().unwrap_or(0).min(MOST)
}

/// Bytes on the device through which master weights, and moments of `moment` bytes each, pass.
pub fn passing_bytes(map: &ShardMap, moment: usize) -> usize {
    BUFFERS * portion_len(map) * (FP32 + 2 * moment)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn portions_follow_each_other_and_fit_a_buffer(
            start in 0usize..10_000,
            granules in 0usize..3_000,
            most in 1usize..200,
        ) {
            let most = most * GRANULE;
            let range = start..start + granules * GRANULE;
            let cut: Vec<Range<usize>> = portions(range.clone(), most).collect();
            prop_assert_eq!(cut.len(), range.len().div_ceil(most));
            let mut next = range.start;
            for (index, portion) in cut.iter().enumerate() {
                prop_assert_eq!(portion.start, next);
                prop_assert!(!portion.is_empty() && portion.len() <= most);
                prop_assert_eq!(portion.len() % GRANULE, 0);
                // Equal, so that a copy and the kernels beside it take as long each time.
                prop_assert!(index + 1 == cut.len() || portion.len() == cut[0].len());
                next = portion.end;
            }
            prop_assert_eq!(next, range.end);
        }
    }
}
