//! What a run chooses by its machine: written into every manifest, and compared on resume.
//!
//! The dtype is kept, since it decides what the run computes. Which instructions and which engine
//! compute it follows the machine: the loss curve is the same up to rounding, its bits are not, so a
//! change is an event.

use std::collections::BTreeMap;

use oxitron_kernels::{product::Engine, simd};
use serde_json::Value;

use super::origin::Origin;
use super::plan::{dtype_name, dtype_of_this_machine, kind};
use super::ranks::Ranks;
use super::{RunError, trainer::Trainer};
use crate::config::{Config, Dtype};
use crate::metrics::Event;

/// Names of the choices in a manifest.
const DTYPE: &str = "dtype";
const SIMD: &str = "simd";
const PRODUCTS: &str = "products";

/// The choices of a run that computes in `dtype`, on this machine.
pub(super) fn choices(dtype: Dtype) -> BTreeMap<String, Value> {
    let engine = Engine::of(kind(dtype)).to_string();
    [
        (DTYPE, dtype_name(dtype)),
        (SIMD, simd::level().name()),
        (PRODUCTS, engine.as_str()),
    ]
    .map(|(name, value)| (name.to_owned(), value.into()))
    .into()
}

/// The dtype of weights and activations: what the configuration says; for `auto` what the run began
/// with, or else what the leader's processor does fast. All ranks compute alike.
pub(super) fn choose_dtype(
    config: &Config,
    ranks: &Ranks,
    origin: &Origin,
) -> Result<Dtype, RunError> {
    let recorded = origin.recorded(DTYPE);
    let [bf16] = ranks.leaders_choice(|| {
        let choose = || match recorded.as_deref() {
            Some("bf16") => Dtype::Bf16,
            Some(_) => Dtype::Fp32,
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

impl Trainer<'_> {
    /// Tells what this machine chooses otherwise than the one that wrote the checkpoint.
    pub(super) fn tell_changed_choices(&mut self, origin: &Origin) {
        let mut now = choices(self.dtype);
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
    }
}
