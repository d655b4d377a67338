#![allow(clippy::unwrap_used)]

//! Lanes of one rank, and what every lane refuses.

mod ranks;

use tch::{Device, Kind};

use super::super::{Comm, Error};
use super::*;

fn floats(tensor: &Tensor) -> Vec<f32> {
    Vec::<f32>::try_from(tensor).unwrap()
}

#[test]
fn arguments_that_do_not_fit_are_refused_without_harm_to_the_lane() {
    let lane = Comm::solo().lane(&[0]).unwrap();
    let wrong = lane.reduce_scatter(Tensor::zeros([4], (Kind::Double, Device::Cpu)), Wire::F32);
    let error = wrong.wait().unwrap_err().to_string();
    assert!(
        error.contains("reduce-scatter on lane 0 (ranks 0)"),
        "{error}"
    );
    assert!(error.contains("[F32], found F64"), "{error}");
    let itself = lane.send(Tensor::zeros([4], (Kind::Float, Device::Cpu)), 0);
    assert!(
        itself
            .wait()
            .unwrap_err()
            .to_string()
            .contains("another of its 1 ranks")
    );
    let tensor = Tensor::from_slice(&[1.5f32, 2.5]);
    let (tensor, traffic) = lane.reduce_scatter(tensor, Wire::Bf16).wait().unwrap();
    assert_eq!(floats(&tensor), [1.5, 2.5]);
    assert_eq!((traffic.bytes_sent, traffic.begun), (0, None));
}

#[test]
fn a_target_that_does_not_fit_is_refused_by_name() {
    let lane = Comm::solo().lane(&[0]).unwrap();
    let buffer = Tensor::zeros([6], (Kind::Float, Device::Cpu));
    let refused = |into: Tensor| {
        let ticket = lane.reduce_scatter_into(buffer.shallow_clone(), Wire::F32, into, true);
        ticket.wait().unwrap_err().to_string()
    };
    let error = refused(Tensor::zeros([5], (Kind::Float, Device::Cpu)));
    let expected = "reduce-scatter-into on lane 0 (ranks 0): expected a target of the 6 elements";
    assert!(error.starts_with(expected), "{error}");
    let error = refused(Tensor::zeros([6], (Kind::Double, Device::Cpu)));
    assert!(error.contains("the target: expected elements"), "{error}");
    let error = refused(Tensor::zeros([6, 2], (Kind::Float, Device::Cpu)).select(1, 0));
    assert!(
        error.contains("the target: expected a contiguous"),
        "{error}"
    );
    let error = refused(buffer.narrow(0, 0, 6));
    assert!(error.contains("shares memory"), "{error}");
}

#[test]
fn alone_the_target_is_written_or_added_to_and_the_buffer_stays() {
    let lane = Comm::solo().lane(&[0]).unwrap();
    // Not bf16 values, and more than a block of the summation.
    let values: Vec<f32> = (0..3001).map(|i| 0.1 + i as f32).collect();
    let into = Tensor::zeros([3001], (Kind::Float, Device::Cpu));
    let mut buffer = Tensor::from_slice(&values);
    for (accumulate, times) in [(false, 1), (true, 2), (true, 3), (false, 1)] {
        let kept = into.shallow_clone();
        let ticket = lane.reduce_scatter_into(buffer, Wire::Bf16, kept, accumulate);
        assert!(ticket.is_ready());
        let (back, traffic) = ticket.wait().unwrap();
        assert_eq!(floats(&back), values);
        assert_eq!(traffic.bytes_sent, 0);
        assert!(traffic.begun.is_some());
        let expected = values.iter().map(|&x| (1..times).fold(x, |sum, _| sum + x));
        assert!(floats(&into).into_iter().eq(expected), "{times} times");
        buffer = back;
    }
}

#[test]
fn alone_what_comes_after_a_failure_is_not_run_and_poisons_the_lane() {
    let comm = Comm::solo();
    let (first, second) = (comm.lane(&[0]).unwrap(), comm.lane(&[0]).unwrap());
    assert_eq!((first.id(), second.id()), (0, 1));
    let good = first.all_gather(Tensor::from_slice(&[1f32]));
    let chained = second.after(&good).all_gather(Tensor::from_slice(&[2f32]));
    assert!(chained.is_ready());
    let (kept, _) = chained.wait().unwrap();
    assert_eq!(floats(&kept), [2.0]);

    let bad = first.broadcast(Tensor::from_slice(&[1f32]), 7);
    let handle = second.after(&good).after(&bad);
    assert!(bad.wait().is_err());
    let error = handle.all_gather(Tensor::from_slice(&[3f32])).wait();
    let error = error.unwrap_err();
    assert!(matches!(error, Error::Dependency { .. }));
    assert_eq!(
        error.to_string(),
        "all-gather on lane 1 (ranks 0) was not run, because what it comes after failed: \
         broadcast on lane 0 (ranks 0): root 7 is not an index of its 1 ranks (ranks count from 0)"
    );
    let error = second.all_gather(Tensor::from_slice(&[4f32])).wait();
    assert!(matches!(error, Err(Error::Poisoned { .. })));
    // The lane of the bad argument is unharmed.
    let _ = first
        .all_gather(Tensor::from_slice(&[5f32]))
        .wait()
        .unwrap();
}

#[test]
fn alone_a_ticket_of_another_world_cannot_be_waited_for() {
    let lane = Comm::solo().lane(&[0]).unwrap();
    let (_promise, foreign) = Promise::new(5, Default::default(), Default::default());
    let ticket = lane.after(&foreign).all_gather(Tensor::from_slice(&[1f32]));
    let error = ticket.wait().unwrap_err().to_string();
    assert!(error.contains("another communicator"), "{error}");
    let _ = lane.all_gather(Tensor::from_slice(&[1f32])).wait().unwrap();
}
