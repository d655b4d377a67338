//! The same training on other numbers of ranks and micro-batches.

use oxitron_kernels::cuda::emulated;

use super::runner::{Runner, Setting, Sharding, Weights, assemble, staged};
use super::samples::{self, Sample};
use crate::comm::Comm;
use crate::config::{Dtype, ModelConfig, Patterns, Recompute};
use crate::model::{Batch, describe};
use crate::plan::{Home, Layout, StepShape};
use crate::run::{RunError, ranks::Ranks, replicas};
use crate::testing::golden::{self, Golden};
use crate::testing::tiny::{Tensors, relative_error};

const SEQ_LEN: usize = 24;
pub const SAMPLES: usize = 8;
const STEPS: usize = 40;
/// Enough for a bit that differs to spread to every weight.
const FEW_STEPS: usize = 10;
pub const LR: f64 = 1e-3;

/// The samples of [`STEPS`] steps.
pub fn samples(vocab: usize) -> Vec<Sample> {
    samples::samples("ranks", [STEPS * SAMPLES, SEQ_LEN], vocab, 40)
}

/// The micro-batches of a rank in a step; slots past the samples predict nothing.
pub fn micro_batches(
    samples: &[Sample],
    rank: usize,
    ranks: usize,
    accumulation: usize,
) -> Vec<Batch> {
    let per_rank = samples.len().div_ceil(ranks).next_multiple_of(accumulation);
    let empty: Sample = (vec![0; SEQ_LEN], vec![-100; SEQ_LEN], vec![0]);
    let mine: Vec<&Sample> = (0..per_rank)
        .map(|slot| samples.get(rank * per_rank + slot).unwrap_or(&empty))
        .collect();
    mine.chunks(per_rank / accumulation)
        .map(|slots| samples::batch(slots.iter().copied()))
        .collect()
}

struct Trained {
    initial: Tensors,
    losses: Vec<f64>,
    norms: Vec<f64>,
    weights: Tensors,
}

/// How a model is trained.
#[derive(Clone, Copy, Debug)]
pub struct Mesh {
    pub ranks: usize,
    pub accumulation: usize,
    pub overlap: bool,
    pub recompute: Recompute,
    pub prefetch_units: usize,
    pub sharding: Sharding,
    pub moments: Dtype,
    pub home: Home,
    /// Whether ops run the kernels of GPUs.
    pub emulated: bool,
}

impl Mesh {
    /// A step of one micro-batch, or several, with pieces so small that large units have some.
    pub fn new(zero_stage: u8, ranks: usize, shard: usize, accumulation: usize) -> Self {
        Self {
            ranks,
            accumulation,
            overlap: true,
            recompute: Recompute::None,
            prefetch_units: 1,
            sharding: Sharding {
                zero_stage,
                shard,
                piece: 2048,
            },
            moments: Dtype::Fp32,
            home: Home::Device,
            emulated: false,
        }
    }

    /// Runs something on the kernels of the mesh.
    pub fn on_its_kernels<R>(&self, run: impl FnOnce() -> R) -> R {
        if self.emulated { emulated(run) } else { run() }
    }

    pub fn alone() -> Self {
        Self::new(0, 1, 1, 1)
    }
}

/// Runs something on every rank of a mesh: by rank, what it gave back.
pub fn on_every_rank<T: Send>(ranks: usize, run: impl Fn(&Comm) -> T + Sync) -> Vec<T> {
    let run = &run;
    let on_rank = |comm: Comm| {
        oxitron_kernels::Threads::set(1).unwrap();
        let result = run(&comm);
        comm.finish().unwrap();
        result
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = Comm::threads(ranks)
            .unwrap()
            .into_iter()
            .map(|comm| scope.spawn(move || on_rank(comm)))
            .collect();
        let results = threads.into_iter().map(|thread| thread.join().unwrap());
        results.collect()
    })
}

pub fn setting(model: &ModelConfig, mesh: Mesh) -> Setting<'_> {
    let per_rank = SAMPLES
        .div_ceil(mesh.ranks)
        .next_multiple_of(mesh.accumulation);
    Setting {
        model,
        device: tch::Device::Cpu,
        rope_base: 10_000.0,
        dtype: Dtype::Fp32,
        moments: mesh.moments,
        home: mesh.home,
        weights: Weights::Seed(7),
        shape: StepShape {
            accumulation: mesh.accumulation,
            overlap: mesh.overlap,
            recompute: mesh.recompute,
            prefetch_units: mesh.prefetch_units,
        },
        sharding: mesh.sharding,
        tokens: per_rank / mesh.accumulation * SEQ_LEN,
        clip_norm: 1.0,
    }
}

fn train(model: &ModelConfig, mesh: Mesh, steps: usize) -> Trained {
    let samples = samples(model.vocab_size);
    let setting = setting(model, mesh);
    let train = |comm: &Comm| {
        let mut runner = Runner::new(setting, comm);
        let initial = staged(&mut runner.zero);
        let reports: Vec<(f64, f64)> = samples
            .chunks(SAMPLES)
            .take(steps)
            .map(|batch| {
                let mine = micro_batches(batch, comm.rank(), mesh.ranks, mesh.accumulation);
                let report = runner.step(&mine, LR);
                (report.record.mean_loss, report.record.grad_norm)
            })
            .collect();
        (initial, reports, staged(&mut runner.zero))
    };
    let mut results = on_every_rank(mesh.ranks, |comm| mesh.on_its_kernels(|| train(comm)));
    for (rank, (_, reports, _)) in results.iter().enumerate() {
        assert_eq!(
            reports, &results[0].1,
            "rank {rank} saw other figures than rank 0"
        );
    }
    Trained {
        losses: results[0].1.iter().map(|report| report.0).collect(),
        norms: results[0].1.iter().map(|report| report.1).collect(),
        initial: assemble(
            results
                .iter_mut()
                .flat_map(|result| std::mem::take(&mut result.0)),
        ),
        weights: assemble(
            results
                .iter_mut()
                .flat_map(|result| std::mem::take(&mut result.2)),
        ),
    }
}

/// A model whose number of parameters no group of 2, 3 or 4 ranks divides.
pub fn model(tied: bool, freeze: &[&str]) -> ModelConfig {
    let golden = Golden::open("logits");
    let (mut model, ..) = golden::model(&golden.facts["cases"]["untied"]["model"]);
    model.tie_word_embeddings = tied;
    (model.hidden_size, model.num_layers) = (35, 3);
    (model.num_heads, model.num_kv_heads, model.head_dim) = (2, 1, 8);
    (model.vocab_size, model.intermediate_size) = if tied { (103, 45) } else { (104, 44) };
    model.freeze = Patterns::new(freeze.iter().map(|&p| p.into()).collect()).unwrap();
    let parameters = describe(&model, |_| true, |_| true).unwrap().parameters();
    assert!(parameters % 2 == 1 && parameters % 3 != 0, "{parameters}");
    model
}

pub const FROZEN: [&str; 2] = ["*embed_tokens*", "*layers.1.mlp*"];

fn assert_same(reference: &Trained, other: &Trained, what: &str) {
    assert_eq!(reference.initial, other.initial, "{what}: initial weights");
    let mut worst = (0f64, 0f64);
    for (step, (a, b)) in reference.losses.iter().zip(&other.losses).enumerate() {
        let error = (b / a - 1.0).abs();
        assert!(
            error <= 1e-5,
            "{what}: loss of step {step} differs by {error:e}"
        );
        worst.0 = worst.0.max(error);
    }
    for (a, b) in reference.norms.iter().zip(&other.norms) {
        assert!(
            (b / a - 1.0).abs() <= 1e-4,
            "{what}: gradient norms {a} and {b}"
        );
    }
    for (name, weights) in &reference.weights {
        let error = relative_error(&other.weights[name], weights);
        assert!(error <= 1e-5, "{what}: {name} differs by {error:e}");
        worst.1 = worst.1.max(error);
    }
    println!(
        "{what}: losses within {:.1e}, weights within {:.1e}",
        worst.0, worst.1
    );
}

/// Every mode on every number of ranks, whole and hybrid, against one rank alone.
fn every_mesh(tied: bool, freeze: &[&str]) {
    let model = model(tied, freeze);
    let reference = train(&model, Mesh::alone(), STEPS);
    let learnt = reference.losses[0] - reference.losses[STEPS - 1];
    assert!(learnt > 0.1, "it learns: {learnt}");
    for (name, weights) in &reference.weights {
        let unchanged = &reference.initial[name] == weights;
        assert_eq!(unchanged, model.freeze.matches(name), "{name}");
    }
    for zero_stage in 0..4 {
        for (ranks, shard) in [(1, 1), (2, 2), (3, 3), (4, 4), (4, 2)] {
            for accumulation in [1, 4] {
                let mesh = Mesh::new(zero_stage, ranks, shard, accumulation);
                let what = format!(
                    "tied {tied}, frozen {}, ZeRO-{zero_stage}, {ranks} ranks in groups of \
                     {shard}, {accumulation} micro-batches",
                    !freeze.is_empty()
                );
                assert_same(&reference, &train(&model, mesh, STEPS), &what);
            }
        }
    }
}

#[test]
fn every_mesh_trains_an_untied_model_alike() {
    every_mesh(false, &[]);
}

#[test]
fn every_mesh_trains_a_tied_model_alike() {
    every_mesh(true, &[]);
}

#[test]
fn every_mesh_trains_a_partly_frozen_untied_model_alike() {
    every_mesh(false, &FROZEN);
}

#[test]
fn every_mesh_trains_a_partly_frozen_tied_model_alike() {
    every_mesh(true, &FROZEN);
}

/// The same mesh gives the same bits, whether collectives run behind compute or not and however far
/// ahead weights are gathered.
#[test]
fn neither_time_nor_overlap_changes_a_bit() {
    let model = model(true, &[]);
    for zero_stage in 0..4 {
        for (ranks, shard) in [(2, 2), (3, 3), (4, 2)] {
            let mesh = Mesh::new(zero_stage, ranks, shard, 2);
            let first = train(&model, mesh, FEW_STEPS);
            let serial = Mesh {
                overlap: false,
                ..mesh
            };
            let ahead = Mesh {
                prefetch_units: 3,
                ..mesh
            };
            let late = Mesh {
                prefetch_units: 0,
                recompute: Recompute::Full,
                ..mesh
            };
            let between = Mesh {
                recompute: Recompute::Attention,
                ..mesh
            };
            for other in [mesh, serial, ahead, late, between] {
                let again = train(&model, other, FEW_STEPS);
                assert_eq!(first.losses, again.losses, "{other:?}");
                assert_eq!(first.norms, again.norms, "{other:?}");
                assert_eq!(first.weights, again.weights, "{other:?}");
            }
        }
    }
}

/// Nor does what blocks keep, on the kernels of GPUs as on those of a processor.
#[test]
fn recomputation_changes_no_bit_of_a_training() {
    let model = model(false, &FROZEN);
    for emulated in [false, true] {
        for (zero_stage, ranks) in [(0, 1), (3, 2)] {
            let with = |recompute: Recompute| {
                let mesh = Mesh {
                    recompute,
                    emulated,
                    ..Mesh::new(zero_stage, ranks, ranks, 2)
                };
                let trained = train(&model, mesh, FEW_STEPS);
                (trained.losses, trained.norms, trained.weights)
            };
            let kept = with(Recompute::None);
            for recompute in [Recompute::Attention, Recompute::Full] {
                assert!(kept == with(recompute), "{recompute}, emulated {emulated}");
            }
        }
    }
}

/// A rank whose weights have changed behind everybody's back is found and named, by all ranks.
#[test]
fn the_replica_check_names_the_rank_that_differs() {
    let model = model(false, &[]);
    // Weights held whole: anybody may differ. Held as slices: only replicas can be compared, and
    // of two nobody knows which is right.
    for (zero_stage, ranks, shard, expected) in [
        (0, 3, 1, vec![2]),
        (1, 2, 2, vec![1]),
        (2, 3, 3, vec![2]),
        (1, 4, 2, vec![2]),
        (3, 4, 2, vec![0, 2]),
    ] {
        let mesh = Mesh::new(zero_stage, ranks, shard, 1);
        let setting = setting(&model, mesh);
        let layout = Layout::new(zero_stage, ranks, shard);
        let damaged = *expected.last().unwrap();
        let found = on_every_rank(ranks, |comm| {
            let ranks = Ranks::new(comm).unwrap();
            let mut zero = Runner::new(setting, comm).zero;
            replicas::check(&mut zero, &ranks, &layout.mesh, 1).unwrap();
            if comm.rank() == damaged {
                zero.damage_weights();
            }
            replicas::check(&mut zero, &ranks, &layout.mesh, 2)
        });
        for result in found {
            let Err(RunError::ReplicasDiffer { step: 2, ranks, .. }) = result else {
                panic!("ZeRO-{zero_stage} on {ranks} ranks: {result:?}")
            };
            assert_eq!(ranks, expected, "ZeRO-{zero_stage} in groups of {shard}");
        }
    }
}
