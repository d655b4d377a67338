//! One rank that takes steps on given batches.

use oxitron_kernels::{RopeTable, adamw::AdamW};
use tch::Device;

use crate::comm::{Comm, Lane, Wire};
use crate::config::{Dtype, ModelConfig};
use crate::model::{Activations, Batch, Decoder, describe};
use crate::plan::{Action, StepShape, emit_step};
use crate::run::step::{Step, StepReport};
use crate::testing::counter_hash::{self, Scales};
use crate::testing::tiny::Tensors;
use crate::zero::{InitialValues, Staged, StateKind, Zero};

/// Where weights begin.
#[derive(Clone, Copy)]
pub enum Weights {
    Seed(u64),
    CounterHash(Scales),
}

/// What a runner is made from.
#[derive(Clone, Copy)]
pub struct Setting<'a> {
    pub model: &'a ModelConfig,
    pub rope_base: f64,
    pub dtype: Dtype,
    pub weights: Weights,
    pub shape: StepShape,
    /// Tokens of a micro-batch.
    pub tokens: usize,
    pub clip_norm: f64,
}

pub struct Runner {
    decoder: Decoder,
    pub zero: Zero,
    rope: RopeTable,
    activations: Activations,
    actions: Vec<Action>,
    world: Lane,
    clip_norm: f64,
    adam_step: u64,
}

impl Runner {
    pub fn new(setting: Setting<'_>, comm: &Comm) -> Self {
        let Setting { model, shape, .. } = setting;
        let trainable = |name: &str| !model.freeze.matches(name);
        let units = describe(model, trainable, |name| !name.ends_with("norm.weight")).unwrap();
        let decoder = Decoder::new(model, setting.dtype);
        let everyone: Vec<usize> = (0..comm.world()).collect();
        let (lane, world) = (comm.lane(&everyone).unwrap(), comm.lane(&everyone).unwrap());
        let kind = decoder.compute_kind();
        let mut zero = Zero::new(&units, lane, kind, Wire::F32, Device::Cpu).unwrap();
        zero.load(|spec, state, range, out| {
            match (setting.weights, state) {
                (Weights::Seed(seed), _) => InitialValues { seed }.read(spec, state, range, out),
                (Weights::CounterHash(scales), StateKind::Master) => {
                    let whole = counter_hash::weight(&spec.name, spec.len(), scales);
                    out.copy_from_slice(&whole[range]);
                }
                _ => out.fill(0.0),
            }
            Ok::<_, std::convert::Infallible>(())
        })
        .unwrap();
        Self {
            activations: decoder
                .activations(setting.tokens, shape.recompute, Device::Cpu)
                .unwrap(),
            rope: RopeTable::new(setting.rope_base, model.head_dim, setting.tokens).unwrap(),
            actions: emit_step(&units, shape),
            clip_norm: setting.clip_norm,
            adam_step: 0,
            decoder,
            zero,
            world,
        }
    }

    pub fn step(&mut self, batches: &[Batch], lr: f64) -> StepReport {
        let adamw = AdamW {
            lr,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            grad_scale: 1.0,
            step: self.adam_step + 1,
        };
        let report = Step {
            actions: &self.actions,
            batches,
            decoder: &self.decoder,
            rope: &self.rope,
            activations: &mut self.activations,
            zero: &mut self.zero,
            world: &self.world,
            adamw,
            clip_norm: self.clip_norm,
            stop_requested: false,
        }
        .run()
        .unwrap();
        self.adam_step += 1;
        report
    }
}

/// The master weights that the ranks hold together.
pub fn assemble(staged: impl IntoIterator<Item = Staged>) -> Tensors {
    let mut tensors = Tensors::new();
    for piece in staged
        .into_iter()
        .filter(|piece| piece.state == StateKind::Master)
    {
        let length = piece.shape.iter().product();
        let tensor = tensors
            .entry(piece.tensor)
            .or_insert_with(|| vec![f32::NAN; length]);
        tensor[piece.range].copy_from_slice(&piece.data);
    }
    assert!(
        tensors.values().flatten().all(|value| !value.is_nan()),
        "a piece is missing"
    );
    tensors
}
