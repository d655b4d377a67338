//! One rank's random way through a list of operations (see [`schedules`](super::schedules)).

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use oxitron_trainer::comm::{Lane, Ticket};
use tch::Tensor;

use super::schedules::{Kind, Mesh, REPLICA, SHARD, Step, WORLD, group_seed};
use super::values::{Random, assert_bits, element, expected_sum, floats, input, mix, on_the_wire};

/// Queued and not waited for.
struct Pending {
    ticket: Ticket,
    /// The tensor apart that the sum goes to.
    into: Option<Tensor>,
    /// Whether another operation works on the same memory, so that only that one can be checked.
    chained: bool,
}

/// A rank's way through the list of one seed.
pub struct Walk<'a> {
    mesh: &'a Mesh,
    steps: &'a [Step],
    random: Random,
    queued: Vec<bool>,
    pending: BTreeMap<usize, Pending>,
    /// Handles made in advance: what they come after, by the kind of lane.
    handles: [Vec<(usize, Lane)>; 3],
    /// The memory of a reduce-scatter, for the operation that goes on with it.
    slices: BTreeMap<usize, Tensor>,
    /// Pairs of operations of which the first comes after the second.
    after: Vec<(usize, usize)>,
    /// When those ran that were waited for.
    ran: BTreeMap<usize, (Instant, Instant)>,
    what: String,
}

impl<'a> Walk<'a> {
    /// A way through `steps` as `random` has it; `what` says whose it is.
    pub fn new(mesh: &'a Mesh, steps: &'a [Step], random: Random, what: String) -> Self {
        Self {
            mesh,
            steps,
            random,
            queued: vec![false; steps.len()],
            pending: BTreeMap::new(),
            handles: Default::default(),
            slices: BTreeMap::new(),
            after: Vec::new(),
            ran: BTreeMap::new(),
            what,
        }
    }

    /// Queues everything, waits for everything that is not dropped and checks it.
    pub fn run(mut self) {
        loop {
            let lowest = self.queued.iter().position(|queued| !queued);
            let may_wait: Vec<_> = match lowest {
                Some(lowest) => self.pending.range(..lowest).map(|(&k, _)| k).collect(),
                None => self.pending.keys().copied().collect(),
            };
            if lowest.is_none() && may_wait.is_empty() {
                return self.check_times();
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
        // In order behind the last one of its lane that was queued.
        let last = (0..k).rfind(|&j| self.steps[j].lane == lane);
        let mut after = Vec::from_iter(last);
        let made: Vec<_> = self.handles[lane].iter().filter(|(j, _)| *j < k).collect();
        // The slice's reduce-scatter may have been waited for, or dropped; its handle is there.
        let needed = made
            .iter()
            .position(|(j, _)| self.goes_on(k) && *j == k - 1);
        let chosen = match needed {
            None if self.random.once_in(2) => None,
            None => (!made.is_empty()).then(|| self.random.below(made.len())),
            needed => needed,
        };
        let mut handle = match chosen.map(|chosen| made[chosen]) {
            None => self.mesh.lanes[lane].clone(),
            Some((j, handle)) => {
                after.push(*j);
                handle.clone()
            }
        };
        while self.random.once_in(2) {
            let earlier: Vec<_> = self.pending.range(..k).map(|(&j, _)| j).collect();
            if earlier.is_empty() {
                break;
            }
            let j = earlier[self.random.below(earlier.len())];
            handle = handle.after(&self.pending[&j].ticket);
            after.push(j);
        }
        self.after.extend(after.into_iter().map(|j| (k, j)));
        handle
    }

    /// Whatever came after something began when that had ended, as far as both are known. What had
    /// nothing to do has no times.
    fn check_times(&self) {
        // Seconds as a fraction are not exact to the nanosecond.
        let slack = Duration::from_micros(1);
        for (later, earlier) in &self.after {
            if let (Some((begun, _)), Some((_, ended))) =
                (self.ran.get(later), self.ran.get(earlier))
            {
                assert!(
                    *begun + slack >= *ended,
                    "{}: operation {later} began before the end of {earlier}, which it comes after",
                    self.what
                );
            }
        }
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
        // The operation that goes on with the slice needs a handle that outlives the ticket.
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
        let (tensor, traffic) = ticket
            .wait()
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        if let Some(begun) = traffic.begun {
            let busy = Duration::from_secs_f64(traffic.busy_seconds);
            self.ran.insert(k, (begun, begun + busy));
        }
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
