//! What the tests of all ops share: reproducible inputs, fp64 gradients, error measures, and the paths
//! that an op has: the CPU's, and the kernels of GPUs, emulated or on a device.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::cell::Cell;

use tch::{Device, Kind, Tensor};

use crate::cuda::{Numerics, emulated, prepare, with_schedule};
use crate::product::{Engine, with_engine};
use crate::simd::{Level, with_level};
use crate::sys::operands::as_slice;
use crate::{Threads, Workspace, philox};

/// Orders in which the threads of emulated blocks are taken: as numbered, backwards, at random.
const SCHEDULES: [u64; 3] = [0, 1, 20_261];

thread_local! {
    static DEVICE: Cell<Device> = const { Cell::new(Device::Cpu) };
}

/// Where the tensors of a test lie.
pub fn device() -> Device {
    DEVICE.get()
}

/// An empty workspace where the tensors of a test lie.
pub fn workspace() -> Workspace {
    Workspace::new(device())
}

/// Runs a test on the CPU and with the kernels of GPUs, as [`on_gpu`] does.
pub fn everywhere(test: impl Fn()) {
    if !on_a_device(&test) {
        test();
        emulated(&test);
    }
}

/// Runs a test with the kernels of GPUs: emulated, or on the first device where
/// `OXITRON_TEST_DEVICE=cuda` asks for it.
pub fn on_gpu(test: impl Fn()) {
    if !on_a_device(&test) {
        emulated(&test);
    }
}

/// Runs a test of an op whose kernels cannot be emulated: on the CPU, or on the first device where that
/// is asked for.
pub fn here(test: impl Fn()) {
    if !on_a_device(&test) {
        test();
    }
}

/// Runs a test of products with each engine of the CPU, and with the kernels of GPUs.
pub fn whoever_multiplies(test: impl Fn()) {
    if !on_a_device(&test) {
        for engine in Engine::ALL {
            with_engine(engine, &test);
        }
        emulated(&test);
    }
}

fn on_a_device(test: impl Fn()) -> bool {
    let asked = std::env::var("OXITRON_TEST_DEVICE").is_ok_and(|device| device == "cuda");
    if asked {
        // Before the first tensor: libtorch decides at the first question whether there is CUDA.
        prepare(0, Numerics::default()).unwrap();
        DEVICE.set(Device::Cuda(0));
        test();
        DEVICE.set(Device::Cpu);
    }
    asked
}

/// Numbers where the tensors of a test lie.
pub fn numbers<E: tch::kind::Element>(values: &[E]) -> Tensor {
    Tensor::from_slice(values).to_device(device())
}

/// Asserts that kernels of GPUs give the same bits twice, in whatever order their threads run.
pub fn assert_order_independent(f: impl Fn() -> Vec<u32>) {
    on_gpu(|| {
        let expected = f();
        for schedule in SCHEDULES {
            let found = with_schedule(schedule, &f);
            assert!(found == expected, "other bits under schedule {schedule}");
        }
    });
}

/// The two compute dtypes with the relative error that each is held to.
pub const DTYPES: [(Kind, f64); 2] = [(Kind::Float, 1e-5), (Kind::BFloat16, 1e-2)];

/// Standard normal numbers that depend on the name and shape alone.
pub fn normal(name: &str, shape: &[i64], kind: Kind) -> Tensor {
    let mut values = vec![0.0; shape.iter().product::<i64>() as usize];
    philox::fill_normal(&mut values, 7, name, 0, 1.0);
    Tensor::from_slice(&values)
        .view(shape)
        .to_kind(kind)
        .to_device(device())
}

pub fn zeros(shape: &[i64], kind: Kind) -> Tensor {
    Tensor::zeros(shape, (kind, device()))
}

/// A tensor whose old contents would be noticed if an op failed to overwrite them.
pub fn poison(shape: &[i64], kind: Kind) -> Tensor {
    Tensor::full(shape, f64::NAN, (kind, device()))
}

/// An fp64 copy that autograd differentiates.
pub fn leaf(x: &Tensor) -> Tensor {
    x.to_kind(Kind::Double).set_requires_grad(true)
}

/// Gradients of `Σ output · seed` for the leaves, in fp64.
pub fn gradients(output: &Tensor, seed: &Tensor, leaves: &[&Tensor]) -> Vec<Tensor> {
    let scalar = (output * seed.to_kind(Kind::Double)).sum(Kind::Double);
    Tensor::run_backward(&[scalar], leaves, false, false)
}

/// `‖actual − expected‖ / ‖expected‖` in fp64; NaN anywhere is an infinite error.
pub fn relative(actual: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(actual.size(), expected.size());
    let expected = expected.detach().to_kind(Kind::Double);
    let difference = actual.detach().to_kind(Kind::Double) - &expected;
    let error = (difference.norm() / expected.norm()).double_value(&[]);
    if error.is_nan() { f64::INFINITY } else { error }
}

#[track_caller]
pub fn assert_close(what: &str, actual: &Tensor, expected: &Tensor, bound: f64) {
    let error = relative(actual, expected);
    assert!(
        error <= bound,
        "{what}: relative error {error:.2e} above {bound:.0e}"
    );
}

/// The exact bits of a contiguous fp32 or bf16 tensor.
pub fn bits(x: &Tensor) -> Vec<u32> {
    let wide = x.to_kind(Kind::Float).contiguous().to_device(Device::Cpu);
    as_slice::<f32>(&wide)
        .unwrap()
        .iter()
        .map(|value| value.to_bits())
        .collect()
}

/// Runs on a new thread whose compute uses `count` threads.
pub fn on_threads<R: Send + 'static>(count: usize, f: impl FnOnce() -> R + Send + 'static) -> R {
    std::thread::spawn(move || {
        Threads::set(count).unwrap();
        f()
    })
    .join()
    .unwrap()
}

/// Asserts that `f` gives the same bits twice and on 1, 2, 3 and 5 threads.
pub fn assert_thread_independent(f: impl Fn() -> Vec<u32> + Copy + Send + 'static) {
    let expected = on_threads(1, f);
    for count in [1, 2, 3, 5] {
        assert!(
            on_threads(count, f) == expected,
            "other bits on {count} threads"
        );
    }
}

/// As [`assert_thread_independent`], and the same bits at every instruction level: for the loops
/// that the macro `simd!` compiles.
pub fn assert_level_independent(f: impl Fn() -> Vec<u32> + Copy + Send + 'static) {
    assert_thread_independent(f);
    let expected = f();
    for level in Level::ALL {
        assert!(with_level(level, f) == expected, "other bits at {level:?}");
    }
}

/// `n` numbers in -1..1, given by a name.
pub fn uniform(name: &str, n: usize) -> Vec<f32> {
    let mut state = name.bytes().fold(0x9e37_79b9_7f4a_7c15u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    let mut next = || {
        // splitmix64
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) >> 40
    };
    (0..n)
        .map(|_| next() as f32 / (1u64 << 23) as f32 - 1.0)
        .collect()
}
