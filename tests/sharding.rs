//! Sharding modes on real processes: a seeded eighth of the matrix that runs on threads inside the
//! trainer.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)]

mod support;

use std::collections::BTreeMap;
use std::fs;

use safetensors::SafeTensors;
use support::{Fixture, run};

/// 40 steps of 48 samples: a number that 1, 2, 3 and 4 ranks divide, with accumulation 4 too.
const STAGE: &str = r#"
[validation]
fraction = 0.1
every_steps = 20
batches = 2

[[stage]]
name = "only"
seq_len = 16
steps = 40
batch_tokens = 768
"#;
const SAMPLES: usize = 48;
/// Draws every mode and group size, and few single ranks.
const SEED: u64 = 0x9e37_79b9_7f4a_7935;

#[derive(Clone, Copy, Debug)]
struct Case {
    zero_stage: usize,
    ranks: usize,
    shard: usize,
    accumulation: usize,
    tied: bool,
    frozen: bool,
}

/// The whole matrix, in a fixed order.
fn matrix() -> Vec<Case> {
    let mut cases = Vec::new();
    for zero_stage in 0..4 {
        for (ranks, shard) in [(1, 1), (2, 2), (3, 3), (4, 4), (4, 2)] {
            for accumulation in [1, 4] {
                for (tied, frozen) in [(false, false), (false, true), (true, false), (true, true)] {
                    cases.push(Case {
                        zero_stage,
                        ranks,
                        shard,
                        accumulation,
                        tied,
                        frozen,
                    });
                }
            }
        }
    }
    cases
}

/// An eighth of the matrix, drawn with [`SEED`].
fn sample() -> Vec<Case> {
    // The finaliser of SplitMix64: neighbours get unrelated numbers.
    let hash = |index: usize| {
        let mut bits = (index as u64 + 1).wrapping_mul(SEED);
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    };
    let mut drawn: Vec<(u64, Case)> = matrix()
        .into_iter()
        .enumerate()
        .map(|(index, case)| (hash(index), case))
        .collect();
    drawn.sort_unstable_by_key(|&(number, _)| number);
    drawn.truncate(matrix().len() / 8);
    drawn.into_iter().map(|(_, case)| case).collect()
}

struct Trained {
    /// Of the 40 steps, then of the two validations.
    losses: Vec<f64>,
    weights: BTreeMap<String, Vec<f32>>,
}

impl Case {
    fn model_name(&self) -> String {
        format!("alone-{}-{}", self.tied, self.frozen)
    }

    fn train(&self, fixture: &Fixture, dir: &str) -> Trained {
        let config = fixture.path("config.toml");
        let micro_batch = SAMPLES / (self.ranks * self.accumulation);
        // ZeRO-0 shards nothing; every other group size is given as a number.
        let shard = match self.zero_stage {
            0 => "\"world\"".to_owned(),
            _ => self.shard.to_string(),
        };
        let frozen = "[\"*embed_tokens*\", \"*layers.1.mlp*\"]";
        let sets = [
            format!("run.dir={dir}"),
            format!("stage.0.micro_batch={micro_batch}"),
            format!("parallel.zero_stage={}", self.zero_stage),
            format!("parallel.shard_size={shard}"),
            format!("model.tie_word_embeddings={}", self.tied),
            format!("model.freeze={}", if self.frozen { frozen } else { "[]" }),
        ];
        let ranks = self.ranks.to_string();
        let mut arguments = match self.ranks {
            1 => vec!["train", config.to_str().unwrap()],
            _ => vec!["launch", config.to_str().unwrap(), "--ranks", &ranks],
        };
        for set in &sets {
            arguments.extend(["--set", set]);
        }
        run(&arguments).done();

        let read = |file: &str| fs::read_to_string(fixture.path(dir).join(file)).unwrap();
        let (metrics, events) = (read("metrics.jsonl"), read("events.jsonl"));
        let validations = events
            .lines()
            .filter(|line| line.contains("\"validation\""));
        let losses = metrics.lines().chain(validations).map(|line| {
            let record: serde_json::Value = serde_json::from_str(line).unwrap();
            record["loss"].as_f64().unwrap()
        });
        let (run_dir, out) = (fixture.text(dir), fixture.text(&format!("{dir}-hf")));
        run(&["convert", "to-hf", &run_dir, &out, "--dtype", "fp32"]).done();
        let bytes = fs::read(fixture.path(&format!("{dir}-hf")).join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let values = |data: &[u8]| -> Vec<f32> {
            let words = data.chunks_exact(4);
            words
                .map(|word| f32::from_le_bytes(word.try_into().unwrap()))
                .collect()
        };
        Trained {
            losses: losses.collect(),
            weights: file
                .iter()
                .map(|(name, view)| (name.to_owned(), values(view.data())))
                .collect(),
        }
    }
}

/// ‖x − reference‖₂ / ‖reference‖₂.
fn relative_error(x: &[f32], reference: &[f32]) -> f64 {
    let squared = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
    let pairs = x.iter().zip(reference);
    let difference = squared(&mut pairs.map(|(&a, &b)| f64::from(a) - f64::from(b)));
    (difference / squared(&mut reference.iter().map(|&v| f64::from(v)))).sqrt()
}

#[test]
fn an_eighth_of_all_meshes_trains_alike_on_processes_as_ranks() {
    let fixture = Fixture::new();
    fixture.config(STAGE);
    let mut references: BTreeMap<String, Trained> = BTreeMap::new();
    let cases = sample();
    assert_eq!(cases.len(), matrix().len() / 8);
    for (index, case) in cases.iter().enumerate() {
        let name = case.model_name();
        let alone = Case {
            zero_stage: 0,
            ranks: 1,
            shard: 1,
            accumulation: 1,
            ..*case
        };
        let reference = references
            .entry(name.clone())
            .or_insert_with(|| alone.train(&fixture, &name));
        let learnt = reference.losses[0] - reference.losses[39];
        // Half frozen it learns slowly: by 0.2 in 40 steps.
        assert!(learnt > 0.1, "it learns: {learnt}");
        let found = case.train(&fixture, &format!("case-{index}"));
        assert_eq!(found.losses.len(), 42);
        let mut worst = (0f64, 0f64);
        for (step, (a, b)) in reference.losses.iter().zip(&found.losses).enumerate() {
            let error = (b / a - 1.0).abs();
            assert!(error <= 1e-5, "{case:?}: loss {step} differs by {error:e}");
            worst.0 = worst.0.max(error);
        }
        assert_eq!(found.weights.len(), reference.weights.len());
        for (name, weights) in &reference.weights {
            let error = relative_error(&found.weights[name], weights);
            assert!(error <= 1e-5, "{case:?}: {name} differs by {error:e}");
            worst.1 = worst.1.max(error);
        }
        println!(
            "{case:?}: losses within {:.1e}, weights within {:.1e}",
            worst.0, worst.1
        );
    }
}
