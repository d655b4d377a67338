//! Which rank owns which slice of each unit.
//!
//! A unit is exchanged in **pieces**: one, unless the unit is so large (a vocabulary matrix) that
//! its exchange as a whole would stand in the way of all others. Pieces let the update of one part
//! run while another is still being reduced or is already being gathered. Every piece is split into
//! equal slices, one for each member of the shard group.

use std::ops::Range;

use super::units::{BufferKind, Units};

/// Slices are multiples of this many elements, so that vectorised kernels and collectives never
/// meet a ragged edge inside a buffer.
pub const GRANULE: usize = 64;

/// Elements up to which a unit is exchanged as one piece: 32 MiB of fp32 gradients.
const PIECE: usize = 1 << 23;

/// In large groups pieces are larger, so that a slice stays worth a message.
const LEAST_SLICE: usize = 1 << 16;

/// A contiguous part of a unit's buffer that is reduced, updated and gathered by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Index of the unit.
    pub unit: usize,
    /// Which of its buffers.
    pub buffer: BufferKind,
    /// Position among the pieces of that buffer.
    pub position: usize,
    /// Elements of the unit's padded buffer.
    pub range: Range<usize>,
}

/// A slice of a piece and the shard-group member that owns it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shard {
    /// Index of the piece.
    pub piece: usize,
    /// Elements of the unit's padded buffer.
    pub range: Range<usize>,
    /// Position in the shard group.
    pub owner: usize,
}

/// The pieces of all units and their slices, as data: no other code computes a slice from a
/// formula.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardMap {
    pieces: Vec<Piece>,
    shards: Vec<Shard>,
    members: usize,
    /// Pieces of each unit: trainable, frozen.
    of_units: Vec<[Range<usize>; 2]>,
}

impl ShardMap {
    /// Splits every buffer of every unit into pieces and each piece into `members` equal slices,
    /// the last ones padded.
    pub fn new(units: &Units, members: usize) -> Self {
        Self::with_pieces_of(units, members, PIECE.max(members * LEAST_SLICE))
    }

    /// The same with pieces of at most about `most` elements.
    pub(crate) fn with_pieces_of(units: &Units, members: usize, most: usize) -> Self {
        let mut map = Self {
            pieces: Vec::new(),
            shards: Vec::new(),
            members,
            of_units: Vec::new(),
        };
        for (index, unit) in units.units.iter().enumerate() {
            let mut split = |buffer| map.split(index, buffer, unit.buffer_len(buffer), most);
            let ranges = [split(BufferKind::Trainable), split(BufferKind::Frozen)];
            map.of_units.push(ranges);
        }
        map
    }

    fn split(
        &mut self,
        unit: usize,
        buffer: BufferKind,
        length: usize,
        most: usize,
    ) -> Range<usize> {
        let first = self.pieces.len();
        let count = length.div_ceil(most);
        let slice = length
            .div_ceil((count * self.members).max(1))
            .next_multiple_of(GRANULE);
        for position in 0..count {
            let start = position * self.members * slice;
            for owner in 0..self.members {
                self.shards.push(Shard {
                    piece: first + position,
                    range: start + owner * slice..start + (owner + 1) * slice,
                    owner,
                });
            }
            self.pieces.push(Piece {
                unit,
                buffer,
                position,
                range: start..start + self.members * slice,
            });
        }
        first..self.pieces.len()
    }

    /// Ranks of a shard group.
    pub fn members(&self) -> usize {
        self.members
    }

    /// All pieces, by unit.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// All slices, by piece and owner.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// The pieces of one buffer of `unit`, in order: indices into [`ShardMap::pieces`].
    pub fn pieces_of(&self, unit: usize, buffer: BufferKind) -> Range<usize> {
        self.of_units[unit][buffer as usize].clone()
    }

    /// The slice of `piece` that `owner` holds.
    pub fn slice(&self, piece: usize, owner: usize) -> Range<usize> {
        self.shards[piece * self.members + owner].range.clone()
    }

    /// Elements of a padded buffer of `unit`; 0 when the unit has no such tensors.
    pub fn padded_len(&self, unit: usize, buffer: BufferKind) -> usize {
        let pieces = &self.pieces[self.pieces_of(unit, buffer)];
        pieces.last().map_or(0, |piece| piece.range.end)
    }

    /// Elements of that buffer that each member owns.
    pub fn owned_len(&self, unit: usize, buffer: BufferKind) -> usize {
        self.padded_len(unit, buffer) / self.members
    }

    /// A piece as people call it: `block.3`, or `head 2/4` for one of several.
    pub fn name(&self, units: &Units, piece: usize) -> String {
        let Piece {
            unit,
            buffer,
            position,
            ..
        } = self.pieces[piece];
        let frozen = match buffer {
            BufferKind::Frozen => " (frozen)",
            BufferKind::Trainable => "",
        };
        let name = format!("{}{frozen}", units.units[unit].name);
        match self.pieces_of(unit, buffer).len() {
            1 => name,
            count => format!("{name} {}/{count}", position + 1),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use proptest::prelude::*;

    use super::super::units::{Init, Layer, Matrix, TensorSpec, Unit};
    use super::*;

    fn units_of(tensors: &[(usize, bool)]) -> Units {
        let unit = |(index, &(len, trainable)): (usize, &(usize, bool))| Unit {
            name: format!("unit.{index}"),
            matrices: vec![Matrix {
                tensors: vec![TensorSpec {
                    name: format!("t{index}"),
                    shape: vec![len],
                    init: Init::Ones,
                    decay: false,
                    trainable,
                }],
            }],
        };
        Units {
            units: tensors.iter().enumerate().map(unit).collect(),
            layers: (0..tensors.len())
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
            tensors in prop::collection::vec((1usize..5000, any::<bool>()), 1..8),
            members in 1usize..67,
            most in 200usize..6000,
        ) {
            let units = units_of(&tensors);
            let map = ShardMap::with_pieces_of(&units, members, most);
            for (index, unit) in units.units.iter().enumerate() {
                for buffer in [BufferKind::Trainable, BufferKind::Frozen] {
                    let mut next = 0;
                    for piece in map.pieces_of(index, buffer) {
                        prop_assert_eq!(map.pieces()[piece].range.start, next);
                        for owner in 0..members {
                            let range = map.slice(piece, owner);
                            prop_assert_eq!(range.start, next);
                            prop_assert_eq!(range.len() % GRANULE, 0);
                            prop_assert!(!range.is_empty());
                            prop_assert_eq!(range.len(), map.slice(piece, 0).len());
                            next = range.end;
                        }
                        prop_assert_eq!(map.pieces()[piece].range.end, next);
                    }
                    prop_assert_eq!(next, map.padded_len(index, buffer));
                    let length = unit.buffer_len(buffer);
                    prop_assert!(next >= length);
                    // Padding stays below one granule per slice.
                    let slices = map.pieces_of(index, buffer).len() * members;
                    prop_assert!(next < length + slices * GRANULE + 1);
                    prop_assert_eq!(map.owned_len(index, buffer) * members, next);
                }
            }
        }
    }

    #[test]
    fn a_large_model_is_split_over_4096_ranks_in_less_than_a_second() {
        // The sizes of a 70B model: two vocabulary matrices and 80 blocks.
        let mut tensors = vec![(128_256 * 8192, true); 2];
        tensors.extend(vec![(855_654_400, true); 80]);
        let units = units_of(&tensors);
        let began = Instant::now();
        for members in [1, 7, 8, 1000, 4096] {
            let map = ShardMap::new(&units, members);
            for piece in 0..map.pieces().len() {
                assert!(
                    map.slice(piece, 0).len() >= LEAST_SLICE / 2,
                    "{members} members"
                );
            }
        }
        assert!(began.elapsed().as_secs_f64() < 1.0, "{:?}", began.elapsed());
    }
}
