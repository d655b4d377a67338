//! What every kind of communicator must do, written once.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use oxitron_trainer::comm::{Comm, Lane, Ticket, Wire};
use tch::{Kind, Tensor};

use super::values::{
    assert_bits, element, expected_sum, floats, here, input, on_the_wire, scattered_bytes,
};
use super::{chains, schedules};

/// Slice lengths: odd, shorter and longer than a block of the summation, longer than one chunk.
pub const LENGTHS: [usize; 4] = [1, 7, 1025, 300_001];

/// A slice of more chunks than are in flight together, so that scratch memory is used again.
pub const LONG: usize = 1_200_007;

/// Runs `body` for every handle on a thread of its own and hands a panic on.
pub fn each_rank(comms: Vec<Comm>, body: impl Fn(Comm) + Copy + Send + 'static) {
    let threads: Vec<_> = comms
        .into_iter()
        .map(|comm| std::thread::spawn(move || body(comm)))
        .collect();
    let outcomes: Vec<_> = threads.into_iter().map(|thread| thread.join()).collect();
    for outcome in outcomes {
        outcome.expect("a rank failed");
    }
}

/// The ranks of a shard group on the mesh that the suite makes of a world: half of an even one.
pub fn shard_size(world: usize) -> usize {
    if world.is_multiple_of(2) {
        world / 2
    } else {
        world
    }
}

/// The whole suite on one rank. All ranks of a world call it together.
pub fn run(comm: Comm) {
    conform(&comm);
    let everybody: Vec<usize> = (0..comm.world()).collect();
    let lanes = [0, 1].map(|_| comm.lane(&everybody).unwrap());
    waiting_does_not_burn_a_core(&lanes[0], &lanes[1]);
    comm.finish().unwrap();
}

/// What does not measure the process.
pub fn conform(comm: &Comm) {
    let everybody: Vec<usize> = (0..comm.world()).collect();
    let lane = comm.lane(&everybody).unwrap();
    assert_eq!((lane.size(), lane.index()), (comm.world(), comm.rank()));
    reduce_scatter_adds_in_rank_order(&lane);
    all_gather_and_all_to_all_place_every_slice(&lane);
    all_reduce_has_the_same_bits_everywhere(&lane);
    broadcast_reaches_everybody_from_every_root(&lane);
    messages_run_along_a_chain(&lane);
    a_dropped_ticket_and_a_wrong_argument_do_no_harm(&lane);
    chains::run(comm);
    schedules::run(comm, shard_size(comm.world()), 0..2);
    lanes_are_checked(comm);
}

fn check_reduce_scatter(lane: &Lane, ticket: Ticket, seed: u64, slice: usize, wire: Wire) {
    let (tensor, traffic) = ticket.wait().unwrap();
    let own = slice * lane.index()..slice * (lane.index() + 1);
    let value = on_the_wire(lane, wire);
    let expected = own
        .clone()
        .map(|index| expected_sum(seed, lane.size(), index, value));
    assert_bits(&floats(&tensor)[own.clone()], expected, "reduce-scatter");
    assert_eq!(traffic.bytes_sent, scattered_bytes(lane, slice, wire));
}

fn reduce_scatter_adds_in_rank_order(lane: &Lane) {
    for wire in [Wire::F32, Wire::Bf16] {
        for (seed, slice) in (1..).zip(LENGTHS.into_iter().chain([LONG])) {
            let buffer = input(seed, lane.index(), slice * lane.size());
            let ticket = lane.reduce_scatter(buffer, wire);
            check_reduce_scatter(lane, ticket, seed, slice, wire);
        }
    }
}

fn all_gather_and_all_to_all_place_every_slice(lane: &Lane) {
    for kind in [Kind::Float, Kind::BFloat16, Kind::Int64] {
        for (seed, slice) in (10..).zip(LENGTHS) {
            let whole = (input(seed, 0, slice * lane.size()) * 1000.0).to_kind(kind);
            let own = (lane.index() * slice) as i64;
            let buffer = whole.zeros_like();
            buffer
                .narrow(0, own, slice as i64)
                .copy_(&whole.narrow(0, own, slice as i64));
            let (gathered, _) = lane.all_gather(buffer).wait().unwrap();
            assert!(gathered.equal(&whole), "all-gather of {kind:?}");
        }
    }
    for (seed, slice) in (20..).zip(LENGTHS) {
        let buffer = input(seed, lane.index(), slice * lane.size());
        let (swapped, _) = lane.all_to_all(buffer).wait().unwrap();
        let expected = (0..lane.size()).flat_map(|member| {
            (0..slice).map(move |index| element(seed, member, lane.index() * slice + index))
        });
        assert_bits(&floats(&swapped), expected, "all-to-all");
    }
}

fn all_reduce_has_the_same_bits_everywhere(lane: &Lane) {
    for (seed, length) in (30..).zip(LENGTHS) {
        let (sum, _) = lane
            .all_reduce(input(seed, lane.index(), length))
            .wait()
            .unwrap();
        let expected = (0..length).map(|index| expected_sum(seed, lane.size(), index, |x| x));
        assert_bits(&floats(&sum), expected, "all-reduce of f32");
    }
    for (seed, length) in (60..).zip(LENGTHS) {
        let (sum, _) = lane
            .all_reduce_as(input(seed, lane.index(), length), Wire::Bf16)
            .wait()
            .unwrap();
        let round = on_the_wire(lane, Wire::Bf16);
        let expected =
            (0..length).map(|index| round(expected_sum(seed, lane.size(), index, round)));
        assert_bits(&floats(&sum), expected, "all-reduce of f32 as bf16");
    }
    // A control record: a few f64, fewer than ranks perhaps.
    let record = here(Tensor::from_slice(&[
        0.1 * (lane.index() + 1) as f64,
        1.0,
        -0.0,
    ]));
    let (sum, _) = lane.all_reduce(record).wait().unwrap();
    let mut first = 0.1;
    for member in 1..lane.size() {
        first += 0.1 * (member + 1) as f64;
    }
    let found = Vec::<f64>::try_from(&sum.to_device(tch::Device::Cpu)).unwrap();
    assert_eq!(found[0].to_bits(), f64::to_bits(first));
    assert_eq!(found[1], lane.size() as f64);
}

fn broadcast_reaches_everybody_from_every_root(lane: &Lane) {
    for root in 0..lane.size() {
        // The last is more chunks than are in flight together.
        for length in [0, 1, 3, (1 << 20) + 1, (4 << 20) + 5] {
            let mine = lane.index() == root;
            let fill = |i: usize| (i % 251 + root) as u8;
            let values: Vec<u8> = (0..length)
                .map(|i| if mine { fill(i) } else { 0 })
                .collect();
            let (copy, _) = lane
                .broadcast(here(Tensor::from_slice(&values)), root)
                .wait()
                .unwrap();
            let copy = Vec::<u8>::try_from(&copy.to_device(tch::Device::Cpu)).unwrap();
            assert!(
                copy.iter().enumerate().all(|(i, &byte)| byte == fill(i)),
                "from {root}"
            );
        }
    }
}

/// Each rank receives from the one before it, adds one and sends to the next.
fn messages_run_along_a_chain(lane: &Lane) {
    let mut buffer = here(Tensor::zeros([400_000, 2], (Kind::Float, tch::Device::Cpu)));
    if lane.index() > 0 {
        buffer = lane.recv(buffer, lane.index() - 1).wait().unwrap().0;
        assert!(floats(&buffer).iter().all(|&x| x == lane.index() as f32));
    }
    if lane.index() + 1 < lane.size() {
        let _ = lane.send(buffer + 1.0, lane.index() + 1).wait().unwrap();
    }
}

fn a_dropped_ticket_and_a_wrong_argument_do_no_harm(lane: &Lane) {
    let (seed, slice) = (40, 300_001);
    drop(lane.all_reduce(input(seed, lane.index(), slice)));
    let length = (lane.size() * 3 + 1) as i64;
    let uneven = here(Tensor::zeros([length], (Kind::Float, tch::Device::Cpu)));
    let ticket = lane.all_gather(uneven);
    if lane.size() > 1 {
        let error = ticket.wait().unwrap_err().to_string();
        assert!(
            error.starts_with(&format!("all-gather on lane {} (ranks 0, 1", lane.id())),
            "{error}"
        );
    }
    let ticket = lane.reduce_scatter(input(seed, lane.index(), slice * lane.size()), Wire::F32);
    check_reduce_scatter(lane, ticket, seed, slice, Wire::F32);
}

fn lanes_are_checked(comm: &Comm) {
    let (rank, world) = (comm.rank(), comm.world());
    let error = comm.lane(&[rank, world]).unwrap_err().to_string();
    assert!(error.contains("not of this world"), "{error}");
    assert!(comm.lane(&[rank, rank]).is_err());
    assert!(comm.lane(&[]).is_err());
}

/// Processor seconds of this process so far.
fn processor_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat[stat.rfind(')').unwrap() + 2..].split(' ').collect();
    // Fields 14 and 15 of proc(5), in ticks of 10 ms.
    fields[11..13]
        .iter()
        .map(|ticks| ticks.parse::<f64>().unwrap() / 100.0)
        .sum()
}

/// For one second the other ranks wait for the last one, whose own thread idles: for its part of an
/// operation, and on another lane for what comes after that.
fn waiting_does_not_burn_a_core(lane: &Lane, other: &Lane) {
    let last = lane.index() + 1 == lane.size();
    // All start together.
    let _ = lane.all_reduce(input(0, 0, 1)).wait().unwrap();
    let (begun, before) = (Instant::now(), processor_seconds());
    if last {
        std::thread::sleep(Duration::from_secs(1));
    }
    let awaited = lane.all_reduce(input(0, 0, 1));
    let _ = other.after(&awaited).all_reduce(input(0, 0, 1)).wait();
    let (waited, used) = (begun.elapsed().as_secs_f64(), processor_seconds() - before);
    if lane.index() == 0 {
        println!(
            "  {} ranks: {used:.2} processor seconds in {waited:.2} s",
            lane.size()
        );
    }
    // On threads, this is the sum over all ranks.
    assert!(
        used < 0.12 * lane.size() as f64 * waited,
        "{used} s in {waited} s"
    );
}

/// One rank of three aborts: the others learn lane, operation, peer and reason, and everything
/// queued behind fails because of it.
pub fn peers_of_an_abort_fail() {
    each_rank(Comm::threads(3).unwrap(), |comm| {
        let lane = comm.lane(&[0, 1, 2]).unwrap();
        if comm.rank() == 2 {
            return comm.abort("the disk is full");
        }
        let first = lane.all_gather(input(1, 0, 9));
        let second = lane.all_reduce(input(1, 0, 9));
        let error = first.wait().unwrap_err().to_string();
        // Ranks 0 and 1 wait for each other as well; whoever is told first may leave first.
        assert!(
            error.starts_with("all-gather on lane 0 (ranks 0, 1, 2) failed with"),
            "{error}"
        );
        let named = error.contains("rank 2: it has left the run: it aborted: the disk is full");
        assert!(named, "{error}");
        let error = second.wait().unwrap_err().to_string();
        assert!(
            error.contains("all-reduce on lane 0") && error.contains("disk is full"),
            "{error}"
        );
        // Neither leaves before both have seen rank 2's abort.
        let both = comm.lane(&[0, 1]).unwrap();
        let _ = both.all_reduce(input(1, 0, 1)).wait().unwrap();
    });
}

/// Tensors of different lengths on two ranks: both fail, and whoever notices first says why (the
/// other may only learn that its peer is gone).
pub fn other_lengths_fail() {
    static EXPLAINED: AtomicUsize = AtomicUsize::new(0);
    each_rank(Comm::threads(2).unwrap(), |comm| {
        let lane = comm.lane(&[0, 1]).unwrap();
        let length = 10 + 2 * comm.rank();
        let error = lane
            .all_gather(input(1, 0, length))
            .wait()
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("all-gather on lane 0 (ranks 0, 1) failed with"),
            "{error}"
        );
        EXPLAINED.fetch_add(usize::from(error.contains("bytes")), Ordering::Relaxed);
        assert!(lane.all_gather(input(1, 0, 10)).wait().is_err());
    });
    assert!(EXPLAINED.load(Ordering::Relaxed) > 0);
}

/// Rank 1 aborts while the others wait for it; between processes nobody returns from this.
#[cfg(feature = "mpi")]
pub fn one_rank_aborts(comm: Comm) {
    let everybody: Vec<usize> = (0..comm.world()).collect();
    let lane = comm.lane(&everybody).unwrap();
    if comm.rank() == 1 {
        std::thread::sleep(Duration::from_millis(500));
        comm.abort("the disk is full");
    }
    let _ = lane.all_reduce(input(1, 0, 9)).wait();
    panic!("rank {} outlived the abort", comm.rank());
}
