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

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use oxitron_trainer::comm::{Comm, Lane, Ticket, Wire};
use tch::Tensor;

use crate::values::{Random, assert_bits, element, expected_sum, floats, input, mix, on_the_wire};
use crate::watch;

/// Operations of a list.
const OPERATIONS: usize = 30;

/// The limit for one seed, which takes a small part of a second.
const LIMIT: Duration = Duration::from_secs(30);

/// The kinds of lanes, by their place in a rank's array.
const SHARD: usize = 0;
const REPLICA: usize = 1;
const WORLD: usize = 2;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
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
struct Step {
    lane: usize,
    kind: Kind,
    /// Elements of a slice, or of the whole for what has no slices.
    length: usize,
    seed: u64,
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
struct Mesh {
    lanes: [Lane; 3],
    /// Ranks of a shard group, which are neighbours.
    shard: usize,
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
fn group_seed(step: &Step, first: usize) -> u64 {
    mix(step.seed ^ ((first as u64) << 32))
}

/// Queued and not waited for.
struct Pending {
    ticket: Ticket,
    /// The tensor apart that the sum goes to.
    into: Option<Tensor>,
    /// Whether another operation works on the same memory, so that only that one can be checked.
    chained: bool,
}

/// A rank's way through the list of one seed.
struct Walk<'a> {
    mesh: &'a Mesh,
    steps: &'a [Step],
    random: Random,
    queued: Vec<bool>,
    pending: BTreeMap<usize, Pending>,
    /// Handles made in advance: what they come after, by the kind of lane.
    handles: [Vec<(usize, Lane)>; 3],
    /// The memory of a reduce-scatter, for the operation that goes on with it.
    slices: BTreeMap<usize, Tensor>,
    what: String,
}

/// Runs the lists of `seeds` on one rank, on shard groups of `shard` ranks. All ranks of a world call
/// it together.
pub fn run(comm: &Comm, shard: usize, seeds: Range<u64>) {
    let mesh = Mesh::new(comm, shard);
    for seed in seeds {
        let what = format!("seed {seed} on rank {} of {}", comm.rank(), comm.world());
        let _watched = watch(LIMIT, format!("{what}, shard groups of {shard}"));
        let steps = list(seed);
        let walk = Walk {
            mesh: &mesh,
            steps: &steps,
            random: Random::new(mix(seed) ^ comm.rank() as u64),
            queued: vec![false; steps.len()],
            pending: BTreeMap::new(),
            handles: Default::default(),
            slices: BTreeMap::new(),
            what,
        };
        walk.run();
    }
}

impl Walk<'_> {
    fn run(mut self) {
        loop {
            let lowest = self.queued.iter().position(|queued| !queued);
            let may_wait: Vec<_> = match lowest {
                Some(lowest) => self.pending.range(..lowest).map(|(&k, _)| k).collect(),
                None => self.pending.keys().copied().collect(),
            };
            if lowest.is_none() && may_wait.is_empty() {
                return;
            }
            if self.random.once_in(12) {
                let pause = self.random.below(1500);
                std::thread::sleep(Duration::from_micros(pause as u64));
            }
            match lowest {
                Some(lowest) if may_wait.is_empty() || !self.random.once_in(3) => {
                    let next = self.choose(lowest);
                    self.queue(next);
                }
                _ => {
                    let which = self.random.below(may_wait.len());
                    self.wait(may_wait[which]);
                }
            }
        }
    }

    /// The next operation of some lane. That of the lane of `lowest` can be queued at any rate.
    fn choose(&mut self, lowest: usize) -> usize {
        let lane = self.random.below(3);
        let next = (0..self.steps.len()).find(|&k| self.steps[k].lane == lane && !self.queued[k]);
        match next {
            // Its slice must be known.
            Some(k) if !self.goes_on(k) || self.queued[k - 1] => k,
            _ => lowest,
        }
    }

    /// Whether operation `k` goes on with the slice of the one before.
    fn goes_on(&self, k: usize) -> bool {
        let step = self.steps.get(k);
        step.is_some_and(|step| matches!(step.kind, Kind::AllReduceOfSlice(_)))
    }

    /// The lane of operation `k`, as a handle that comes after what must, and what may, be before.
    fn handle(&mut self, k: usize) -> Lane {
        let lane = self.steps[k].lane;
        let made: Vec<_> = self.handles[lane].iter().filter(|(j, _)| *j < k).collect();
        let mut handle = if made.is_empty() || self.random.once_in(2) {
            self.mesh.lanes[lane].clone()
        } else {
            made[self.random.below(made.len())].1.clone()
        };
        while self.random.once_in(2) {
            let earlier: Vec<_> = self.pending.range(..k).map(|(&j, _)| j).collect();
            if earlier.is_empty() {
                break;
            }
            let j = earlier[self.random.below(earlier.len())];
            handle = handle.after(&self.pending[&j].ticket);
        }
        if self.goes_on(k) {
            // Waited for already, or dropped, if its ticket is not there.
            if let Some(before) = self.pending.get(&(k - 1)) {
                handle = handle.after(&before.ticket);
            } else if let Some((_, made)) = self.handles[lane].iter().find(|(j, _)| *j == k - 1) {
                handle = made.clone();
            }
        }
        handle
    }

    fn queue(&mut self, k: usize) {
        self.queued[k] = true;
        let step = self.steps[k];
        let lane = self.handle(k);
        let (size, index) = (lane.size(), lane.index());
        let chained = self.goes_on(k + 1);
        let seed = group_seed(&step, lane.ranks()[0]);
        let whole = || input(seed, index, step.length * size);
        let mut into = None;
        let ticket = match step.kind {
            Kind::ReduceScatter(wire) => {
                let buffer = whole();
                if chained {
                    let own = buffer.narrow(0, (index * step.length) as i64, step.length as i64);
                    self.slices.insert(k, own);
                }
                lane.reduce_scatter(buffer, wire)
            }
            Kind::Into(wire, add) => {
                let target = input(mix(seed), index, step.length);
                into = Some(target.shallow_clone());
                lane.reduce_scatter_into(whole(), wire, target, add)
            }
            Kind::AllReduce => lane.all_reduce(input(seed, index, step.length)),
            Kind::AllReduceOfSlice(_) => lane.all_reduce(self.slices.remove(&(k - 1)).unwrap()),
            Kind::AllGather => {
                let buffer = whole().zero_();
                let own = (index * step.length) as i64;
                let mut slice = buffer.narrow(0, own, step.length as i64);
                slice.copy_(&input(seed, index, step.length));
                lane.all_gather(buffer)
            }
            Kind::AllToAll => lane.all_to_all(whole()),
            Kind::Broadcast(root) => lane.broadcast(input(seed, index, step.length), root % size),
            Kind::Message(from, to) => {
                let (from, to) = (from % size, to % size);
                let buffer = input(seed, index, step.length);
                match index {
                    _ if from == to => return,
                    _ if index == from => lane.send(buffer, to),
                    _ if index == to => lane.recv(buffer, from),
                    _ => return,
                }
            }
        };
        // The slice's next operation needs a handle that outlives the ticket.
        if chained || self.random.once_in(4) {
            let lane = if chained {
                REPLICA
            } else {
                self.random.below(WORLD + 1)
            };
            let handle = self.mesh.lanes[lane].after(&ticket);
            self.handles[lane].push((k, handle));
        }
        if into.is_some() || !self.random.once_in(16) {
            let pending = Pending {
                ticket,
                into,
                chained,
            };
            self.pending.insert(k, pending);
        }
    }

    /// Waits for operation `k` and checks its result.
    fn wait(&mut self, k: usize) {
        let Some(Pending {
            ticket,
            into,
            chained,
        }) = self.pending.remove(&k)
        else {
            return;
        };
        let step = self.steps[k];
        let what = format!("{}, operation {k}: {step:?}", self.what);
        let (tensor, _) = ticket
            .wait()
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        if chained {
            return;
        }
        let found = floats(into.as_ref().unwrap_or(&tensor));
        let lane = &self.mesh.lanes[step.lane];
        let (size, index, length) = (lane.size(), lane.index(), step.length);
        let seed = group_seed(&step, lane.ranks()[0]);
        let own = index * length..(index + 1) * length;
        match step.kind {
            Kind::ReduceScatter(wire) => {
                let value = on_the_wire(lane, wire);
                let expected = own.clone().map(|i| expected_sum(seed, size, i, value));
                assert_bits(&found[own], expected, &what);
            }
            Kind::Into(wire, add) => {
                let value = on_the_wire(lane, wire);
                let expected = own.map(|i| {
                    let sum = expected_sum(seed, size, i, value);
                    let before = element(mix(seed), index, i - index * length);
                    if add { before + sum } else { sum }
                });
                assert_bits(&found, expected, &what);
                let given = floats(&input(seed, index, length * size));
                assert_bits(&floats(&tensor), given.into_iter(), &what);
            }
            Kind::AllReduce => {
                let expected = (0..length).map(|i| expected_sum(seed, size, i, |x| x));
                assert_bits(&found, expected, &what);
            }
            Kind::AllReduceOfSlice(wire) => {
                let (shard, lane) = (self.mesh.shard, &self.mesh.lanes[SHARD]);
                let value = on_the_wire(lane, wire);
                let start = lane.index() * length;
                let expected = (start..start + length).map(|i| {
                    let of = |replica: usize| {
                        let seed = group_seed(&step, replica * shard);
                        expected_sum(seed, shard, i, value)
                    };
                    (1..size).fold(of(0), |sum, replica| sum + of(replica))
                });
                assert_bits(&found, expected, &what);
            }
            Kind::AllGather => {
                let all = (0..size).flat_map(|m| (0..length).map(move |i| element(seed, m, i)));
                assert_bits(&found, all, &what);
            }
            Kind::AllToAll => {
                let all = (0..size).flat_map(|m| own.clone().map(move |i| element(seed, m, i)));
                assert_bits(&found, all, &what);
            }
            Kind::Broadcast(member) | Kind::Message(member, _) => {
                let expected = (0..length).map(|i| element(seed, member % size, i));
                assert_bits(&found, expected, &what);
            }
        }
    }
}
