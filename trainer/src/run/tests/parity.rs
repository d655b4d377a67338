//! Twenty steps of AdamW against a Hugging Face LLaMA under PyTorch.

use oxitron_kernels::cuda::{Numerics, emulated};
use tch::Device;

use super::runner::{Runner, Setting, Sharding, Weights, assemble, staged};
use crate::comm::Comm;
use crate::config::{Dtype, Recompute};
use crate::plan::{Home, StepShape};
use crate::testing;
use crate::testing::counter_hash::projection;
use crate::testing::golden::{self, Golden, numbers};

/// What two correct implementations differ by is 1e-7; a wrong one by 3e-5 at least (see
/// `tests/golden/README.md`).
const BOUND: f64 = 1e-5;

/// On the processor, or on a GPU where one is asked for.
#[test]
fn twenty_steps_follow_pytorch() {
    follow_pytorch(testing::device(Numerics::default()));
}

/// Every op but attention and products goes through the kernels of GPUs, launched as on one.
#[test]
fn twenty_steps_on_emulated_kernels_of_gpus_follow_pytorch() {
    emulated(|| follow_pytorch(Device::Cpu));
}

fn follow_pytorch(device: Device) {
    let golden = Golden::open("train20");
    let micro_batches = golden.batches_on(device, "");
    for case in ["untied", "tied"] {
        let facts = &golden.facts["cases"][case];
        let (model, rope_base, scales) = golden::model(&facts["model"]);
        let setting = Setting {
            model: &model,
            device,
            rope_base,
            dtype: Dtype::Fp32,
            moments: Dtype::Fp32,
            home: Home::Device,
            weights: Weights::CounterHash(scales),
            shape: StepShape {
                accumulation: 2,
                overlap: true,
                recompute: Recompute::None,
                prefetch_units: 1,
            },
            sharding: Sharding::zero_1(1),
            tokens: micro_batches[0].token_count(),
            clip_norm: facts["clip_norm"].as_f64().unwrap(),
        };
        let mut runner = Runner::new(setting, &Comm::solo());
        let rates = numbers(&golden.facts["learning_rate"]);
        let (losses, norms) = (numbers(&facts["loss"]), numbers(&facts["grad_norm"]));
        let mut worst = (0f64, 0f64);
        for (step, batches) in micro_batches.chunks(2).enumerate() {
            let report = runner.step(batches, rates[step]);
            let loss = (report.record.mean_loss / losses[step] - 1.0).abs();
            let norm = (report.record.grad_norm / norms[step] - 1.0).abs();
            assert!(loss < BOUND, "{case} step {step}: loss differs by {loss:e}");
            assert!(
                norm < BOUND,
                "{case} step {step}: gradient norm differs by {norm:e}"
            );
            worst = (worst.0.max(loss), worst.1.max(norm));
        }
        println!(
            "{case}: losses within {:.1e}, gradient norms within {:.1e}",
            worst.0, worst.1
        );

        let weights = assemble(staged(&mut runner.zero));
        for (name, expected) in facts["weights"].as_object().unwrap() {
            let change = expected["change_norm"].as_f64().unwrap();
            for (which, expected) in numbers(&expected["projections"]).into_iter().enumerate() {
                let error = (projection(name, which, &weights[name]) - expected).abs() / change;
                assert!(
                    error < 1e-3,
                    "{case} {name}: off by {error:e} of its change"
                );
            }
        }
    }
}
