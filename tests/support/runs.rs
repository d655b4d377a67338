//! Looking at runs from outside: what they have written, and their processes.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use oxitron_trainer::checkpoint::{Checkpoint, StateKind, folder_name};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::{Fixture, run};

/// Asserts that two runs took the same `steps` steps to the same weights, to the bit.
#[track_caller]
pub fn assert_same_bits(fixture: &Fixture, calm: &str, disturbed: &str, steps: u64) {
    let (a, b) = (
        figures(&fixture.path(calm)),
        figures(&fixture.path(disturbed)),
    );
    assert_eq!(a.len() as u64, steps);
    for (step, record) in &a {
        for key in [
            "loss",
            "grad_norm",
            "lr",
            "tokens",
            "target_tokens",
            "stage",
        ] {
            let other = b.get(step).map(|record| &record[key]);
            assert_eq!(
                Some(&record[key]),
                other,
                "{key} of step {step} of {disturbed}"
            );
        }
    }
    assert!(
        weights(fixture, calm) == weights(fixture, disturbed),
        "other weights in {disturbed}"
    );
}

/// Waits for an event of this kind for which `wanted` holds.
#[track_caller]
pub fn wait_for_event(run_dir: &Path, kind: &str, wanted: impl Fn(&Value) -> bool) {
    let began = Instant::now();
    let read = || fs::read_to_string(run_dir.join("events.jsonl")).unwrap_or_default();
    let is = |line: &str| {
        // The last line may still be on its way.
        serde_json::from_str::<Value>(line)
            .is_ok_and(|event| event["event"] == kind && wanted(&event))
    };
    while !read().lines().any(is) {
        assert!(began.elapsed() < Duration::from_secs(60), "no {kind}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The figures of a run by step; of a step that was repeated the last, which is what counts.
pub fn figures(run_dir: &Path) -> BTreeMap<u64, Value> {
    let text = fs::read_to_string(run_dir.join("metrics.jsonl")).unwrap();
    let records = text
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    records
        .map(|record| (record["step"].as_u64().unwrap(), record))
        .collect()
}

/// The losses of a run in the order of its steps.
pub fn losses(run_dir: &Path) -> Vec<f64> {
    figures(run_dir)
        .values()
        .map(|record| record["loss"].as_f64().unwrap())
        .collect()
}

/// The events of one kind.
pub fn events(run_dir: &Path, kind: &str) -> Vec<Value> {
    let text = fs::read_to_string(run_dir.join("events.jsonl")).unwrap();
    let records = text
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap());
    records.filter(|record| record["event"] == kind).collect()
}

/// All tensors of a checkpoint, master weights and moments, as bits.
pub fn tensors(checkpoint: &Checkpoint) -> BTreeMap<(String, StateKind), Vec<u32>> {
    let mut found = BTreeMap::new();
    for tensor in checkpoint.tensors() {
        for stored in &tensor.states {
            let values = checkpoint.read_whole(&tensor.name, stored.state).unwrap();
            let bits = values.into_iter().map(f32::to_bits).collect();
            found.insert((tensor.name.clone(), stored.state), bits);
        }
    }
    found
}

/// The checkpoint after a step of a run.
#[track_caller]
pub fn checkpoint(run_dir: &Path, step: u64) -> Checkpoint {
    Checkpoint::open(run_dir.join("checkpoints").join(folder_name(step))).unwrap()
}

/// The last weights of a run, to the bit.
pub fn weights(fixture: &Fixture, run_dir: &str) -> Vec<u8> {
    let out = fixture.text(&format!("{run_dir}-hf"));
    let _ = fs::remove_dir_all(&out);
    run(&[
        "convert",
        "to-hf",
        &fixture.text(run_dir),
        &out,
        "--dtype",
        "fp32",
    ])
    .done();
    fs::read(Path::new(&out).join("model.safetensors")).unwrap()
}

/// Waits until the run has taken `step` steps.
pub fn wait_for_step(run_dir: &Path, step: usize) {
    let began = Instant::now();
    let steps = || fs::read_to_string(run_dir.join("metrics.jsonl")).unwrap_or_default();
    while steps().lines().count() < step {
        assert!(
            began.elapsed() < Duration::from_secs(60),
            "step {step} was not reached"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Sends a signal to a process.
pub fn signal(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(pid as i32).unwrap(), signal).unwrap();
}

/// The processes that train with this config, with their rank.
pub fn ranks_of(config: &Path) -> Vec<(u32, usize)> {
    let config = config.canonicalize().unwrap();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else {
            continue;
        };
        let read = |name: &str| fs::read(entry.path().join(name)).unwrap_or_default();
        let command = String::from_utf8_lossy(&read("cmdline")).into_owned();
        let arguments: Vec<&str> = command.split('\0').collect();
        if arguments.get(1) != Some(&"train") || !command.contains(config.to_str().unwrap()) {
            continue;
        }
        let environment = String::from_utf8_lossy(&read("environ")).into_owned();
        let rank = environment
            .split('\0')
            .find_map(|line| line.strip_prefix("OMPI_COMM_WORLD_RANK="))
            .and_then(|rank| rank.parse().ok());
        found.extend(rank.map(|rank| (pid, rank)));
    }
    found
}

/// The process of one rank that trains with this config.
#[track_caller]
pub fn rank_of(config: &Path, rank: usize) -> u32 {
    let ranks = ranks_of(config);
    let found = ranks.iter().find(|&&(_, number)| number == rank);
    found
        .unwrap_or_else(|| panic!("no rank {rank} among {ranks:?}"))
        .0
}

/// Waits until no process trains with this config any more.
pub fn wait_until_gone(config: &Path) {
    let began = Instant::now();
    while !ranks_of(config).is_empty() {
        assert!(
            began.elapsed() < Duration::from_secs(10),
            "orphans: {:?}",
            ranks_of(config)
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}
