//! What goes wrong between GPUs.

use std::time::{Duration, Instant};

use super::super::super::{Comm, Error, Lane, Wire};
use super::super::emulated::control;
use super::{everybody, on_gpus, ones};

/// Operations that the emulated NCCL has been asked for on `lane`.
pub fn operations(lane: &Lane) -> u64 {
    control::operations(lane.gpu_half().unwrap().communicator().handle())
}

fn fail(lane: &Lane, reason: &str) {
    control::fail(lane.gpu_half().unwrap().communicator().handle(), reason);
}

fn hang(lane: &Lane) {
    control::hang(lane.gpu_half().unwrap().communicator().handle());
}

/// Asks a lane as a host does that waits for its GPU.
fn failure_of(lane: &Lane) -> Error {
    let begun = Instant::now();
    loop {
        if let Err(error) = lane.check() {
            return error;
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "nothing failed");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A peer that has gone shows as an asynchronous error: whoever asks gets lane, operation and NCCL's
/// words, what is stuck ends, and nothing is issued any more.
#[test]
fn an_asynchronous_error_ends_what_is_under_way() {
    on_gpus(2, |comm| {
        let (lane, other) = (everybody(&comm), everybody(&comm));
        lane.check().unwrap();
        if comm.rank() == 1 {
            // Leaves without a word.
            return comm.abort("the GPU fell off the bus");
        }
        let stuck = lane.all_gather(ones(8));
        assert!(!stuck.is_ready());
        comm.check().unwrap();
        fail(&lane, "connection closed by peer");
        let error = failure_of(&other).to_string();
        let expected = format!(
            "all-gather on lane {} (ranks 0, 1) failed: NCCL: remote process exited or there was a \
             network error (error 6): connection closed by peer",
            lane.id()
        );
        assert_eq!(error, expected);
        let later = lane.all_reduce(ones(8)).wait().unwrap_err();
        assert!(matches!(later, Error::Poisoned { .. }), "{later}");
        assert!(later.to_string().contains("closed by peer"), "{later}");
        let error = stuck.wait().unwrap_err();
        assert!(error.to_string().contains("closed by peer"), "{error}");
        comm.abort("it cannot go on");
    });
}

/// The watchdog ends a wait that no peer will end: the stream of whoever waits goes on, and the rest
/// is interrupted.
#[test]
fn an_interrupted_wait_ends_and_so_does_all_that_follows() {
    on_gpus(2, |comm| {
        let lane = everybody(&comm);
        hang(&lane);
        let monitor = comm.monitor();
        let waiting = std::thread::spawn(move || {
            let begun = Instant::now();
            loop {
                if let Some(operation) = monitor.waiting() {
                    monitor.interrupt();
                    return operation;
                }
                assert!(begun.elapsed() < Duration::from_secs(10), "nobody waits");
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let first = lane.reduce_scatter(ones(8), Wire::F32);
        let second = lane.all_reduce(ones(8));
        // A GPU's stream would go on over whatever is there, as the emulated one does.
        let _ = first.wait();
        let named = format!("reduce-scatter on lane {} (ranks 0, 1)", lane.id());
        assert_eq!(waiting.join().unwrap(), named);
        let third = lane.all_reduce(ones(8)).wait().unwrap_err();
        assert!(third.is_interrupted(), "{third}");
        assert!(second.wait().unwrap_err().is_interrupted());
        assert!(lane.check().unwrap_err().is_interrupted());
        comm.desert();
    });
}

/// Ranks that do different things hang GPUs; emulated ones say so.
#[test]
fn ranks_that_do_different_things_are_told() {
    on_gpus(2, |comm| {
        let lane = everybody(&comm);
        let ticket = match comm.rank() {
            0 => lane.all_reduce(ones(8)),
            _ => lane.all_reduce(ones(6)),
        };
        let error = failure_of(&lane).to_string();
        assert!(error.contains("ranks do different things"), "{error}");
        drop(ticket);
        comm.abort("it cannot go on");
    });
}

/// Operations on the CPU and on a GPU are no chain.
#[test]
fn a_chain_of_two_devices_is_refused() {
    on_gpus(2, |comm| {
        let lane = everybody(&comm);
        let on_gpu = lane.all_reduce(ones(8));
        let behind = lane.after(&on_gpu);
        let refused = std::thread::spawn(move || behind.all_reduce(ones(8)).wait().unwrap_err());
        let error = refused.join().unwrap().to_string();
        assert!(error.contains("tensors of another device"), "{error}");
        let _ = on_gpu.wait().unwrap();
        comm.finish().unwrap();
    });
}

/// One rank that cannot use NCCL keeps no other waiting.
#[test]
fn without_nccl_no_rank_waits_for_the_others() {
    super::suite::each_rank(Comm::threads(2).unwrap(), |comm| {
        let missing = || {
            Err(Error::Start(
                "collectives (NCCL) is missing: no file".to_owned(),
            ))
        };
        let (nccl, expected) = match comm.rank() {
            0 => (
                super::super::Nccl::emulated(),
                "another rank cannot use NCCL",
            ),
            _ => (missing(), "NCCL) is missing: no file"),
        };
        let error = comm.join_gpus(nccl).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        comm.finish().unwrap();
    });
}

/// A second GPU of a rank would be another rank.
#[test]
fn a_gpu_is_opened_once() {
    on_gpus(2, |comm| {
        let error = comm.open_emulated_gpu().unwrap_err().to_string();
        assert!(error.contains("opens its GPU once"), "{error}");
        let lane = everybody(&comm);
        let _ = lane.all_reduce(ones(3)).wait().unwrap();
        comm.finish().unwrap();
    });
}
