//! Checkpoints saved by some ranks and loaded by others, as real processes: a sample of the matrix
//! that runs on threads inside the trainer.
//!
//! The first step after the load is made to fail on purpose (its loss is not a number), so that it
//! changes neither weights nor moments. The checkpoint after it was written by the new ranks and
//! must hold the very tensors that the old ones wrote.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)]

mod support;

use std::fs;
use std::path::Path;

use support::runs::{checkpoint, tensors};
use support::{Fixture, start_with};

/// Samples of a batch: a number that 1, 2, 3 and 4 ranks divide.
const SAMPLES: usize = 12;
/// The step after which the old ranks stop.
const SAVED: u64 = 3;
/// Steps with a loss after the failed one.
const AFTER: u64 = 10;

const BASE: &str = r#"
[validation]
fraction = 0.0

[checkpoint]
keep = 100
async = false

[[stage]]
name = "only"
seq_len = 16
steps = 14
batch_tokens = 192
"#;

/// Ranks, ZeRO stage and ranks of a shard group.
type Mesh = (usize, usize, usize);

/// Twelve pairs: each number of ranks and each mode saves and loads, hybrid ones too.
const PAIRS: [(Mesh, [Mesh; 3]); 4] = [
    ((1, 1, 1), [(2, 3, 2), (4, 1, 2), (3, 2, 3)]),
    ((2, 0, 1), [(4, 3, 2), (1, 0, 1), (3, 1, 3)]),
    ((3, 2, 3), [(2, 1, 2), (4, 2, 4), (4, 0, 1)]),
    ((4, 3, 2), [(1, 2, 1), (2, 2, 2), (3, 3, 3)]),
];

/// Trains in `dir` to the end, or dies in the step after the save.
fn train(fixture: &Fixture, dir: &str, (ranks, zero_stage, shard): Mesh, dies: bool) {
    let config = fixture.text("config.toml");
    let count = ranks.to_string();
    let shard = match zero_stage {
        0 => "\"world\"".to_owned(),
        _ => shard.to_string(),
    };
    let sets = [
        format!("run.dir={dir}"),
        format!("stage.0.micro_batch={}", SAMPLES / ranks),
        format!("parallel.zero_stage={zero_stage}"),
        format!("parallel.shard_size={shard}"),
    ];
    let mut arguments = vec!["launch", &config, "--ranks", &count];
    // The learning rate is constant: the number of steps changes nothing else.
    arguments.extend([
        "--allow-config-change",
        "--set",
        "optimizer.schedule=constant",
    ]);
    for set in &sets {
        arguments.extend(["--set", set]);
    }
    // The save that the others load, and the ones that tell what they have made of it.
    let step = SAVED + 1;
    let every = format!("checkpoint.every_steps={}", if dies { SAVED } else { step });
    arguments.extend(["--set", &every]);
    let fault = if dies {
        format!("step::forward=return(kill#{step})")
    } else {
        format!("step::loss=return(nan#{step})")
    };
    let output = start_with(&arguments, &[("FAILPOINTS", &fault)]).wait();
    if dies {
        output.refused(1, &["SIGKILL"]);
    } else {
        output.done();
    }
}

/// The losses after the failed step.
fn losses(run_dir: &Path) -> Vec<f64> {
    let text = fs::read_to_string(run_dir.join("metrics.jsonl")).unwrap();
    let records = text
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
        .filter(|record| record["step"].as_u64().unwrap() > SAVED + 1);
    records
        .map(|record| record["loss"].as_f64().unwrap())
        .collect()
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[test]
fn ranks_as_processes_load_what_others_saved() {
    let fixture = Fixture::new();
    fixture.config(BASE);
    let steps = SAVED + 1 + AFTER;
    train(&fixture, "calm", (1, 0, 1), false);
    let calm = losses(&fixture.path("calm"));
    assert_eq!(calm.len() as u64, AFTER);
    let mut worst = 0f64;
    for (old, others) in PAIRS {
        let saved = format!("saved-{}-{}-{}", old.0, old.1, old.2);
        train(&fixture, &saved, old, true);
        let before = tensors(&checkpoint(&fixture.path(&saved), SAVED));
        for new in others {
            let pair = format!("{old:?} to {new:?}");
            let dir = format!("{saved}-on-{}-{}-{}", new.0, new.1, new.2);
            copy(&fixture.path(&saved), &fixture.path(&dir));
            train(&fixture, &dir, new, false);
            let run_dir = fixture.path(&dir);
            assert!(
                tensors(&checkpoint(&run_dir, SAVED + 1)) == before,
                "{pair}: other bits"
            );
            let after = losses(&run_dir);
            assert_eq!(after.len(), calm.len(), "{pair}");
            for (a, b) in calm.iter().zip(&after) {
                let error = (b / a - 1.0).abs();
                assert!(error <= 1e-5, "{pair}: a loss differs by {error:e}");
                worst = worst.max(error);
            }
            assert!(
                tensors(&checkpoint(&run_dir, steps)) != before,
                "{pair}: nothing was learnt"
            );
        }
    }
    println!("12 pairs: the same bits, the next 10 losses within {worst:.1e}");
}
