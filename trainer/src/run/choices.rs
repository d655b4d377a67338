//! What a run chooses by its machine: written into every manifest, and compared on resume.
//!
//! The dtype is kept, since it decides what the run computes; so is the engine of products where it
//! is not known which one is faster. Which instructions compute it, which engine where that is
//! known, which of libtorch's kernels attend on a GPU, and which NCCL adds between GPUs, follow the
//! machine: the loss curve is the same up to rounding, its bits are not, so a change is an event.

use std::collections::BTreeMap;
use std::time::Duration;

use oxitron_kernels::linear::WeightGradient;
use oxitron_kernels::product::{Engine, Trial};
use oxitron_kernels::simd::{self, Level};
use oxitron_kernels::{attention, cuda, probe};
use serde_json::Value;
use tch::{Device, Kind};

use super::origin::Origin;
use super::plan::{RunPlan, dtype_name, dtype_of_this_machine, kind};
use super::ranks::Ranks;
use super::{RunError, trainer::Trainer};
use crate::config::{Config, Dtype};
use crate::metrics::Event;
use crate::plan::{Unit, Units};

/// Names of the choices in a manifest.
const DTYPE: &str = "dtype";
const DEVICE: &str = "device";
const GPU: &str = "gpu";
const ATTENTION: &str = "attention";
const NCCL: &str = "nccl";
const SIMD: &str = "simd";
const PRODUCTS: &str = "products";
const WEIGHT_GRADIENTS: &str = "weight_gradients";

/// Rows of the products that are measured, at most: more than a cache holds, and soon done.
const TRIAL_ROWS: usize = 2048;

/// The choices of a run that computes in `dtype` on `device`, with attention heads of `head_dim`
/// elements, and gradients that version `nccl` of NCCL carries.
fn choices(
    device: Device,
    dtype: Dtype,
    head_dim: usize,
    nccl: Option<String>,
) -> Result<BTreeMap<String, Value>, RunError> {
    let mut choices = vec![(DTYPE, dtype_name(dtype).to_owned())];
    if let Device::Cuda(ordinal) = device {
        let [whole, packed] = attention::gpu_kernels(kind(dtype), head_dim, ordinal)?;
        let gpu = cuda::devices()?.swap_remove(ordinal);
        choices.extend([
            (DEVICE, "cuda".to_owned()),
            (GPU, format!("{}, {}", gpu.name, gpu.architecture)),
            (ATTENTION, format!("{whole}, packed {packed}")),
        ]);
        choices.extend(nccl.map(|version| (NCCL, version)));
    } else {
        let engine = Engine::of(kind(dtype));
        choices.extend([
            (DEVICE, "cpu".to_owned()),
            (SIMD, simd::level().name().to_owned()),
            (PRODUCTS, engine.name().to_owned()),
        ]);
        if engine == Engine::Libtorch && dtype == Dtype::Bf16 {
            let way = WeightGradient::of_this_machine();
            choices.push((WEIGHT_GRADIENTS, way.name().to_owned()));
        }
    }
    let entries = choices.into_iter();
    Ok(entries
        .map(|(name, value)| (name.to_owned(), value.into()))
        .collect())
}

/// The dtype of weights and activations: what the configuration says; for `auto` what the run began
/// with, or else what the leader's processor does fast. All ranks compute alike.
pub(super) fn choose_dtype(
    config: &Config,
    ranks: &Ranks,
    origin: &Origin,
    device: Device,
) -> Result<Dtype, RunError> {
    let recorded = origin.recorded(DTYPE);
    let [bf16] = ranks.leaders_choice(|| {
        let choose = || match recorded.as_deref() {
            Some("bf16") => Dtype::Bf16,
            Some(_) => Dtype::Fp32,
            None if device.is_cuda() => Dtype::Bf16,
            None => {
                let (dtype, reason) = dtype_of_this_machine();
                tracing::info!("dtype auto: {reason}");
                dtype
            }
        };
        Ok([u64::from(config.model.dtype.resolve(choose) == Dtype::Bf16)])
    })?;
    Ok(if bf16 == 1 { Dtype::Bf16 } else { Dtype::Fp32 })
}

/// Chooses the engine of products where it is not known which one is faster: what the checkpoint
/// names, or else the faster one in a trial on the leader, which a deterministic run goes without. All
/// ranks with such a processor compute alike.
pub(super) fn choose_products(
    config: &Config,
    ranks: &Ranks,
    plan: &RunPlan,
    origin: &Origin,
    dtype: Dtype,
) -> Result<(), RunError> {
    let kind = kind(dtype);
    let stage = &config.stages[0];
    let rows = (stage.micro_batch * stage.seq_len).min(TRIAL_ROWS);
    let [libtorch] = ranks.leaders_choice(|| {
        if kind == Kind::BFloat16 {
            warn_without_tiles();
        }
        let recorded = origin.recorded(PRODUCTS).map(|name| name.parse());
        let recorded = recorded.transpose().unwrap_or_else(|reason: String| {
            tracing::warn!("the checkpoint's choice is not taken: {reason}");
            None
        });
        let engine = match Engine::known(kind).or(recorded) {
            Some(engine) => engine,
            None if config.run.deterministic => Engine::Own,
            None => try_both(kind, rows, &block_weights(&plan.units))?,
        };
        Ok([u64::from(engine == Engine::Libtorch)])
    })?;
    if libtorch == 1 {
        Engine::Libtorch.choose();
    } else {
        Engine::Own.choose();
    }
    Ok(())
}

/// Says why a processor with AMX computes without.
fn warn_without_tiles() {
    if probe::has_amx_bf16() && simd::requested() == Ok(None) && simd::level() < Level::Amx {
        tracing::warn!(
            "the processor has AMX, but the system does not grant it or its products come out wrong: \
             the trainer's own operations use {}",
            simd::level().name()
        );
    }
}

/// The faster engine.
fn try_both(kind: Kind, rows: usize, weights: &[[usize; 2]]) -> Result<Engine, RunError> {
    let trial = Trial::run(kind, rows, weights)?;
    let elements: usize = weights.iter().map(|[o, i]| o * i).sum();
    let rate = |time: Duration| 3.0 * 2.0 * (rows * elements) as f64 / time.as_secs_f64() / 1e9;
    tracing::info!(
        "products of {rows} rows with a layer's weights, forward and backward: {:.0} GFLOP/s by our \
         own engine, {:.0} by libtorch",
        rate(trial.own),
        rate(trial.libtorch)
    );
    Ok(trial.faster())
}

/// The matrices of the unit that has the most of them, a block.
fn block_weights(units: &Units) -> Vec<[usize; 2]> {
    let matrices = |unit: &Unit| -> Vec<[usize; 2]> {
        let shapes = unit.matrices.iter().map(|matrix| matrix.shape());
        shapes.filter_map(|shape| shape.try_into().ok()).collect()
    };
    let units = units.units.iter().map(matrices);
    units.max_by_key(Vec::len).unwrap_or_default()
}

impl Trainer<'_> {
    /// Tells what this machine chooses otherwise than the one that wrote the checkpoint.
    pub(super) fn tell_changed_choices(&mut self, origin: &Origin) -> Result<(), RunError> {
        let mut now = self.choices()?;
        // It follows the configuration, or what the run began with.
        now.remove(DTYPE);
        for (choice, after) in now {
            let after = after.as_str().unwrap_or_default().to_owned();
            let before = origin.recorded(&choice);
            if let Some(before) = before.filter(|before| *before != after) {
                tracing::warn!(
                    "{choice} was {before} when the checkpoint was written and is {after} on this \
                     machine: from here on the run is the same up to rounding, not to the bit"
                );
                self.event(Event::ChoiceChanged {
                    step: self.progress.step,
                    choice,
                    before,
                    after,
                });
            }
        }
        Ok(())
    }

    /// The choices of this run.
    pub(super) fn choices(&self) -> Result<BTreeMap<String, Value>, RunError> {
        let nccl = self.ranks.world.nccl_version();
        choices(self.device, self.dtype, self.config.model.head_dim, nccl)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::model::describe;
    use crate::testing::golden::{self, Golden};

    #[test]
    fn a_trial_multiplies_by_the_weights_of_a_block() {
        let golden = Golden::open("gradients");
        let (model, ..) = golden::model(&golden.facts["cases"]["long_1024"]["model"]);
        let units = describe(&model, |_| true, |_| true).unwrap();
        let weights = block_weights(&units);
        assert_eq!(weights.len(), 4, "qkv, out, gate and up, down: {weights:?}");
        let head_rows = model.num_heads + 2 * model.num_kv_heads;
        assert!(weights.contains(&[head_rows * model.head_dim, model.hidden_size]));
        assert!(weights.contains(&[2 * model.intermediate_size, model.hidden_size]));
        try_both(Kind::BFloat16, 32, &weights).unwrap();
    }
}
