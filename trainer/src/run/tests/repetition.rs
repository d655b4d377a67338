//! The same steps twice: the same bits.

use oxitron_kernels::cuda::{Numerics, emulated};
use tch::Device;

use super::runner::{Runner, Setting, Sharding, Weights, staged};
use crate::comm::Comm;
use crate::config::{Dtype, Recompute};
use crate::plan::{Home, StepShape};
use crate::testing;
use crate::testing::golden::{self, Golden};

const STEPS: usize = 4;

/// On the processor, or on a GPU where one is asked for, as `run.deterministic` has it.
#[test]
fn steps_repeat_themselves_to_the_bit() {
    let numerics = Numerics {
        deterministic: true,
        ..Numerics::default()
    };
    repeat(testing::device(numerics));
}

#[test]
fn steps_on_emulated_kernels_of_gpus_repeat_themselves_to_the_bit() {
    emulated(|| repeat(Device::Cpu));
}

fn repeat(device: Device) {
    for dtype in [Dtype::Bf16, Dtype::Fp32] {
        for recompute in Recompute::ALL {
            let first = train(device, dtype, recompute);
            assert!(
                train(device, dtype, recompute) == first,
                "{dtype:?}, recompute {recompute:?}: other bits the second time"
            );
        }
    }
}

/// Losses and norms of every step, then master weights and moments, as bits.
fn train(device: Device, dtype: Dtype, recompute: Recompute) -> Vec<u64> {
    let golden = Golden::open("train20");
    let facts = &golden.facts["cases"]["tied"];
    let (model, rope_base, scales) = golden::model(&facts["model"]);
    let micro_batches = golden.batches_on(device, "");
    let setting = Setting {
        model: &model,
        device,
        rope_base,
        dtype,
        moments: dtype,
        home: Home::Device,
        weights: Weights::CounterHash(scales),
        shape: StepShape {
            accumulation: 2,
            overlap: true,
            recompute,
            prefetch_units: 1,
        },
        sharding: Sharding::zero_1(1),
        tokens: micro_batches[0].token_count(),
        clip_norm: 1.0,
    };
    let mut runner = Runner::new(setting, &Comm::solo());
    let mut bits = Vec::new();
    for batches in micro_batches.chunks(2).take(STEPS) {
        let record = runner.step(batches, 1e-3).record;
        assert!(record.mean_loss.is_finite());
        bits.extend([record.mean_loss.to_bits(), record.grad_norm.to_bits()]);
    }
    for (_, values) in staged(&mut runner.zero) {
        bits.extend(values.iter().map(|value| u64::from(value.to_bits())));
    }
    bits
}
