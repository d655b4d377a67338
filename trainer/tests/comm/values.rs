//! What ranks put in and must get back.
//!
//! Inputs come from a hash of (rank, element), so each rank can compute what it must receive, bit
//! for bit, without asking the others.

use std::cell::Cell;

use half::bf16;
use oxitron_trainer::comm::{Lane, Traffic, Wire};
use tch::{Device, Tensor};

thread_local! {
    static DEVICE: Cell<Device> = const { Cell::new(Device::Cpu) };
}

/// Puts the tensors of this thread's rank on `device` from here on.
pub fn work_on(device: Device) {
    DEVICE.set(device);
}

/// `tensor` where this thread's rank works.
pub fn here(tensor: Tensor) -> Tensor {
    tensor.to_device(DEVICE.get())
}

/// Whether an operation on `lane` says that it ran. A GPU says so later.
pub fn has_run(traffic: &Traffic) -> bool {
    traffic.begun.is_some() || traffic.on_gpu.is_some()
}

/// A 64-bit mix (SplitMix64's finaliser).
pub fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// Element `index` of the input of the rank at lane index `member`; magnitudes differ so much that
/// another order of addition gives other bits.
pub fn element(seed: u64, member: usize, index: usize) -> f32 {
    let bits = mix(seed ^ mix(((member as u64) << 40) + index as u64 + 1));
    let mantissa = (bits >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
    mantissa * (1u32 << (bits & 15)) as f32
}

/// The first `length` elements of that rank's input, f32.
pub fn input(seed: u64, member: usize, length: usize) -> Tensor {
    let values: Vec<f32> = (0..length)
        .map(|index| element(seed, member, index))
        .collect();
    here(Tensor::from_slice(&values))
}

/// The sum over `size` members in order, each contribution through `value`.
pub fn expected_sum(seed: u64, size: usize, index: usize, value: impl Fn(f32) -> f32) -> f32 {
    let mut sum = value(element(seed, 0, index));
    for member in 1..size {
        sum += value(element(seed, member, index));
    }
    sum
}

/// The elements of `tensor` (f32), whatever its shape.
pub fn floats(tensor: &Tensor) -> Vec<f32> {
    Vec::<f32>::try_from(&tensor.to_device(Device::Cpu).flatten(0, -1)).unwrap()
}

/// Compares all of `found` bit for bit; `what` says where it comes from.
pub fn assert_bits(found: &[f32], expected: impl Iterator<Item = f32>, what: &str) {
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

/// A contribution as it counts in a sum on `lane`.
pub fn on_the_wire(lane: &Lane, wire: Wire) -> fn(f32) -> f32 {
    match wire {
        Wire::Bf16 if lane.size() > 1 => |x| bf16::from_f32(x).to_f32(),
        _ => |x| x,
    }
}

/// The bytes that a rank of `lane` sends in a reduce-scatter of slices of `slice` elements.
pub fn scattered_bytes(lane: &Lane, slice: usize, wire: Wire) -> u64 {
    let width = if wire == Wire::Bf16 { 2 } else { 4 };
    ((lane.size() - 1) * slice * width) as u64
}

/// Numbers that look random, the same for the same seed.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(mix(seed))
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 = mix(self.0.wrapping_add(0x9e37_79b9_7f4a_7c15));
        (self.0 % bound as u64) as usize
    }

    /// True once in `times`.
    pub fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }
}
