//! What every kind of communicator must do, written once.
//!
//! Inputs come from a hash of (rank, element), so each rank can compute what it must receive, bit
//! for bit, without asking the others.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use half::bf16;
use oxitron_trainer::comm::{Comm, Lane, Ticket, Wire};
use tch::{Kind, Tensor};

/// Slice lengths: odd, shorter and longer than a block of the summation, longer than one chunk.
const LENGTHS: [usize; 4] = [1, 7, 1025, 300_001];

/// A slice of more chunks than are in flight together, so that scratch memory is used again.
const LONG: usize = 1_200_007;

/// Batches of the random schedules, and operations per lane in each.
const RANDOM_BATCHES: usize = 3;
const BATCH_OPERATIONS: usize = 8;

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

/// The whole suite on one rank. All ranks of a world call it together.
pub fn run(comm: Comm) {
    let everybody: Vec<usize> = (0..comm.world()).collect();
    let lane = comm.lane(&everybody).unwrap();
    assert_eq!((lane.size(), lane.index()), (comm.world(), comm.rank()));
    reduce_scatter_adds_in_rank_order(&lane);
    all_gather_and_all_to_all_place_every_slice(&lane);
    all_reduce_has_the_same_bits_everywhere(&lane);
    broadcast_reaches_everybody_from_every_root(&lane);
    messages_run_along_a_chain(&lane);
    a_dropped_ticket_and_a_wrong_argument_do_no_harm(&lane);
    random_schedules_on_overlapping_lanes_end(&comm);
    lanes_are_checked(&comm);
    waiting_does_not_burn_a_core(&lane);
    comm.finish().unwrap();
}

/// A 64-bit mix (SplitMix64's finaliser).
fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// Element `index` of the input of the rank at lane index `member`; magnitudes differ so much that
/// another order of addition gives other bits.
fn element(seed: u64, member: usize, index: usize) -> f32 {
    let bits = mix(seed ^ mix(((member as u64) << 40) + index as u64 + 1));
    let mantissa = (bits >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
    mantissa * (1u32 << (bits & 15)) as f32
}

fn input(seed: u64, member: usize, length: usize) -> Tensor {
    let values: Vec<f32> = (0..length)
        .map(|index| element(seed, member, index))
        .collect();
    Tensor::from_slice(&values)
}

/// The sum over `size` members in order, each contribution through `value`.
fn expected_sum(seed: u64, size: usize, index: usize, value: impl Fn(f32) -> f32) -> f32 {
    let mut sum = value(element(seed, 0, index));
    for member in 1..size {
        sum += value(element(seed, member, index));
    }
    sum
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    Vec::<f32>::try_from(&tensor.flatten(0, -1)).unwrap()
}

fn assert_bits(found: &[f32], expected: impl Iterator<Item = f32>, what: &str) {
    let mut count = 0;
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert_eq!(
            found.to_bits(),
            expected.to_bits(),
            "{what}, element {index}"
        );
        count += 1;
    }
    assert_eq!(count, found.len(), "{what}");
}

fn check_reduce_scatter(lane: &Lane, ticket: Ticket, seed: u64, slice: usize, wire: Wire) {
    let (tensor, traffic) = ticket.wait().unwrap();
    let own = slice * lane.index()..slice * (lane.index() + 1);
    let round = |x: f32| match wire {
        Wire::Bf16 if lane.size() > 1 => bf16::from_f32(x).to_f32(),
        _ => x,
    };
    let expected = own
        .clone()
        .map(|index| expected_sum(seed, lane.size(), index, round));
    assert_bits(&floats(&tensor)[own.clone()], expected, "reduce-scatter");
    let width = if wire == Wire::Bf16 { 2 } else { 4 };
    assert_eq!(
        traffic.bytes_sent,
        ((lane.size() - 1) * slice * width) as u64
    );
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
    // A control record: a few f64, fewer than ranks perhaps.
    let record = Tensor::from_slice(&[0.1 * (lane.index() + 1) as f64, 1.0, -0.0]);
    let (sum, _) = lane.all_reduce(record).wait().unwrap();
    let mut first = 0.1;
    for member in 1..lane.size() {
        first += 0.1 * (member + 1) as f64;
    }
    let found = Vec::<f64>::try_from(&sum).unwrap();
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
                .broadcast(Tensor::from_slice(&values), root)
                .wait()
                .unwrap();
            let copy = Vec::<u8>::try_from(&copy).unwrap();
            assert!(
                copy.iter().enumerate().all(|(i, &byte)| byte == fill(i)),
                "from {root}"
            );
        }
    }
}

/// Each rank receives from the one before it, adds one and sends to the next.
fn messages_run_along_a_chain(lane: &Lane) {
    let mut buffer = Tensor::zeros([400_000, 2], (Kind::Float, tch::Device::Cpu));
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
    let uneven = Tensor::zeros(
        [(lane.size() * 3 + 1) as i64],
        (Kind::Float, tch::Device::Cpu),
    );
    let ticket = lane.all_gather(uneven);
    if lane.size() > 1 {
        let error = ticket.wait().unwrap_err().to_string();
        assert!(
            error.starts_with("all-gather on lane 0 (ranks 0, 1"),
            "{error}"
        );
    }
    let ticket = lane.reduce_scatter(input(seed, lane.index(), slice * lane.size()), Wire::F32);
    check_reduce_scatter(lane, ticket, seed, slice, Wire::F32);
}

/// Several lanes, two of them over the same ranks and two over halves, each with its own random list
/// of operations. Every rank queues them in its own random interleaving, pauses now and then, and
/// waits for the tickets of a batch in another order than that of the queue.
fn random_schedules_on_overlapping_lanes_end(comm: &Comm) {
    let everybody: Vec<usize> = (0..comm.world()).collect();
    let like_me: Vec<usize> = everybody
        .iter()
        .copied()
        .filter(|rank| rank % 2 == comm.rank() % 2)
        .collect();
    let with_zero: Vec<usize> = vec![comm.rank()];
    let lanes = [
        comm.lane(&everybody).unwrap(),
        comm.lane(&like_me).unwrap(),
        comm.lane(&everybody).unwrap(),
        comm.lane(&with_zero).unwrap(),
    ];
    let mut random = mix(comm.rank() as u64 + 77);
    let mut next = move |bound: usize| {
        random = mix(random.wrapping_add(0x9e37_79b9_7f4a_7c15));
        (random % bound as u64) as usize
    };
    // All tickets of a batch are waited for before the next batch: a rank that waited for one lane
    // while another waits for a lane that the first has not filled yet would be a deadlock of the
    // caller's making.
    for batch in 0..RANDOM_BATCHES {
        let mut queued = [0; 4];
        let mut tickets = Vec::new();
        while queued.iter().any(|&count| count < BATCH_OPERATIONS) {
            let which = next(lanes.len());
            if queued[which] == BATCH_OPERATIONS {
                continue;
            }
            let lane = &lanes[which];
            // What the operation is depends on the lane's ranks and its place in the queue only.
            let place = ((lane.ranks()[0] * 10 + which) * 100 + batch) * 100 + queued[which];
            let seed = mix(place as u64 + 1);
            queued[which] += 1;
            let slice = 1 + (seed >> 8) as usize % 20_000;
            let wire = if seed & 1 == 0 { Wire::F32 } else { Wire::Bf16 };
            if seed & 6 == 0 {
                let ticket = lane.all_reduce(input(seed, lane.index(), slice));
                tickets.push((lane, ticket, seed, slice, None));
            } else {
                let buffer = input(seed, lane.index(), slice * lane.size());
                let ticket = lane.reduce_scatter(buffer, wire);
                tickets.push((lane, ticket, seed, slice, Some(wire)));
            }
            if next(8) == 0 {
                std::thread::sleep(Duration::from_micros(next(3000) as u64));
            }
        }
        while !tickets.is_empty() {
            check_random(tickets.swap_remove(next(tickets.len())));
        }
    }
}

fn check_random((lane, ticket, seed, slice, wire): (&Lane, Ticket, u64, usize, Option<Wire>)) {
    if let Some(wire) = wire {
        return check_reduce_scatter(lane, ticket, seed, slice, wire);
    }
    let (sum, _) = ticket.wait().unwrap();
    let expected = (0..slice).map(|index| expected_sum(seed, lane.size(), index, |x| x));
    assert_bits(&floats(&sum), expected, "all-reduce among other lanes");
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

/// For one second the other ranks wait for the last one, whose own thread idles.
fn waiting_does_not_burn_a_core(lane: &Lane) {
    let last = lane.index() + 1 == lane.size();
    // All start together.
    let _ = lane.all_reduce(input(0, 0, 1)).wait().unwrap();
    let (begun, before) = (Instant::now(), processor_seconds());
    if last {
        std::thread::sleep(Duration::from_secs(1));
    }
    let _ = lane.all_reduce(input(0, 0, 1)).wait().unwrap();
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
