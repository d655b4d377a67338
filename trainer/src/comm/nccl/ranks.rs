//! Lanes on emulated GPUs: the conformance suite of all communicators, and what goes wrong.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod failures;

#[allow(dead_code)]
#[path = "../../../tests/comm/chains.rs"]
mod chains;
#[allow(dead_code)]
#[path = "../../../tests/comm/schedules.rs"]
mod schedules;
#[allow(dead_code)]
#[path = "../../../tests/comm/suite.rs"]
mod suite;
#[allow(dead_code)]
#[path = "../../../tests/comm/values.rs"]
mod values;
#[allow(dead_code)]
#[path = "../../../tests/comm/walk.rs"]
mod walk;
#[allow(dead_code)]
#[path = "../../../tests/comm/watch.rs"]
mod watch;

use std::time::Duration;

use oxitron_kernels::cuda::emulated;
use tch::Tensor;

use super::super::{Comm, Lane, Wire};

const LIMIT: Duration = Duration::from_secs(120);

/// Runs `body` on every rank of a world with emulated GPUs.
fn on_gpus(world: usize, body: impl Fn(Comm) + Copy + Send + 'static) {
    let _watched = watch::watch(LIMIT, format!("{world} emulated GPUs"));
    suite::each_rank(Comm::threads(world).unwrap(), move |comm| {
        emulated(|| {
            comm.open_emulated_gpu().unwrap();
            body(comm);
        });
    });
}

fn everybody(comm: &Comm) -> Lane {
    let ranks: Vec<usize> = (0..comm.world()).collect();
    comm.lane(&ranks).unwrap()
}

fn ones(length: i64) -> Tensor {
    Tensor::ones([length], (tch::Kind::Float, tch::Device::Cpu))
}

fn conform(comm: Comm) {
    suite::conform(&comm);
    comm.finish().unwrap();
}

#[test]
fn one_rank_conforms() {
    on_gpus(1, conform);
}

#[test]
fn two_ranks_conform() {
    on_gpus(2, conform);
}

#[test]
fn three_ranks_conform() {
    on_gpus(3, conform);
}

#[test]
fn four_ranks_conform() {
    on_gpus(4, conform);
}

/// As on the other transports: whatever the interleaving, they end, with the right bits.
#[test]
fn random_schedules_end_with_the_right_bits() {
    for first in (0..32).step_by(8) {
        on_gpus(2, move |comm| {
            schedules::run(&comm, 2, first..first + 8);
            comm.finish().unwrap();
        });
        on_gpus(4, move |comm| {
            schedules::run(&comm, 2, first..first + 8);
            comm.finish().unwrap();
        });
    }
}

/// The same lane carries tensors of the GPU by NCCL and those of the CPU by its transport.
#[test]
fn the_device_of_a_tensor_decides_who_carries_it() {
    on_gpus(2, |comm| {
        let lane = everybody(&comm);
        assert_eq!(lane.nccl_version().unwrap(), "2.28.9");
        let operations = || failures::operations(&lane);
        let (sum, traffic) = lane.all_reduce(ones(8)).wait().unwrap();
        assert_eq!(sum.double_value(&[7]), 2.0);
        assert_eq!((operations(), traffic.begun), (1, None));
        // A ring of two moves the buffer once.
        assert_eq!(traffic.bytes_sent, 32);
        // Another thread takes tensors of the CPU for what they are.
        let other = lane.clone();
        let by_host = std::thread::spawn(move || other.all_reduce(ones(8)).wait().unwrap().1);
        let traffic = by_host.join().unwrap();
        assert!(traffic.begun.is_some() && traffic.on_gpu.is_none());
        assert_eq!(operations(), 1);
        comm.finish().unwrap();
    });
}

/// A lane of one rank among several needs no NCCL, and still comes after what it is told to.
#[test]
fn a_lane_of_one_rank_copies_behind_what_it_comes_after() {
    on_gpus(2, |comm| {
        let (lane, own) = (everybody(&comm), comm.lane(&[comm.rank()]).unwrap());
        assert!(own.nccl_version().is_none());
        if comm.rank() == 1 {
            std::thread::sleep(Duration::from_millis(50));
        }
        let buffer = ones(4);
        let view = buffer.shallow_clone();
        let reduced = lane.all_reduce(buffer);
        let into = ones(4);
        let chained = own.after(&reduced);
        let ticket = chained.reduce_scatter_into(view, Wire::Bf16, into.shallow_clone(), true);
        let passed = own
            .after(&reduced)
            .all_reduce_as(into.shallow_clone(), Wire::Bf16);
        let _ = (
            passed.wait().unwrap(),
            ticket.wait().unwrap(),
            reduced.wait().unwrap(),
        );
        // Two ranks' ones, and the one that was there.
        assert_eq!(values::floats(&into), [3.0; 4]);
        comm.finish().unwrap();
    });
}

/// What an operation took, and what was waited for it, is known when the streams have come so far.
#[test]
fn times_are_known_later() {
    on_gpus(2, |comm| {
        let lane = everybody(&comm);
        let late = Duration::from_millis(60);
        if comm.rank() == 1 {
            std::thread::sleep(late);
        }
        let (_, traffic) = lane.all_reduce(ones(8)).wait().unwrap();
        let seconds = traffic.on_gpu.unwrap().read().unwrap();
        if comm.rank() == 0 {
            let least = late.as_secs_f64() * 0.5;
            assert!(
                seconds.busy > least && seconds.waited > least,
                "{seconds:?}"
            );
            assert!(seconds.waited <= seconds.busy + 0.01, "{seconds:?}");
        } else {
            assert!(seconds.busy < late.as_secs_f64(), "{seconds:?}");
        }
        comm.finish().unwrap();
    });
}
