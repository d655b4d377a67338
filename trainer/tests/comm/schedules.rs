//! Random schedules on the lanes of a mesh: whatever the interleaving, they end, with the right bits.
//!
//! A seed gives a list of operations on three kinds of lanes (shard groups, replica groups, the
//! world), the same on all ranks. Every rank then goes its own random way through it: it queues the
//! lanes' operations in another interleaving, lets operations come after earlier ones at will, pauses,
//! waits for tickets in another order, and drops some.
//!
//! Two rules keep this from being a deadlock of the caller's making; both speak of the position in
//! the list. An operation comes only after ones that stand before it, and a rank waits for a ticket
//! only when it has queued everything that stands before that ticket's operation. Then the first
//! operation of the list that is not done can always go on: all of its ranks have queued it or will,
//! and nothing that it waits for is left. So a schedule that does not end is a fault of the lanes.

use std::ops::Range;
use std::time::Duration;

use oxitron_trainer::comm::{Comm, Lane, Wire};

use super::values::{Random, mix};
use super::walk::Walk;
use super::watch::watch;

/// Operations of a list.
const OPERATIONS: usize = 30;

/// The limit for one seed, which takes a small part of a second.
const LIMIT: Duration = Duration::from_secs(30);

/// The kinds of lanes, by their place in a rank's array.
pub const SHARD: usize = 0;
pub const REPLICA: usize = 1;
pub const WORLD: usize = 2;

/// What an operation does.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    ReduceScatter(Wire),
    Into(Wire, bool),
    AllReduce,
    /// Of the slice that the operation before, a reduce-scatter of the shard group, sums.
    AllReduceOfSlice(Wire),
    AllGather,
    AllToAll,
    /// The root, to be taken modulo the lane's size; so are the two ends below.
    Broadcast(usize),
    Message(usize, usize),
}

/// One operation of all groups of a kind of lane.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    pub lane: usize,
    pub kind: Kind,
    /// Elements of a slice, or of the whole for what has no slices.
    pub length: usize,
    pub seed: u64,
}

/// The list of a seed.
fn list(seed: u64) -> Vec<Step> {
    let mut random = Random::new(seed);
    let mut steps = Vec::new();
    while steps.len() < OPERATIONS {
        let lane = random.below(3);
        let length = match random.below(16) {
            0 => 0,
            1 | 2 => 1,
            // Several chunks of 1 MiB.
            3 => 262_144 * (1 + random.below(3)) + random.below(3),
            _ => 3 + 2 * random.below(4000),
        };
        let wire = if random.once_in(2) {
            Wire::F32
        } else {
            Wire::Bf16
        };
        let kind = match random.below(9) {
            0..=2 => Kind::ReduceScatter(wire),
            3 => Kind::Into(wire, random.once_in(2)),
            4 => Kind::AllReduce,
            5 => Kind::AllGather,
            6 => Kind::AllToAll,
            7 => Kind::Broadcast(random.below(64)),
            _ => Kind::Message(random.below(64), random.below(64)),
        };
        let seed = mix(seed ^ mix(steps.len() as u64 + 1));
        let step = Step {
            lane,
            kind,
            length,
            seed,
        };
        steps.push(step);
        if lane == SHARD && matches!(kind, Kind::ReduceScatter(_)) && random.once_in(2) {
            let (lane, kind) = (REPLICA, Kind::AllReduceOfSlice(wire));
            steps.push(Step { lane, kind, ..step });
        }
    }
    steps
}

/// A rank's lanes and its place on the mesh.
pub struct Mesh {
    pub lanes: [Lane; 3],
    /// Ranks of a shard group, which are neighbours.
    pub shard: usize,
}

impl Mesh {
    fn new(comm: &Comm, shard: usize) -> Self {
        let (world, rank) = (comm.world(), comm.rank());
        let everybody: Vec<usize> = (0..world).collect();
        let pick = |same: fn(usize, usize, usize) -> bool| -> Vec<usize> {
            let picked = everybody.iter().copied();
            picked.filter(|&other| same(other, rank, shard)).collect()
        };
        let lanes = [
            comm.lane(&pick(|a, b, shard| a / shard == b / shard))
                .unwrap(),
            comm.lane(&pick(|a, b, shard| a % shard == b % shard))
                .unwrap(),
            comm.lane(&everybody).unwrap(),
        ];
        Self { lanes, shard }
    }
}

/// The seed of the inputs of `step` in the group whose first rank is `first`.
pub fn group_seed(step: &Step, first: usize) -> u64 {
    mix(step.seed ^ ((first as u64) << 32))
}

/// Runs the lists of `seeds` on one rank, on shard groups of `shard` ranks. All ranks of a world call
/// it together.
pub fn run(comm: &Comm, shard: usize, seeds: Range<u64>) {
    let mesh = Mesh::new(comm, shard);
    for seed in seeds {
        let what = format!("seed {seed} on rank {} of {}", comm.rank(), comm.world());
        let _watched = watch(LIMIT, format!("{what}, shard groups of {shard}"));
        let steps = list(seed);
        let way = Random::new(mix(seed) ^ comm.rank() as u64);
        Walk::new(&mesh, &steps, way, what).run();
    }
}
