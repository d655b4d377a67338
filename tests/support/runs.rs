//! Looking at runs from outside: what they have written, and their processes.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::{Fixture, run};

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
