//! A model with its state and buffers on one rank, driven layer by layer.

use std::collections::BTreeMap;

use oxitron_kernels::RopeTable;
use tch::Device;

use super::counter_hash::{self, Scales};
use crate::config::{Dtype, ModelConfig, Recompute};
use crate::model::{Activations, Batch, Decoder, Loss, Objective, describe};
use crate::zero::{StateKind, Zero};

pub struct Tiny {
    pub decoder: Decoder,
    pub zero: Zero,
    pub rope: RopeTable,
    recompute: Recompute,
}

/// Named tensors.
pub type Tensors = BTreeMap<String, Vec<f32>>;

impl Tiny {
    /// A model with weights of the counter hash.
    pub fn new(config: &ModelConfig, rope_base: f64, scales: Scales, dtype: Dtype) -> Self {
        let trainable = |name: &str| !config.freeze.matches(name);
        let units = describe(config, trainable, |name| !name.ends_with("norm.weight")).unwrap();
        let decoder = Decoder::new(config, dtype);
        let mut zero = Zero::solo(&units, decoder.compute_kind(), Device::Cpu).unwrap();
        zero.load(|spec, state, range, out| {
            match state {
                StateKind::Master => {
                    let whole = counter_hash::weight(&spec.name, spec.len(), scales);
                    out.copy_from_slice(&whole[range]);
                }
                _ => out.fill(0.0),
            }
            Ok::<_, std::convert::Infallible>(())
        })
        .unwrap();
        let rope = RopeTable::new(rope_base, config.head_dim, 4096, Device::Cpu).unwrap();
        Self {
            decoder,
            zero,
            rope,
            recompute: Recompute::None,
        }
    }

    pub fn recomputing(mut self, recompute: Recompute) -> Self {
        self.recompute = recompute;
        self
    }

    pub fn activations(&self, batch: &Batch) -> Activations {
        self.decoder
            .activations(batch.token_count(), self.recompute, Device::Cpu)
            .unwrap()
    }

    /// Runs embedding and blocks.
    pub fn forward(&mut self, batch: &Batch, activations: &mut Activations) {
        for layer in 0..self.decoder.layers() - 1 {
            let weights = self.zero.weights(layer).unwrap();
            self.decoder
                .forward(layer, &weights, batch, &self.rope, activations)
                .unwrap();
        }
    }

    /// Logits of some tokens, row-major `[rows, vocab]`.
    pub fn logits(&mut self, batch: &Batch, rows: std::ops::Range<usize>) -> Vec<f32> {
        let mut activations = self.activations(batch);
        self.forward(batch, &mut activations);
        let weights = self.zero.weights(self.decoder.layers() - 1).unwrap();
        let logits = self
            .decoder
            .logits(&weights, rows, &mut activations)
            .unwrap();
        Vec::try_from(logits.flatten(0, -1)).unwrap()
    }

    pub fn loss(&mut self, batch: &Batch) -> Loss {
        let mut activations = self.activations(batch);
        self.forward(batch, &mut activations);
        let weights = self.zero.weights(self.decoder.layers() - 1).unwrap();
        self.decoder
            .head(&weights, batch, &mut activations, Objective::Loss)
            .unwrap();
        activations.loss.read().unwrap()
    }

    /// The loss of a batch and the gradients of its mean, by tensor; frozen tensors are absent.
    pub fn gradients(&mut self, batch: &Batch) -> (Loss, Tensors) {
        let mut activations = self.activations(batch);
        self.forward(batch, &mut activations);
        let last = self.decoder.layers() - 1;
        let weights = self.zero.weights(last).unwrap();
        let mut gradients = self.zero.gradients(last).unwrap();
        let objective = Objective::LossAndGradient {
            gradients: &mut gradients,
        };
        self.decoder
            .head(&weights, batch, &mut activations, objective)
            .unwrap();
        let loss = activations.loss.read().unwrap();
        for layer in (0..=last).rev() {
            let weights = self.zero.weights(layer).unwrap();
            // As in the plan: what the last block shares is still its own.
            if self.recompute != Recompute::None && layer != 0 && layer + 1 < last {
                let (rope, activations) = (&self.rope, &mut activations);
                self.decoder
                    .recompute(layer, &weights, batch, rope, activations)
                    .unwrap();
            }
            let mut gradients = self.zero.gradients(layer).unwrap();
            let (rope, activations) = (&self.rope, &mut activations);
            self.decoder
                .backward(layer, &weights, &mut gradients, batch, rope, activations)
                .unwrap();
        }
        let mut tensors = self.zero.gradients_by_name();
        for values in tensors.values_mut() {
            values
                .iter_mut()
                .for_each(|value| *value /= loss.targets as f32);
        }
        (loss, tensors)
    }
}

/// ‖x − reference‖₂ / ‖reference‖₂.
pub fn relative_error(x: &[f32], reference: &[f32]) -> f64 {
    assert_eq!(x.len(), reference.len());
    let squared = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
    let pairs = x.iter().zip(reference);
    let difference = squared(&mut pairs.map(|(&a, &b)| f64::from(a) - f64::from(b)));
    (difference / squared(&mut reference.iter().map(|&v| f64::from(v)))).sqrt()
}
