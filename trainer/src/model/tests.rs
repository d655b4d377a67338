//! The model against PyTorch and transformers.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use oxitron_kernels::cuda::emulated;
use tch::Device;

use super::{Activations, Batch};
use crate::config::{Dtype, Patterns, Recompute};
use crate::testing::counter_hash::projection;
use crate::testing::golden::{self, Golden, numbers};
use crate::testing::tiny::{Tensors, Tiny, relative_error};

#[test]
fn logits_and_losses_are_those_of_transformers() {
    let golden = Golden::open("logits");
    let batch = golden.batches("").remove(0);
    for case in ["untied", "tied"] {
        let facts = &golden.facts["cases"][case];
        let (config, rope_base, scales) = golden::model(&facts["model"]);
        let mut model = Tiny::new(&config, rope_base, scales, Dtype::Fp32);

        let all = model.logits(&batch, 0..batch.token_count());
        let expected = golden.f32(&format!("{case}.logits"));
        let bound = 1e-4 * facts["logits_std"].as_f64().unwrap().max(1.0);
        let vocab = config.vocab_size;
        let mut expected_rows = expected.chunks(vocab);
        let mut worst = 0f64;
        for (row, kept) in golden.facts["kept_positions"]
            .as_array()
            .unwrap()
            .iter()
            .enumerate()
        {
            for position in numbers(kept) {
                let token = row * batch.seq_len + position as usize;
                let ours = &all[token * vocab..(token + 1) * vocab];
                for (a, b) in ours.iter().zip(expected_rows.next().unwrap()) {
                    worst = worst.max(f64::from((a - b).abs()));
                }
            }
        }
        assert!(expected_rows.next().is_none());
        assert!(
            worst <= bound,
            "{case}: logits differ by {worst:e}, bound {bound:e}"
        );

        let loss = model.loss(&batch);
        let expected = facts["loss"].as_f64().unwrap();
        assert_eq!(
            loss.targets,
            golden.facts["valid_targets"].as_u64().unwrap()
        );
        assert!(
            (loss.mean() / expected - 1.0).abs() < 1e-6,
            "{} {expected}",
            loss.mean()
        );
    }
}

/// Checks gradients against the projections and norms of an fp64 reference.
fn assert_projections(case: &str, facts: &serde_json::Value, gradients: &Tensors, bound: f64) {
    let tensors = facts["tensors"].as_object().unwrap();
    assert_eq!(tensors.len(), gradients.len(), "{case}");
    let mut worst = (0f64, 0f64);
    for (name, expected) in tensors {
        let norm = expected["norm"].as_f64().unwrap();
        let ours = &gradients[name];
        let length = ours
            .iter()
            .map(|&v| f64::from(v).powi(2))
            .sum::<f64>()
            .sqrt();
        let error = (length / norm - 1.0).abs();
        assert!(error < bound, "{case} {name}: norm {length} for {norm}");
        worst.0 = worst.0.max(error);
        // Four random projections may overestimate the error's length by a factor of two.
        for (which, expected) in numbers(&expected["projections"]).into_iter().enumerate() {
            let error = (projection(name, which, ours) - expected).abs() / norm;
            assert!(
                error < 2.0 * bound,
                "{case} {name}: projection off by {error:e}"
            );
            worst.1 = worst.1.max(error);
        }
    }
    println!(
        "{case}: norms within {:.1e}, projections within {:.1e}",
        worst.0, worst.1
    );
}

/// The cases of `gradients`: weights of a trained model's size on short rows, and a model as
/// training begins on rows of 1024 and 4096 tokens, of documents of 1 to 1531.
const CASES: [&str; 5] = ["tiny", "tiny_tied", "medium", "long_1024", "long_4096"];

#[test]
fn gradients_in_fp32_are_those_of_autograd_in_fp64() {
    let golden = Golden::open("gradients");
    for case in CASES {
        let facts = &golden.facts["cases"][case];
        let (config, rope_base, scales) = golden::model(&facts["model"]);
        let batch = golden.batches(&format!("{case}.")).remove(0);
        let mut model = Tiny::new(&config, rope_base, scales, Dtype::Fp32);
        let (loss, gradients) = model.gradients(&batch);
        let expected = facts["loss"].as_f64().unwrap();
        assert!((loss.mean() / expected - 1.0).abs() < 1e-6);
        assert_projections(case, facts, &gradients, 1e-5);
        if case == "tiny" {
            for (name, ours) in &gradients {
                let error = relative_error(ours, &golden.f32(&format!("tiny.grad.{name}")));
                assert!(error <= 1e-5, "{name}: {error:e}");
            }
        }
    }
}

#[test]
fn gradients_in_bf16_err_at_most_half_again_as_much_as_autocast() {
    let golden = Golden::open("gradients");
    for case in CASES {
        let facts = &golden.facts["cases"][case];
        let (config, rope_base, scales) = golden::model(&facts["model"]);
        let batch = golden.batches(&format!("{case}.")).remove(0);
        let gradients = |dtype| {
            Tiny::new(&config, rope_base, scales, dtype)
                .gradients(&batch)
                .1
        };
        let (ours, exact) = (gradients(Dtype::Bf16), gradients(Dtype::Fp32));
        let autocast = &facts["bf16_autocast_error"]["sdpa"];
        let whole = |tensors: &Tensors| tensors.values().flatten().copied().collect::<Vec<f32>>();
        let error = relative_error(&whole(&ours), &whole(&exact));
        let bound = 1.5 * autocast["whole"].as_f64().unwrap();
        println!("{case}: whole {error:.2e}, 1.5 x autocast {bound:.2e}");
        assert!(
            error <= bound,
            "{case}: whole gradient {error:e}, bound {bound:e}"
        );
        let ratio = |name: &String| {
            let error = relative_error(&ours[name], &exact[name]);
            error / autocast["tensors"][name].as_f64().unwrap()
        };
        let ratios = exact.keys().map(|name| (ratio(name), name));
        let (ratio, name) = ratios.max_by(|a, b| a.0.total_cmp(&b.0)).unwrap();
        println!("{case}: worst tensor {name}, {ratio:.2} x autocast");
        assert!(ratio <= 1.5, "{case} {name}: {ratio} x autocast");
    }
}

#[test]
fn recomputation_changes_no_bit() {
    let golden = Golden::open("gradients");
    let facts = &golden.facts["cases"]["tiny"];
    let (config, rope_base, scales) = golden::model(&facts["model"]);
    let gradients = |dtype, recompute| {
        let tiny = Tiny::new(&config, rope_base, scales, dtype);
        // Made where the ops run: a GPU needs more of the ids.
        let batch = golden.batches("tiny.").remove(0);
        tiny.recomputing(recompute).gradients(&batch)
    };
    let check = || {
        for dtype in [Dtype::Fp32, Dtype::Bf16] {
            let kept = gradients(dtype, Recompute::None);
            for recompute in [Recompute::Attention, Recompute::Full] {
                assert_eq!(kept, gradients(dtype, recompute), "{recompute}, {dtype:?}");
            }
        }
    };
    check();
    emulated(check);
}

#[test]
fn recomputation_runs_what_was_overwritten_and_nothing_else() {
    let golden = Golden::open("gradients");
    let (config, rope_base, scales) = golden::model(&golden.facts["cases"]["tiny"]["model"]);
    let batch = golden.batches("tiny.").remove(0);
    let branch = [
        ("rms_norm", "attention norm"),
        ("linear", "qkv"),
        ("attention", "attention"),
    ];
    let rest = [
        ("linear", "middle"),
        ("rms_norm", "mlp norm"),
        ("linear", "gate and up"),
    ];
    let down = [("linear", "output")];
    for (recompute, expected) in [
        (Recompute::None, vec![]),
        (Recompute::Attention, branch.to_vec()),
        (Recompute::Full, [branch, rest].concat()),
    ] {
        let mut tiny = Tiny::new(&config, rope_base, scales, Dtype::Fp32).recomputing(recompute);
        let mut activations = tiny.activations(&batch);
        activations.stopwatch.switch(true);
        tiny.forward(&batch, &mut activations);
        let ran = |activations: &mut Activations| -> Vec<(&str, &str)> {
            let spans = activations.stopwatch.take().into_iter();
            spans.map(|span| (span.operation, span.slot)).collect()
        };
        let block = [&branch[..], &rest, &down].concat();
        let blocks = vec![block; config.num_layers].concat();
        assert_eq!(
            ran(&mut activations),
            [vec![("embedding", "stream")], blocks].concat()
        );
        let weights = tiny.zero.weights(1).unwrap();
        tiny.decoder
            .recompute(1, &weights, &batch, &tiny.rope, &mut activations)
            .unwrap();
        assert_eq!(ran(&mut activations), expected, "{recompute}");
    }
}

#[test]
fn frozen_tensors_have_no_gradient_and_change_no_other() {
    let golden = Golden::open("gradients");
    let (mut config, rope_base, scales) = golden::model(&golden.facts["cases"]["tiny"]["model"]);
    let batch = golden.batches("tiny.").remove(0);
    let (_, all) = Tiny::new(&config, rope_base, scales, Dtype::Fp32).gradients(&batch);
    config.freeze = Patterns::new(vec![
        "*.0.mlp.*".into(),
        "*embed_tokens*".into(),
        "*.o_proj.*".into(),
    ])
    .unwrap();
    let (_, some) = Tiny::new(&config, rope_base, scales, Dtype::Fp32).gradients(&batch);
    let frozen = all
        .keys()
        .filter(|name| config.freeze.matches(name))
        .count();
    assert_eq!(frozen, 6);
    assert_eq!(some.len(), all.len() - frozen);
    for (name, gradient) in &some {
        assert_eq!(gradient, &all[name], "{name}");
    }
}

/// Rows of one document each, and the same documents packed into one row.
#[test]
fn packing_changes_neither_the_loss_nor_a_neighbour() {
    let golden = Golden::open("logits");
    let (config, rope_base, scales) = golden::model(&golden.facts["cases"]["untied"]["model"]);
    let mut model = Tiny::new(&config, rope_base, scales, Dtype::Fp32);
    let lengths = [5usize, 1, 17, 9];
    let document = |seed: usize, length: usize| -> Vec<i64> {
        (0..length)
            .map(|i| ((seed * 131 + i * i * 7 + i * 3) % config.vocab_size) as i64)
            .collect()
    };
    let targets =
        |document: &[i64]| -> Vec<i64> { document[1..].iter().copied().chain([-100]).collect() };
    let mut batch_of = |documents: &[Vec<i64>]| {
        let tokens = documents.concat();
        let targets: Vec<i64> = documents.iter().flat_map(|d| targets(d)).collect();
        let mut starts = vec![0u32];
        for document in &documents[..documents.len() - 1] {
            starts.push(starts.last().unwrap() + document.len() as u32);
        }
        let batch = Batch::new(&tokens, &targets, &[starts], tokens.len(), Device::Cpu).unwrap();
        model.loss(&batch)
    };
    let documents: Vec<Vec<i64>> = lengths
        .iter()
        .enumerate()
        .map(|(seed, &length)| document(seed, length))
        .collect();
    let packed = batch_of(&documents);
    let mut alone = super::Loss::default();
    let mut each = Vec::new();
    for document in &documents {
        let loss = batch_of(std::slice::from_ref(document));
        each.push(loss.sum);
        alone += loss;
    }
    assert_eq!(packed.targets, alone.targets);
    assert!(
        (packed.sum / alone.sum - 1.0).abs() < 1e-5,
        "{packed:?} {alone:?}"
    );

    // Other neighbours of the third document: its part of the loss stays.
    let others = vec![
        document(50, 5),
        document(51, 1),
        documents[2].clone(),
        document(53, 9),
    ];
    let changed = batch_of(&others).sum
        - batch_of(&others[..1]).sum
        - batch_of(&others[1..2]).sum
        - batch_of(&others[3..]).sum;
    assert!(
        (changed / each[2] - 1.0).abs() < 1e-5,
        "{changed} {}",
        each[2]
    );
}
