//! What each rank holds whole and what only as its own slices.

use super::mesh::Mesh;

/// How a rank holds one kind of state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holding {
    /// All of it, in a buffer that lasts as long as the run.
    Whole,
    /// Its own slices; the whole exists only while a layer needs it.
    Slices,
}

/// The ZeRO modes as one description.
///
/// fp32 master weights and moments are always held as the slices of the shard group. Stage 0 is a
/// shard group of one rank, whose slice is everything; hybrid sharding is a shard group smaller
/// than the world. Stages 2 and 3 add what else is held as slices; in a shard group of one there is
/// nothing to split and they are stage 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The ranks.
    pub mesh: Mesh,
    /// Accumulated fp32 gradients.
    pub gradients: Holding,
    /// Weights in the compute dtype, the frozen ones included.
    pub weights: Holding,
}

impl Layout {
    /// The layout of `zero_stage` (0 to 3) over `world` ranks in shard groups of `shard` ranks,
    /// which divides `world`. Stage 0 shards nothing, whatever `shard` is.
    pub fn new(zero_stage: u8, world: usize, shard: usize) -> Self {
        let shard = if zero_stage == 0 { 1 } else { shard };
        let from = |stage: u8| {
            if zero_stage >= stage && shard > 1 {
                Holding::Slices
            } else {
                Holding::Whole
            }
        };
        Self {
            mesh: Mesh::data_parallel_groups(world, shard),
            gradients: from(2),
            weights: from(3),
        }
    }

    /// The layout of a single rank.
    pub fn solo() -> Self {
        Self::new(0, 1, 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shard_group_of_one_has_nothing_to_split() {
        assert_eq!(Layout::new(3, 4, 1), Layout::new(0, 4, 4));
        let sharded = Layout::new(3, 4, 2);
        assert_eq!((sharded.mesh.replicate, sharded.mesh.shard), (2, 2));
        assert_eq!(sharded.weights, Holding::Slices);
        assert_eq!(Layout::new(2, 4, 2).weights, Holding::Whole);
        assert_eq!(Layout::new(1, 4, 2).gradients, Holding::Whole);
    }
}
