#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::{HashMap, HashSet};

use tch::Device as At;

use super::*;
use crate::cuda::devices;

/// Portions as they pass: by index, which others are over for certain when something of it begins.
#[derive(Default)]
struct Timeline {
    /// What each lane has waited for or done, and what each mark stands for.
    lanes: [HashSet<Done>; 3],
    marks: HashMap<(u8, usize), HashSet<Done>>,
    /// The portion that a buffer holds, and those that held it.
    held: [Vec<usize>; SLOTS],
    /// What was over when each thing began.
    before: HashMap<Done, HashSet<Done>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Done {
    In(usize),
    Work(usize),
    Out(usize),
}

impl Timeline {
    fn pass(&mut self, portion: usize, slot: usize, acts: &[Act]) {
        let key = |mark: Mark| match mark {
            Mark::Arrived(slot) => (0, slot),
            Mark::Worked(slot) => (1, slot),
            Mark::Left(slot) => (2, slot),
        };
        for &act in acts {
            match act {
                Act::Wait(lane, mark) => {
                    let known = self.marks.get(&key(mark)).cloned().unwrap_or_default();
                    self.lanes[lane as usize].extend(known);
                }
                Act::Put(lane, mark) => {
                    let known = self.lanes[lane as usize].clone();
                    self.marks.insert(key(mark), known);
                }
                Act::CopyIn => self.begin(Lane::Inward, Done::In(portion)),
                Act::Work => self.begin(Lane::Compute, Done::Work(portion)),
                Act::CopyOut => self.begin(Lane::Outward, Done::Out(portion)),
            }
        }
        self.held[slot].push(portion);
    }

    fn begin(&mut self, lane: Lane, what: Done) {
        let lane = &mut self.lanes[lane as usize];
        self.before.insert(what, lane.clone());
        lane.insert(what);
    }
}

/// Host ranges of portions by number, some of which lie on top of the one before.
fn follows(index: usize, seed: usize) -> bool {
    index > 0 && (index * 2_654_435_761 + seed * 40_503) % 7 < 2
}

#[test]
fn buffers_and_host_memory_are_free_when_a_copy_takes_them() {
    for seed in 0..40 {
        let mut timeline = Timeline::default();
        let ways: Vec<Way> = (0..30)
            .map(|index| match (index * 37 + seed * 11) % 5 {
                0 => Way::In,
                _ => Way::InAndOut,
            })
            .collect();
        for (portion, &way) in ways.iter().enumerate() {
            let slot = portion % SLOTS;
            timeline.pass(portion, slot, &acts(slot, way, follows(portion, seed)));
        }
        let over = |what: Done, before: Done| timeline.before[&what].contains(&before);
        for (portion, &way) in ways.iter().enumerate() {
            assert!(over(Done::Work(portion), Done::In(portion)));
            if way == Way::InAndOut {
                assert!(over(Done::Out(portion), Done::Work(portion)));
            }
            if portion >= SLOTS {
                let held = portion - SLOTS;
                assert!(
                    over(Done::In(portion), Done::Work(held)),
                    "the buffer is read"
                );
                if ways[held] == Way::InAndOut {
                    assert!(
                        over(Done::In(portion), Done::Out(held)),
                        "the buffer is copied"
                    );
                }
            }
            // Everything older than the last two is back: a portion may lie where they lay.
            for older in (0..portion.saturating_sub(1)).filter(|&o| ways[o] == Way::InAndOut) {
                assert!(
                    over(Done::In(portion), Done::Out(older)),
                    "{portion} after {older}"
                );
            }
            if follows(portion, seed) && ways[portion - 1] == Way::InAndOut {
                assert!(over(Done::In(portion), Done::Out(portion - 1)));
            } else if portion > 0 {
                // What the whole thing is for: a copy runs beside the kernels before it.
                assert!(!over(Done::In(portion), Done::Work(portion - 1)));
            }
        }
    }
}

/// Doubles portions of host memory and reads them again, through buffers on `device`.
fn doubled(device: At, portion: usize) -> Vec<f32> {
    const N: usize = 1000;
    let values: Vec<f32> = (0..N).map(|index| index as f32).collect();
    let host = Tensor::from_slice(&values);
    let lock = match device {
        At::Cuda(ordinal) => Some(PageLock::new(&host, ordinal).unwrap()),
        _ => None,
    };
    let mut relay = Relay::new(device, portion, &[Kind::Float]).unwrap();
    let mut sum = Tensor::zeros([1], (Kind::Float, device));
    for way in [Way::InAndOut, Way::In] {
        for start in (0..N).step_by(portion) {
            let part = host.narrow(0, start as i64, portion.min(N - start) as i64);
            let work = |parts: &mut [Tensor; 1]| {
                assert_eq!(parts[0].device(), device);
                match way {
                    Way::InAndOut => parts[0].f_mul_scalar_(2.0).map(drop),
                    Way::In => parts[0]
                        .f_sum(Kind::Float)
                        .and_then(|s| sum.f_add_(&s).map(drop)),
                }
                .map_err(torch(OP))
            };
            relay.pass(&mut [part], way, work).unwrap();
        }
    }
    relay.finish().unwrap();
    assert_eq!(sum.double_value(&[0]), (N * (N - 1)) as f64);
    drop((relay, lock));
    Vec::try_from(host).unwrap()
}

#[test]
fn every_portion_passes_once_on_the_processor() {
    let expected: Vec<f32> = (0..1000).map(|index| 2.0 * index as f32).collect();
    // One portion alone lies where the one before it lay.
    for portion in [1, 64, 333, 999, 1000] {
        assert_eq!(doubled(At::Cpu, portion), expected, "{portion}");
    }
}

#[test]
fn every_portion_passes_once_on_a_gpu() {
    if !devices().is_ok_and(|devices| !devices.is_empty()) {
        println!("skipped: this machine has no GPU");
        return;
    }
    let expected: Vec<f32> = (0..1000).map(|index| 2.0 * index as f32).collect();
    for portion in [1, 64, 333, 999, 1000] {
        assert_eq!(doubled(At::Cuda(0), portion), expected, "{portion}");
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    fn refused<const N: usize>(relay: &mut Relay, mut host: [Tensor; N]) -> String {
        let work = |_: &mut [Tensor; N]| panic!("worked on");
        let error = relay.pass(&mut host, Way::In, work).unwrap_err();
        error.to_string()
    }
    let mut relay = Relay::new(At::Cpu, 8, &[Kind::Float]).unwrap();
    let host = |n: i64, kind: Kind| Tensor::zeros([n], (kind, At::Cpu));
    let text = refused(&mut relay, [host(9, Kind::Float)]);
    assert!(text.contains("expected up to 8 elements"), "{text}");
    let text = refused(&mut relay, [host(8, Kind::BFloat16)]);
    assert!(text.contains("BFloat16"), "{text}");
    let text = refused(&mut relay, [host(1, Kind::Float), host(1, Kind::Float)]);
    assert!(text.contains("2 parts, expected up to 1"), "{text}");
}

#[test]
fn without_a_gpu_nothing_can_be_locked() {
    if devices().is_ok_and(|devices| !devices.is_empty()) {
        println!("skipped: this machine has a GPU");
        return;
    }
    let memory = Tensor::zeros([4], (Kind::Float, At::Cpu));
    println!("{}", PageLock::new(&memory, 0).unwrap_err());
}
