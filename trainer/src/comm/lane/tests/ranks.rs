//! Operations that come after others, on two ranks that are threads.

use std::sync::{Arc, Barrier};
use std::time::Duration;

use super::*;
use crate::comm::Traffic;

/// Long enough for an operation that may start to be done, were there nothing to hold it back.
const LONG_ENOUGH: Duration = Duration::from_millis(100);

/// Runs `body` on both ranks, with a barrier that both can meet at.
fn on_two_ranks(body: impl Fn(&Comm, &Barrier) + Copy + Send + 'static) {
    let barrier = Arc::new(Barrier::new(2));
    let start = |comm: Comm| {
        let barrier = Arc::clone(&barrier);
        std::thread::spawn(move || {
            body(&comm, &barrier);
            comm.finish().unwrap();
        })
    };
    let threads: Vec<_> = Comm::threads(2).unwrap().into_iter().map(start).collect();
    for thread in threads {
        thread.join().unwrap();
    }
}

fn end_of(traffic: &Traffic) -> std::time::Instant {
    // The clock has nanoseconds, the fraction rounds to less than one at this length.
    traffic.begun.unwrap() + Duration::from_secs_f64(traffic.busy_seconds)
}

/// `later` began when `earlier` had ended: the wait is not part of what it was busy.
fn assert_follows(later: &Traffic, earlier: &Traffic) {
    let slack = Duration::from_micros(1);
    assert!(later.begun.unwrap() + slack >= end_of(earlier));
}

#[test]
fn an_operation_starts_when_the_one_it_comes_after_has_ended() {
    on_two_ranks(|comm, barrier| {
        let (slow, chained) = (comm.lane(&[0, 1]).unwrap(), comm.lane(&[0, 1]).unwrap());
        let one = || Tensor::from_slice(&[1f32]);
        if comm.rank() == 1 {
            // Ranks need not chain alike: this one is ready for the second before the first.
            let second = chained.all_reduce(one());
            let third = chained.all_reduce(one());
            barrier.wait();
            for ticket in [slow.all_reduce(one()), second, third] {
                assert_eq!(floats(&ticket.wait().unwrap().0), [2.0]);
            }
            return;
        }
        let first = slow.all_reduce(one());
        let second = chained.after(&first).all_reduce(one());
        // Not chained itself, but behind one that is.
        let third = chained.all_reduce(one());
        std::thread::sleep(LONG_ENOUGH);
        assert!(!first.is_ready() && !second.is_ready() && !third.is_ready());
        barrier.wait();
        let (third, third_traffic) = third.wait().unwrap();
        assert!(first.is_ready() && second.is_ready());
        let (second, second_traffic) = second.wait().unwrap();
        let (_, first_traffic) = first.wait().unwrap();
        assert_eq!((floats(&second), floats(&third)), (vec![2.0], vec![2.0]));
        assert!(first_traffic.busy_seconds >= LONG_ENOUGH.as_secs_f64() * 0.9);
        assert_follows(&second_traffic, &first_traffic);
        assert_follows(&third_traffic, &second_traffic);
    });
}

#[test]
fn a_handle_waits_for_all_its_tickets_even_when_they_are_gone() {
    on_two_ranks(|comm, barrier| {
        let lanes: Vec<_> = (0..3).map(|_| comm.lane(&[0, 1]).unwrap()).collect();
        let one = || Tensor::from_slice(&[1f32]);
        if comm.rank() == 1 {
            let last = lanes[2].all_reduce(one());
            let _ = lanes[0].all_reduce(one()).wait().unwrap();
            barrier.wait();
            drop(lanes[1].all_reduce(one()));
            let _ = last.wait().unwrap();
            return;
        }
        let (done, dropped) = (lanes[0].all_reduce(one()), lanes[1].all_reduce(one()));
        let handle = lanes[2].after(&done).after(&dropped);
        drop(dropped);
        let _ = done.wait().unwrap();
        let last = handle.all_reduce(one());
        std::thread::sleep(LONG_ENOUGH);
        assert!(!last.is_ready());
        barrier.wait();
        assert_eq!(floats(&last.wait().unwrap().0), [2.0]);
    });
}

#[test]
fn reduce_scatter_and_all_reduce_chain_over_the_same_memory() {
    on_two_ranks(|comm, barrier| {
        let (shard, replica) = (comm.lane(&[0, 1]).unwrap(), comm.lane(&[0, 1]).unwrap());
        for round in 0..50 {
            let slice = 1 + round * 997;
            let buffer = Tensor::ones([2 * slice], (Kind::Float, Device::Cpu));
            let own = buffer.narrow(0, comm.rank() as i64 * slice, slice);
            if comm.rank() as i64 == round % 2 {
                barrier.wait();
            }
            let scattered = shard.reduce_scatter(buffer, Wire::F32);
            let reduced = replica.after(&scattered).all_reduce(own);
            drop(scattered);
            if comm.rank() as i64 != round % 2 {
                barrier.wait();
            }
            let (sum, _) = reduced.wait().unwrap();
            assert!(floats(&sum).iter().all(|&x| x == 4.0), "{slice}");
        }
    });
}

#[test]
fn a_failure_reaches_what_comes_after_it_and_no_other_lane() {
    on_two_ranks(|comm, _| {
        let lanes: Vec<_> = (0..3).map(|_| comm.lane(&[0, 1]).unwrap()).collect();
        let length = 3 + comm.rank() as i64;
        let uneven = Tensor::zeros([2 * length], (Kind::Float, Device::Cpu));
        let broken = lanes[0].all_gather(uneven);
        let one = || Tensor::from_slice(&[1f32]);
        let missed = lanes[1].after(&broken).all_reduce(one());
        let behind = lanes[1].all_reduce(one());
        assert!(matches!(broken.wait(), Err(Error::Failed { .. })));
        let error = missed.wait().unwrap_err();
        assert!(matches!(error, Error::Dependency { .. }));
        let text = error.to_string();
        let start = "all-reduce on lane 1 (ranks 0, 1) was not run, because what it comes after \
                     failed: all-gather on lane 0 (ranks 0, 1) failed with rank ";
        assert!(text.starts_with(start), "{text}");
        assert!(matches!(behind.wait(), Err(Error::Poisoned { .. })));
        let later = lanes[1].all_reduce(one()).wait();
        assert!(matches!(later, Err(Error::Poisoned { .. })));
        assert_eq!(floats(&lanes[2].all_reduce(one()).wait().unwrap().0), [2.0]);
    });
}

#[test]
fn a_lane_of_one_rank_keeps_its_order_behind_a_ticket_under_way() {
    on_two_ranks(|comm, barrier| {
        let (both, own) = (
            comm.lane(&[0, 1]).unwrap(),
            comm.lane(&[comm.rank()]).unwrap(),
        );
        let data = Tensor::from_slice(&[1f32, 2.0]);
        if comm.rank() == 1 {
            barrier.wait();
            let _ = both.all_reduce(data).wait().unwrap();
            return;
        }
        let into = Tensor::from_slice(&[7f32, 7.0]);
        let copy = |lane: &Lane, add| {
            lane.reduce_scatter_into(data.shallow_clone(), Wire::F32, into.shallow_clone(), add)
        };
        assert!(copy(&own, false).is_ready());
        let sum = both.all_reduce(data.shallow_clone());
        // Reads what the all-reduce writes.
        let first = copy(&own.after(&sum), true);
        let second = copy(&own, true);
        std::thread::sleep(LONG_ENOUGH);
        assert!(!first.is_ready() && !second.is_ready());
        barrier.wait();
        let (_, second) = second.wait().unwrap();
        assert_follows(&first.wait().unwrap().1, &sum.wait().unwrap().1);
        assert!(second.busy_seconds < LONG_ENOUGH.as_secs_f64());
        // 1 + 2 + 2 and 2 + 4 + 4.
        assert_eq!(floats(&into), [5.0, 10.0]);
        let _ = copy(&own, false).wait().unwrap();
        assert_eq!(floats(&into), [2.0, 4.0]);
    });
}
