//! What each rank copies aside for a save.

use std::ops::Range;

use super::layout::{Holding, Layout};
use super::shards::ShardMap;
use super::units::{BufferKind, Units};

const FP32: usize = 4;

/// fp32 master weights and AdamW's two moments.
const STATES: usize = 3;

/// An equal share of `length` elements for member `index` of `members`: the last ones may be shorter
/// or empty.
pub fn share(length: usize, index: usize, members: usize) -> Range<usize> {
    let size = length.div_ceil(members);
    (index * size).min(length)..((index + 1) * size).min(length)
}

/// The most bytes that a rank of `layout` stages for a save: ranks that hold the same state divide
/// it, and everything is staged as fp32.
pub fn staging_bytes(units: &Units, map: &ShardMap, layout: &Layout) -> usize {
    let mesh = &layout.mesh;
    let first = |length: usize, members: usize| share(length, 0, members).len();
    let of_unit = |unit| {
        let owned = map.owned_len(unit, BufferKind::Trainable);
        let frozen = match layout.weights {
            Holding::Whole => first(map.padded_len(unit, BufferKind::Frozen), mesh.world()),
            Holding::Slices => first(map.owned_len(unit, BufferKind::Frozen), mesh.replicate),
        };
        STATES * first(owned, mesh.replicate) + frozen
    };
    FP32 * (0..units.units.len()).map(of_unit).sum::<usize>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_cover_everything_once() {
        for (length, members) in [(0, 3), (1, 3), (7, 3), (9, 3), (10, 1)] {
            let mut end = 0;
            for index in 0..members {
                let share = share(length, index, members);
                assert_eq!(share.start, end);
                end = share.end;
            }
            assert_eq!(end, length);
        }
    }
}
