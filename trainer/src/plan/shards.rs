//! Which rank owns which slice of each unit.

use std::ops::Range;

use super::units::{BufferKind, Units};

/// Slices are multiples of this many elements, so that vectorised kernels and collectives never
/// meet a ragged edge inside a buffer.
pub const GRANULE: usize = 64;

/// A slice of a unit's trainable buffer and the shard-group member that owns its fp32 master
/// weights and moments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shard {
    /// Index of the unit.
    pub unit: usize,
    /// Elements of the unit's padded trainable buffer.
    pub range: Range<usize>,
    /// Position in the shard group.
    pub owner: usize,
}

/// The slices of all units, as data: no other code computes a slice from a formula.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardMap {
    shards: Vec<Shard>,
    members: usize,
}

impl ShardMap {
    /// Splits every unit into `members` equal slices, the last ones padded.
    pub fn equal_slices(units: &Units, members: usize) -> Self {
        let mut shards = Vec::with_capacity(units.units.len() * members);
        for (index, unit) in units.units.iter().enumerate() {
            let slice = unit
                .buffer_len(BufferKind::Trainable)
                .div_ceil(members)
                .next_multiple_of(GRANULE);
            for owner in 0..members {
                shards.push(Shard {
                    unit: index,
                    range: owner * slice..(owner + 1) * slice,
                    owner,
                });
            }
        }
        Self { shards, members }
    }

    /// All slices, by unit and owner.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// The slice of `unit` that `owner` holds.
    pub fn slice(&self, unit: usize, owner: usize) -> Range<usize> {
        self.shards[unit * self.members + owner].range.clone()
    }

    /// Elements of the padded trainable buffer of `unit`.
    pub fn padded_len(&self, unit: usize) -> usize {
        self.slice(unit, self.members - 1).end
    }

    /// Elements that `owner` holds over all units: times 12 bytes, its master weights and moments.
    pub fn owned_len(&self, owner: usize) -> usize {
        self.shards
            .iter()
            .filter(|shard| shard.owner == owner)
            .map(|shard| shard.range.len())
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::units::{Init, Layer, Matrix, TensorSpec, Unit};
    use super::*;

    fn units_of(lengths: &[usize]) -> Units {
        let unit = |(index, &len): (usize, &usize)| Unit {
            name: format!("unit.{index}"),
            matrices: vec![Matrix {
                tensors: vec![TensorSpec {
                    name: format!("t{index}"),
                    shape: vec![len],
                    init: Init::Ones,
                    decay: false,
                    trainable: true,
                }],
            }],
        };
        Units {
            units: lengths.iter().enumerate().map(unit).collect(),
            layers: (0..lengths.len())
                .map(|index| Layer {
                    name: String::new(),
                    units: vec![index],
                })
                .collect(),
        }
    }

    proptest! {
        #[test]
        fn every_element_is_owned_once_by_equal_aligned_slices(
            lengths in prop::collection::vec(1usize..5000, 1..8),
            members in 1usize..67,
        ) {
            let units = units_of(&lengths);
            let map = ShardMap::equal_slices(&units, members);
            for (index, unit) in units.units.iter().enumerate() {
                let mut next = 0;
                for owner in 0..members {
                    let range = map.slice(index, owner);
                    prop_assert_eq!(range.start, next);
                    prop_assert_eq!(range.len() % GRANULE, 0);
                    prop_assert_eq!(range.len(), map.slice(index, 0).len());
                    next = range.end;
                }
                prop_assert_eq!(next, map.padded_len(index));
                prop_assert!(next >= unit.buffer_len(BufferKind::Trainable));
            }
            for owner in 0..members {
                prop_assert_eq!(map.owned_len(owner), map.owned_len(0));
            }
        }
    }
}
