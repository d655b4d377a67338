//! The ranks of a run, arranged along the axes of parallelism.

/// How many ranks lie along each axis. Unused axes are 1.
///
/// Ranks are numbered with `shard` as the fastest axis, so that a shard group occupies
/// neighbouring ranks: those that share a node when a node holds a multiple of the group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mesh {
    /// Copies of the sharded state (the replica groups run along this axis).
    pub replicate: usize,
    /// Ranks that together hold one copy of the sharded state.
    pub shard: usize,
    /// Context parallelism.
    pub cp: usize,
    /// Tensor parallelism.
    pub tp: usize,
    /// Pipeline parallelism.
    pub pp: usize,
    /// Expert parallelism.
    pub ep: usize,
}

impl Mesh {
    /// A mesh of `world` data-parallel ranks whose optimizer state is split over all of them.
    pub fn sharded_over_world(world: usize) -> Self {
        Self {
            replicate: 1,
            shard: world,
            cp: 1,
            tp: 1,
            pp: 1,
            ep: 1,
        }
    }

    /// Number of ranks.
    pub fn world(&self) -> usize {
        self.replicate * self.shard * self.cp * self.tp * self.pp * self.ep
    }

    /// Ranks that see different samples.
    pub fn data_parallel(&self) -> usize {
        self.replicate * self.shard
    }

    /// The ranks that hold the sharded state together with `rank`, in ascending order.
    pub fn shard_group(&self, rank: usize) -> Vec<usize> {
        let first = rank / self.shard * self.shard;
        (first..first + self.shard).collect()
    }

    /// Position of `rank` in its shard group.
    pub fn shard_index(&self, rank: usize) -> usize {
        rank % self.shard
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shard_groups_partition_the_world() {
        let mesh = Mesh {
            replicate: 3,
            shard: 4,
            cp: 1,
            tp: 1,
            pp: 1,
            ep: 1,
        };
        assert_eq!(mesh.world(), 12);
        for rank in 0..12 {
            let group = mesh.shard_group(rank);
            assert_eq!(group.len(), 4);
            assert_eq!(group[mesh.shard_index(rank)], rank);
        }
    }
}
