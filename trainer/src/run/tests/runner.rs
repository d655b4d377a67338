//! One rank that takes steps on given batches.

use std::path::Path;

use oxitron_kernels::{RopeTable, adamw::AdamW, decision::Limits};
use tch::Device;

use crate::checkpoint::Checkpoint;
use crate::comm::{Comm, Lane, Wire};
use crate::config::{Dtype, ModelConfig};
use crate::model::{Activations, Batch, Decoder, describe};
use crate::plan::{Action, Home, Layout, ShardMap, StepShape, emit_opening, emit_step};
use crate::run::control::{Agreement, Control, Flags};
use crate::run::plan::kind;
use crate::run::step::{Pass, Rules, Step};
use crate::run::trace::Tracer;
use crate::testing::counter_hash::{self, Scales};
use crate::testing::tiny::Tensors;
use crate::zero::{Groups, InitialValues, StagedPiece, StateForm, StateKind, Zero, ZeroError};

/// Where weights begin.
#[derive(Clone, Copy)]
pub enum Weights<'a> {
    Seed(u64),
    CounterHash(Scales),
    /// With the moments and Adam's time.
    Checkpoint(&'a Checkpoint),
}

/// How the state is spread.
#[derive(Clone, Copy, Debug)]
pub struct Sharding {
    pub zero_stage: u8,
    /// Ranks of a shard group.
    pub shard: usize,
    /// The most elements of a piece.
    pub piece: usize,
}

impl Sharding {
    /// ZeRO-1 over all ranks.
    pub fn zero_1(ranks: usize) -> Self {
        Self {
            zero_stage: 1,
            shard: ranks,
            piece: 1 << 20,
        }
    }
}

/// What a runner is made from.
#[derive(Clone, Copy)]
pub struct Setting<'a> {
    pub model: &'a ModelConfig,
    pub device: Device,
    pub rope_base: f64,
    pub dtype: Dtype,
    pub moments: Dtype,
    pub home: Home,
    pub weights: Weights<'a>,
    pub shape: StepShape,
    pub sharding: Sharding,
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
    control: Control,
    pub adam_step: u64,
    tracer: Tracer,
}

impl Runner {
    pub fn new(setting: Setting<'_>, comm: &Comm) -> Self {
        let Setting {
            model,
            device,
            shape,
            ..
        } = setting;
        let trainable = |name: &str| !model.freeze.matches(name);
        let units = describe(model, trainable, |name| !name.ends_with("norm.weight")).unwrap();
        let decoder = Decoder::new(model, setting.dtype);
        let everyone: Vec<usize> = (0..comm.world()).collect();
        let world = comm.lane(&everyone).unwrap();
        let Sharding {
            zero_stage,
            shard,
            piece,
        } = setting.sharding;
        let layout = Layout::new(zero_stage, comm.world(), shard);
        let map = ShardMap::with_pieces_of(&units, layout.mesh.shard, piece);
        let groups = Groups::new(comm, &layout.mesh).unwrap();
        let dtypes = StateForm {
            compute: decoder.compute_kind(),
            moments: kind(setting.moments),
            wire: Wire::F32,
            home: setting.home,
        };
        let mut zero = Zero::new(&units, &map, &layout, groups, dtypes, device).unwrap();
        // State in host memory passes in several portions, the last one shorter.
        zero.cut_portions(192);
        zero.load(|spec, state, range, out| {
            match (setting.weights, state) {
                (Weights::Checkpoint(checkpoint), _) => {
                    checkpoint.read(&spec.name, state, range, out).unwrap();
                }
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
        for action in emit_opening(&units, &map, &layout, shape) {
            if let Action::Exchange(exchange) = action {
                zero.exchange(exchange).unwrap();
            }
        }
        let actions = emit_step(&units, &map, &layout, shape);
        let adam_step = match setting.weights {
            Weights::Checkpoint(checkpoint) => checkpoint.meta().schedule.adam_step,
            _ => 0,
        };
        Self {
            activations: decoder
                .activations(setting.tokens, shape.recompute, device)
                .unwrap(),
            rope: RopeTable::new(setting.rope_base, model.head_dim, setting.tokens, device)
                .unwrap(),
            actions,
            clip_norm: setting.clip_norm,
            control: Control::new(adam_step, device).unwrap(),
            adam_step,
            tracer: Tracer::new(None, Path::new(""), (0, 1), 0, (&units, &map)),
            decoder,
            zero,
            world,
        }
    }

    pub fn step(&mut self, batches: &[Batch], lr: f64) -> Agreement {
        let adamw = AdamW {
            lr,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
        };
        self.control.begin_step().unwrap();
        self.activations.loss.clear().unwrap();
        let pass = Pass {
            batches,
            decoder: &self.decoder,
            rope: &self.rope,
            activations: &mut self.activations,
            zero: &mut self.zero,
        };
        Step {
            pass,
            world: &self.world,
            control: &mut self.control,
            adamw,
            rules: Some(Rules {
                limits: Limits::clip(self.clip_norm),
                flags: Flags::default(),
            }),
            stops: None,
            number: self.adam_step + 1,
            watch: None,
            tracer: &mut self.tracer,
        }
        .run(&self.actions)
        .unwrap();
        let agreement = self.control.read(&|| false).unwrap();
        self.adam_step = agreement.record.adam_steps;
        agreement
    }
}

/// A piece of a rank's state and its values.
pub type Staged = (StagedPiece, Vec<f32>);

/// What `zero` would save.
pub fn staged(zero: &mut Zero) -> Vec<Staged> {
    let mut staging = zero.staging(0..zero.units()).unwrap();
    zero.stage(&mut staging).unwrap();
    let mut values = Vec::new();
    let written = staging.write(|some| {
        values.extend_from_slice(some);
        Ok::<_, ZeroError>(())
    });
    written.unwrap();
    let mut values = values.into_iter();
    let take = |piece: &StagedPiece| {
        (
            piece.clone(),
            values.by_ref().take(piece.range.len()).collect(),
        )
    };
    staging.pieces().map(take).collect()
}

/// The master weights that the ranks hold together.
pub fn assemble(staged: impl IntoIterator<Item = Staged>) -> Tensors {
    let mut tensors = Tensors::new();
    for (piece, values) in staged
        .into_iter()
        .filter(|(piece, _)| piece.state == StateKind::Master)
    {
        let length = piece.shape.iter().product();
        let tensor = tensors
            .entry(piece.tensor)
            .or_insert_with(|| vec![f32::NAN; length]);
        tensor[piece.range].copy_from_slice(&values);
    }
    assert!(
        tensors.values().flatten().all(|value| !value.is_nan()),
        "a piece is missing"
    );
    tensors
}
