//! What the tests of several rooms share: golden references and models small enough to check.

#[path = "../../../tests/support/counter_hash.rs"]
pub mod counter_hash;
pub mod golden;
pub mod tiny;

use oxitron_kernels::cuda::{Numerics, prepare};
use tch::Device;

/// Where tests that concern a GPU compute: on the processor, or on the first GPU where
/// `OXITRON_TEST_DEVICE=cuda` asks for it, as the tests of the kernels do.
///
/// To be called before the first tensor: libtorch decides at the first question whether there is
/// CUDA.
pub fn device(numerics: Numerics) -> Device {
    if std::env::var("OXITRON_TEST_DEVICE").is_ok_and(|device| device == "cuda") {
        let name = prepare(0, numerics).unwrap();
        println!("on {name}");
        return Device::Cuda(0);
    }
    Device::Cpu
}
