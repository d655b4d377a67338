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
    /// A mesh of `world` data-parallel ranks in shard groups of `shard`, which divides `world`.
    pub fn data_parallel_groups(world: usize, shard: usize) -> Self {
        Self {
            replicate: world / shard,
            shard,
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

    /// The ranks that together with `rank` hold one copy of the sharded state, in ascending order.
    pub fn shard_group(&self, rank: usize) -> Vec<usize> {
        let first = rank / self.shard * self.shard;
        (first..first + self.shard).collect()
    }

    /// Position of `rank` in its shard group.
    pub fn shard_index(&self, rank: usize) -> usize {
        rank % self.shard
    }

    /// The ranks that hold the same slices as `rank`, one in every shard group, in ascending order.
    pub fn replica_group(&self, rank: usize) -> Vec<usize> {
        (0..self.replicate)
            .map(|replica| replica * self.shard + self.shard_index(rank))
            .collect()
    }

    /// Which copy of the sharded state `rank` holds a part of: its position in its replica group.
    pub fn replica_index(&self, rank: usize) -> usize {
        rank / self.shard % self.replicate
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rank_is_where_its_shard_group_and_its_replica_group_cross() {
        let mesh = Mesh::data_parallel_groups(12, 4);
        assert_eq!((mesh.world(), mesh.replicate), (12, 3));
        for rank in 0..12 {
            let (shard, replica) = (mesh.shard_group(rank), mesh.replica_group(rank));
            assert_eq!((shard.len(), replica.len()), (4, 3));
            assert_eq!(shard[mesh.shard_index(rank)], rank);
            assert_eq!(replica[mesh.replica_index(rank)], rank);
            let common = shard.iter().filter(|member| replica.contains(member));
            assert_eq!(common.count(), 1);
        }
    }
}
