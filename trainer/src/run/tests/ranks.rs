//! The same training on other numbers of ranks and micro-batches.

use tch::Device;

use super::runner::{Runner, Setting, Weights, assemble};
use crate::comm::Comm;
use crate::config::{Dtype, ModelConfig, Patterns};
use crate::model::Batch;
use crate::plan::StepShape;
use crate::testing::counter_hash;
use crate::testing::golden::{self, Golden};
use crate::testing::tiny::{Tensors, relative_error};

const SEQ_LEN: usize = 48;
const SAMPLES: usize = 4;
const STEPS: usize = 30;
const LR: f64 = 1e-3;

/// A sample: tokens, targets, document starts.
type Sample = (Vec<i64>, Vec<i64>, Vec<u32>);

fn samples(vocab: usize) -> Vec<Sample> {
    let total = STEPS * SAMPLES * SEQ_LEN;
    let (tokens, documents) = counter_hash::documents("ranks", total, vocab as u64, 1, 40);
    (0..total / SEQ_LEN)
        .map(|index| {
            let range = index * SEQ_LEN..(index + 1) * SEQ_LEN;
            let begins = |&i: &usize| i == range.start || documents[i] != documents[i - 1];
            let target = |i: usize| match tokens.get(i + 1) {
                Some(&next) if documents[i + 1] == documents[i] => i64::from(next),
                _ => -100,
            };
            (
                tokens[range.clone()]
                    .iter()
                    .map(|&token| i64::from(token))
                    .collect(),
                range.clone().map(target).collect(),
                range
                    .clone()
                    .filter(begins)
                    .map(|i| (i - range.start) as u32)
                    .collect(),
            )
        })
        .collect()
}

/// The micro-batches of a rank in a step; slots past the samples predict nothing.
fn micro_batches(samples: &[Sample], rank: usize, ranks: usize, accumulation: usize) -> Vec<Batch> {
    let per_rank = samples.len().div_ceil(ranks).next_multiple_of(accumulation);
    let empty: Sample = (vec![0; SEQ_LEN], vec![-100; SEQ_LEN], vec![0]);
    let mine: Vec<&Sample> = (0..per_rank)
        .map(|slot| samples.get(rank * per_rank + slot).unwrap_or(&empty))
        .collect();
    mine.chunks(per_rank / accumulation)
        .map(|slots| {
            let tokens: Vec<i64> = slots.iter().flat_map(|s| s.0.clone()).collect();
            let targets: Vec<i64> = slots.iter().flat_map(|s| s.1.clone()).collect();
            let starts: Vec<Vec<u32>> = slots.iter().map(|s| s.2.clone()).collect();
            Batch::new(&tokens, &targets, &starts, SEQ_LEN, Device::Cpu).unwrap()
        })
        .collect()
}

struct Trained {
    initial: Tensors,
    losses: Vec<f64>,
    norms: Vec<f64>,
    weights: Tensors,
    optimizer_bytes: Vec<usize>,
}

fn train(model: &ModelConfig, ranks: usize, accumulation: usize, overlap: bool) -> Trained {
    let samples = samples(model.vocab_size);
    let per_rank = SAMPLES.div_ceil(ranks).next_multiple_of(accumulation);
    let setting = Setting {
        model,
        rope_base: 10_000.0,
        dtype: Dtype::Fp32,
        weights: Weights::Seed(7),
        shape: StepShape {
            accumulation,
            overlap,
            recompute: false,
        },
        tokens: per_rank / accumulation * SEQ_LEN,
        clip_norm: 1.0,
    };
    let samples = &samples;
    let run = move |comm: Comm| {
        oxitron_kernels::Threads::set(1).unwrap();
        let mut runner = Runner::new(setting, &comm);
        let initial = runner.zero.stage().unwrap();
        let reports: Vec<(f64, f64)> = samples
            .chunks(SAMPLES)
            .map(|batch| {
                let mine = micro_batches(batch, comm.rank(), ranks, accumulation);
                let report = runner.step(&mine, LR);
                (report.agreement.loss.mean(), report.agreement.grad_norm)
            })
            .collect();
        let bytes = runner.zero.optimizer_bytes();
        let last = runner.zero.stage().unwrap();
        drop(runner);
        comm.finish().unwrap();
        (initial, reports, last, bytes)
    };
    let mut results = std::thread::scope(|scope| {
        let comms = Comm::threads(ranks).unwrap();
        let threads: Vec<_> = comms
            .into_iter()
            .map(|comm| scope.spawn(move || run(comm)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect::<Vec<_>>()
    });
    for (rank, (_, reports, ..)) in results.iter().enumerate() {
        assert_eq!(
            reports, &results[0].1,
            "rank {rank} saw other figures than rank 0"
        );
    }
    Trained {
        losses: results[0].1.iter().map(|report| report.0).collect(),
        norms: results[0].1.iter().map(|report| report.1).collect(),
        optimizer_bytes: results.iter().map(|result| result.3).collect(),
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

fn model(tied: bool) -> ModelConfig {
    let golden = Golden::open("logits");
    let (mut model, ..) = golden::model(&golden.facts["cases"]["untied"]["model"]);
    model.tie_word_embeddings = tied;
    model
}

fn assert_same(reference: &Trained, other: &Trained, what: &str) {
    assert_eq!(reference.initial, other.initial, "{what}: initial weights");
    let mut worst = 0f64;
    for (step, (a, b)) in reference.losses.iter().zip(&other.losses).enumerate() {
        let error = (b / a - 1.0).abs();
        assert!(
            error <= 1e-5,
            "{what}: loss of step {step} differs by {error:e}"
        );
        worst = worst.max(error);
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
    }
    println!("{what}: losses within {worst:.1e}");
}

#[test]
fn the_mesh_changes_nothing_but_rounding() {
    for tied in [false, true] {
        let model = model(tied);
        let reference = train(&model, 1, 1, true);
        assert!(
            reference.losses[STEPS - 1] < reference.losses[0] - 0.5,
            "it learns"
        );
        for (ranks, accumulation) in [(1, 2), (1, 4), (2, 1), (2, 2), (3, 1), (3, 2), (4, 1)] {
            let other = train(&model, ranks, accumulation, true);
            let what = format!("tied {tied}, {ranks} ranks, {accumulation} micro-batches");
            assert_same(&reference, &other, &what);
        }
    }
}

#[test]
fn overlap_changes_no_bit() {
    let model = model(true);
    let (on, off) = (train(&model, 2, 2, true), train(&model, 2, 2, false));
    assert_eq!(on.losses, off.losses);
    assert_eq!(on.weights, off.weights);
}

#[test]
fn frozen_tensors_stay_as_they_are_on_every_mesh() {
    let mut model = model(false);
    model.freeze = Patterns::new(vec!["*embed_tokens*".into(), "*layers.0.mlp*".into()]).unwrap();
    let reference = train(&model, 1, 1, true);
    for (name, weights) in &reference.weights {
        let unchanged = &reference.initial[name] == weights;
        assert_eq!(unchanged, model.freeze.matches(name), "{name}");
    }
    assert_same(&reference, &train(&model, 3, 2, true), "frozen, 3 ranks");
}

#[test]
fn optimizer_state_is_split_evenly() {
    let model = model(false);
    let whole = train(&model, 1, 1, true).optimizer_bytes[0];
    for ranks in [2, 3, 4] {
        let parts = train(&model, ranks, 1, true).optimizer_bytes;
        println!("{ranks} ranks: {parts:?} bytes of {whole}");
        assert!(parts.iter().all(|&part| part == parts[0]));
        // A unit is padded to a multiple of 64 elements per rank.
        let padding = 12 * 64 * model.num_layers.max(1) * 4;
        assert!(parts[0] >= whole / ranks && parts[0] <= whole / ranks + padding);
    }
}
