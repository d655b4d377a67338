//! Operations that come after others, and sums that go to a tensor apart.

use std::time::Duration;

use oxitron_trainer::comm::{Comm, Error, Lane, Ticket, Wire};
use tch::{Device, Kind, Tensor};

use super::suite::{LENGTHS, LONG, shard_size};
use super::values::{
    assert_bits, expected_sum, floats, has_run, here, input, mix, on_the_wire, scattered_bytes,
};

/// All cases on one rank. All ranks of a world call it together.
pub fn run(comm: &Comm) {
    let everybody: Vec<usize> = (0..comm.world()).collect();
    let lane = comm.lane(&everybody).unwrap();
    sums_go_to_a_tensor_apart(&lane);
    micro_batches_add_up(&lane);
    a_buffer_that_does_not_divide_is_refused(&lane);
    a_slice_is_reduced_in_two_groups(comm);
    a_failure_stops_what_comes_after_it(comm);
}

/// What another tensor than the buffer holds before: as uneven as an input.
fn before(lane: &Lane, seed: u64, slice: usize) -> Tensor {
    input(mix(seed), lane.index(), slice)
}

fn check_into(lane: &Lane, ticket: Ticket, into: &Tensor, seed: u64, wire: Wire, add: bool) {
    let slice = into.numel();
    let (buffer, traffic) = ticket.wait().unwrap();
    let what = format!("{slice} elements into another tensor, {wire:?}, accumulate {add}");
    let given = floats(&input(seed, lane.index(), slice * lane.size()));
    assert_bits(&floats(&buffer), given.into_iter(), &what);
    let earlier = floats(&before(lane, seed, slice));
    let value = on_the_wire(lane, wire);
    let expected = (0..slice).map(|i| {
        let sum = expected_sum(seed, lane.size(), lane.index() * slice + i, value);
        if add { earlier[i] + sum } else { sum }
    });
    assert_bits(&floats(into), expected, &what);
    assert_eq!(traffic.bytes_sent, scattered_bytes(lane, slice, wire));
    assert!(has_run(&traffic));
}

fn sums_go_to_a_tensor_apart(lane: &Lane) {
    for wire in [Wire::F32, Wire::Bf16] {
        for add in [false, true] {
            // The longest one is slow to check; where it goes matters more when it is added.
            let more = [0].into_iter().chain(add.then_some(LONG));
            for (seed, slice) in (50..).zip(LENGTHS.into_iter().chain(more)) {
                let buffer = input(seed, lane.index(), slice * lane.size());
                // A view in the middle of a larger tensor, as a unit's slice is.
                let home = here(Tensor::full(
                    [slice as i64 + 9],
                    7.5,
                    (Kind::Float, Device::Cpu),
                ));
                let into = home.narrow(0, 4, slice as i64);
                into.shallow_clone().copy_(&before(lane, seed, slice));
                let ticket = lane.reduce_scatter_into(buffer, wire, into.shallow_clone(), add);
                check_into(lane, ticket, &into, seed, wire, add);
                for edge in [home.narrow(0, 0, 4), home.narrow(0, slice as i64 + 4, 5)] {
                    assert!(
                        floats(&edge).into_iter().all(|x| x == 7.5),
                        "beyond {slice}"
                    );
                }
            }
        }
    }
}

/// Three reductions into one slice, queued together: the first writes, the others add, in the order
/// of the queue whatever the order of the waiting.
fn micro_batches_add_up(lane: &Lane) {
    let slice = 70_001;
    let into = here(Tensor::full(
        [slice as i64],
        f64::NAN,
        (Kind::Float, Device::Cpu),
    ));
    let mut tickets: Vec<_> = (60..63)
        .map(|seed| {
            let buffer = input(seed, lane.index(), slice * lane.size());
            let kept = into.shallow_clone();
            lane.reduce_scatter_into(buffer, Wire::Bf16, kept, seed > 60)
        })
        .collect();
    while let Some(ticket) = tickets.pop() {
        let _ = ticket.wait().unwrap();
    }
    let value = on_the_wire(lane, Wire::Bf16);
    let sum = |seed, i| expected_sum(seed, lane.size(), lane.index() * slice + i, value);
    let expected = (0..slice).map(|i| (sum(60, i) + sum(61, i)) + sum(62, i));
    assert_bits(&floats(&into), expected, "three micro-batches");
}

fn a_buffer_that_does_not_divide_is_refused(lane: &Lane) {
    if lane.size() == 1 {
        return;
    }
    let zeros = |length: usize| here(Tensor::zeros([length as i64], (Kind::Float, Device::Cpu)));
    let ticket = lane.reduce_scatter_into(zeros(3 * lane.size() + 1), Wire::F32, zeros(3), false);
    let error = ticket.wait().unwrap_err().to_string();
    assert!(error.contains("pad the buffer"), "{error}");
}

/// Reduce-scatter in the shard group, then all-reduce of the own slice in the replica group, queued
/// together; the last rank comes late. Four ranks are a mesh of 2 × 2.
fn a_slice_is_reduced_in_two_groups(comm: &Comm) {
    let shard = shard_size(comm.world());
    let (replica, member) = (comm.rank() / shard, comm.rank() % shard);
    let group = |replica: usize| (0..shard).map(|m| replica * shard + m).collect::<Vec<_>>();
    let copies = comm.world() / shard;
    let others: Vec<_> = (0..copies)
        .map(|replica| replica * shard + member)
        .collect();
    let shard_lane = comm.lane(&group(replica)).unwrap();
    let replica_lane = comm.lane(&others).unwrap();
    let seed_of = |seed: u64, replica: usize| mix(seed) ^ replica as u64;
    for wire in [Wire::F32, Wire::Bf16] {
        for (seed, slice) in (70..).zip(LENGTHS) {
            if comm.rank() + 1 == comm.world() {
                std::thread::sleep(Duration::from_millis(20));
            }
            let buffer = input(seed_of(seed, replica), member, slice * shard);
            let own = buffer.narrow(0, (member * slice) as i64, slice as i64);
            let scattered = shard_lane.reduce_scatter(buffer, wire);
            let handle = replica_lane.after(&scattered);
            // The handle serves as well when its ticket has been used up.
            let late = if seed % 2 == 0 {
                drop(scattered);
                None
            } else {
                Some(scattered.wait().unwrap().1)
            };
            let (sum, traffic) = handle.all_reduce(own).wait().unwrap();
            let value = on_the_wire(&shard_lane, wire);
            let expected = (member * slice..(member + 1) * slice).map(|i| {
                let of = |replica| expected_sum(seed_of(seed, replica), shard, i, value);
                (1..copies).fold(of(0), |sum, replica| sum + of(replica))
            });
            assert_bits(&floats(&sum), expected, "a slice reduced twice");
            if let (Some(first), Some(begun)) = (late, traffic.begun) {
                assert!(first.begun.is_none_or(|first| first <= begun));
            }
        }
    }
}

/// Every rank chains to an operation that its own arguments spoil.
fn a_failure_stops_what_comes_after_it(comm: &Comm) {
    let everybody: Vec<usize> = (0..comm.world()).collect();
    let (lane, other) = (
        comm.lane(&everybody).unwrap(),
        comm.lane(&everybody).unwrap(),
    );
    let wrong = lane.broadcast(input(1, 0, 3), comm.world());
    let missed = other.after(&wrong).all_reduce(input(1, 0, 3));
    let behind = other.all_reduce(input(1, 0, 3));
    let error = missed.wait().unwrap_err();
    assert!(matches!(error, Error::Dependency { .. }), "{error}");
    let error = error.to_string();
    assert!(
        error.contains("broadcast on lane") && error.contains("root"),
        "{error}"
    );
    assert!(matches!(behind.wait(), Err(Error::Poisoned { .. })));
    let _ = lane.all_reduce(input(1, 0, 3)).wait().unwrap();
}
