//! Two hundred steps in bf16 beside the same steps in fp32.

use oxitron_kernels::Threads;

use super::runner::{Runner, Setting, Sharding, Weights};
use super::samples;
use crate::comm::Comm;
use crate::config::{Dtype, ModelConfig, Recompute};
use crate::plan::{Home, StepShape};
use crate::testing::golden::{self, Golden};

const STEPS: usize = 200;
/// Samples of a step, tokens of a sample.
const BATCH: [usize; 2] = [4, 128];
const LR: f64 = 3e-3;
const WARM_UP: f64 = 20.0;

/// The model of the long golden cases, made narrower.
fn model() -> ModelConfig {
    let golden = Golden::open("gradients");
    let (model, ..) = golden::model(&golden.facts["cases"]["long_1024"]["model"]);
    ModelConfig {
        vocab_size: 512,
        hidden_size: 128,
        intermediate_size: 352,
        head_dim: 32,
        ..model
    }
}

/// The loss of every step; both precisions start from the same fp32 weights and see the same
/// tokens.
fn losses(dtype: Dtype) -> Vec<f64> {
    // Other tests run beside this one; threads that wait for each other's cores would only spin.
    Threads::set(1).unwrap();
    let model = model();
    let [count, seq_len] = BATCH;
    let setting = Setting {
        model: &model,
        device: tch::Device::Cpu,
        rope_base: model.rope_base,
        dtype,
        moments: Dtype::Fp32,
        home: Home::Device,
        weights: Weights::Seed(7),
        shape: StepShape {
            accumulation: 1,
            overlap: true,
            recompute: Recompute::None,
            prefetch_units: 1,
        },
        sharding: Sharding::zero_1(1),
        tokens: count * seq_len,
        clip_norm: 1.0,
    };
    let mut runner = Runner::new(setting, &Comm::solo());
    let all = samples::samples("precision", [STEPS * count, seq_len], model.vocab_size, 200);
    all.chunks(count)
        .enumerate()
        .map(|(step, some)| {
            let rate = LR * ((step + 1) as f64 / WARM_UP).min(1.0);
            let report = runner.step(&[samples::batch(some)], rate);
            report.record.mean_loss
        })
        .collect()
}

/// Step by step, without smoothing: the noise of the data is the same in both runs. An error that
/// always points one way would show in the last steps together, where single steps' errors cancel.
#[test]
fn two_hundred_steps_in_bf16_follow_those_in_fp32() {
    let (wide, narrow) = (losses(Dtype::Fp32), losses(Dtype::Bf16));
    assert_eq!((wide.len(), narrow.len()), (STEPS, STEPS));
    let last = |losses: &[f64]| losses[STEPS - 20..].iter().sum::<f64>() / 20.0;
    let learnt = last(&wide) / wide[0];
    let apart: Vec<f64> = (wide.iter().zip(&narrow))
        .map(|(wide, narrow)| (narrow / wide - 1.0).abs())
        .collect();
    let worst = apart.iter().copied().fold(0.0, f64::max);
    let at_last = last(&narrow) / last(&wide) - 1.0;
    println!(
        "fp32 loss {:.3} -> {:.3}; bf16 apart by {worst:.1e} at most, {at_last:.1e} in the last 20",
        wide[0],
        last(&wide),
    );
    assert!(learnt < 0.5, "the loss falls to {learnt:.2} of the first");
    for (step, apart) in apart.iter().enumerate() {
        assert!(*apart <= 1e-2, "step {step}: losses are {apart:e} apart");
    }
    assert!(at_last.abs() <= 2e-3, "the last 20 are {at_last:e} apart");
}
