//! The resolved configuration: complete, and equal to what it was written from.

use std::path::Path;

use proptest::prelude::*;

use super::{MINIMAL, load, load_with, minimal_with};
use crate::config::{
    Config, Device, Dtype, DtypeChoice, Recompute, SpikePolicy, TimeSpan, WhenBusy,
};

/// Loads the resolved text from another folder under another name.
fn reload(config: &Config) -> Config {
    let text = config.resolved_toml().unwrap();
    Config::from_text(&text, "elsewhere/config.toml", Path::new("/elsewhere"), &[])
        .unwrap_or_else(|error| panic!("{error}\nin\n{text}"))
}

#[test]
fn the_minimal_config_resolves_to_known_values() {
    let config = load(MINIMAL).unwrap();
    assert_eq!(config.run.name, "run");
    assert_eq!(config.run.dir, Path::new("/home/me/configs/runs/run"));
    assert_eq!(
        config.resolved_path(),
        Path::new("/home/me/configs/runs/run/config.toml")
    );
    assert_eq!(
        config.checkpoint.dir,
        Path::new("/home/me/configs/runs/run/checkpoints")
    );
    assert_eq!(
        config.data.lock,
        Path::new("/home/me/configs/runs/run/dataset.lock")
    );
    assert_eq!(
        config.data.sources[0].path,
        Path::new("/home/me/configs/shards/*.parquet")
    );
    assert_eq!(
        (config.run.device, config.run.threads),
        (Device::Auto, None)
    );
    assert_eq!(config.model.head_dim, 8);
    assert_eq!(config.parallel.recompute, Recompute::None);
    assert_eq!(config.validation.fraction, 0.0);
    assert_eq!(reload(&config), config);
}

#[test]
fn every_default_is_written_out() {
    let text = load(MINIMAL).unwrap().resolved_toml().unwrap();
    let written: toml::Table = text.parse().unwrap();
    for section in [
        "run",
        "model",
        "parallel",
        "data",
        "validation",
        "optimizer",
        "checkpoint",
        "guard",
        "stage",
    ] {
        assert!(
            written.contains_key(section),
            "[{section}] is not in\n{text}"
        );
    }
    for key in [
        "zero_stage",
        "shard_size",
        "grad_reduce_dtype",
        "prefetch_units",
        "replica_check_steps",
        "skip_samples",
        "spike_policy",
        "start_timeout",
        "async",
        "moments_dtype",
        "init_std",
        "window_tokens",
        "eps",
        "keep",
        "rope_base",
    ] {
        assert!(
            text.contains(&format!("{key} = ")),
            "{key} is not in\n{text}"
        );
    }
}

#[test]
fn guard_and_save_keys_resolve() {
    let sets = [
        "run.time_limit=90m",
        "run.peak_tflops=312",
        "checkpoint.at_end=false",
        "guard.skip_samples=[[64, 128], [100, 140]]",
        "guard.lease=5",
        "guard.watch_interface=eth0",
        "checkpoint.keep_every=1000",
        "checkpoint.ephemeral_every_steps=50",
        "checkpoint.async=false",
    ];
    let config = load_with(MINIMAL, &sets).unwrap();
    let seconds = |span: TimeSpan| span.duration().as_secs();
    assert_eq!(config.run.time_limit.map(seconds), Some(5400));
    assert_eq!(seconds(config.guard.lease), 5);
    assert_eq!(seconds(config.guard.start_timeout), 1800);
    let ranges: Vec<std::ops::Range<u64>> = config
        .guard
        .skip_samples
        .iter()
        .map(|range| (*range).into())
        .collect();
    assert_eq!(ranges, [64..128, 100..140]);
    assert_eq!(config.guard.spike_policy, SpikePolicy::Off);
    assert_eq!(config.checkpoint.when_busy, WhenBusy::Wait);
    assert!(!config.checkpoint.asynchronous && !config.checkpoint.at_end);
    assert_eq!(config.run.peak_tflops, Some(312.0));
    let text = config.resolved_toml().unwrap();
    assert!(text.contains("time_limit = \"1h30m\""), "{text}");
    assert!(text.contains("lease = \"5s\""), "{text}");
    assert_eq!(reload(&config), config);
}

#[test]
fn relative_paths_start_at_the_config_file() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().canonicalize().unwrap();
    let nested = folder.join("a [b]/c");
    std::fs::create_dir_all(&nested).unwrap();
    let path = nested.join("run.toml");
    let text = minimal_with("shards/*.parquet", "../d/./*.parquet")
        .replace("[optimizer]", "[run]\ndir = \"../../out/\"\n\n[optimizer]");
    std::fs::write(&path, text).unwrap();
    let config = Config::load(
        &path,
        &[
            "model.init_from=../hf".to_owned(),
            "data.tokenizer=/t.json".to_owned(),
        ],
    )
    .unwrap();
    assert_eq!(config.run.dir, folder.join("out"));
    assert_eq!(config.checkpoint.dir, folder.join("out/checkpoints"));
    assert_eq!(
        config.data.sources[0].path,
        folder.join("a [[]b]/d/*.parquet")
    );
    assert_eq!(config.model.init_from, Some(folder.join("a [b]/hf")));
    assert_eq!(config.data.tokenizer.as_deref(), Some(Path::new("/t.json")));
    assert_eq!(reload(&config), config);
}

#[test]
fn a_recorded_dtype_is_written() {
    let mut config = load(MINIMAL).unwrap();
    assert_eq!(config.model.dtype, DtypeChoice::Auto);
    let chosen = config.model.dtype.resolve(|| Dtype::Bf16);
    config.record_dtype(chosen);
    assert_eq!(reload(&config).model.dtype, DtypeChoice::Bf16);
    assert_eq!(
        config.model.dtype.resolve(|| Dtype::Fp32),
        Dtype::Bf16,
        "a choice is not remade"
    );
}

#[test]
fn run_names_follow_the_file() {
    for (file, name) in [
        ("demo.toml", "demo"),
        ("a/b c.toml", "b-c"),
        (".toml", "toml"),
        ("", "run"),
    ] {
        let config = Config::from_text(MINIMAL, file, Path::new("/"), &[]).unwrap();
        assert_eq!(config.run.name, name, "{file:?}");
    }
}

#[derive(Debug, Clone)]
struct Draw {
    head_dim: usize,
    kv_heads: usize,
    group: usize,
    sources: usize,
    stages: Vec<(u32, u64, u64, usize, usize)>,
    lr: f64,
    seed: i64,
    flags: (bool, bool, bool),
}

fn draws() -> impl Strategy<Value = Draw> {
    let stage = (4..16u32, 1..9u64, 1..1_000_000u64, 0..4usize, 1..9usize);
    (
        (1..65usize, 1..5usize, 1..5usize, 1..4usize),
        prop::collection::vec(stage, 1..5),
        1e-9..1.0f64,
        0..i64::MAX,
        any::<(bool, bool, bool)>(),
    )
        .prop_map(
            |((half, kv_heads, group, sources), stages, lr, seed, flags)| Draw {
                head_dim: 2 * half,
                kv_heads,
                group,
                sources,
                stages,
                lr,
                seed,
                flags,
            },
        )
}

impl Draw {
    fn sets(&self) -> Vec<String> {
        let heads = self.kv_heads * self.group;
        let mut sets = vec![
            format!("model.num_heads={heads}"),
            format!("model.num_kv_heads={}", self.kv_heads),
            format!("model.head_dim={}", self.head_dim),
            format!("model.tie_word_embeddings={}", self.flags.0),
            format!("optimizer.lr={:?}", self.lr),
            format!("run.seed={}", self.seed),
        ];
        if self.flags.1 {
            sets.push("run.threads=3".to_owned());
            sets.push("model.freeze=[\"*norm*\"]".to_owned());
        }
        let sources: Vec<String> = (0..self.sources)
            .map(|i| format!("{{ name = \"s{i}\", path = \"p{i}\", weight = {}.5 }}", i))
            .collect();
        sets.push(format!("data.source=[{}]", sources.join(", ")));
        let stages: Vec<String> = self
            .stages
            .iter()
            .enumerate()
            .map(|(i, (log_len, samples, length, schedule, micro_batch))| {
                let schedule = ["cosine", "linear", "constant", "wsd"][*schedule];
                let seq_len = 1u64 << log_len;
                let batch = seq_len * samples;
                let unit = if self.flags.2 { "steps" } else { "tokens" };
                format!(
                    "{{ name = \"n{i}\", seq_len = {seq_len}, batch_tokens = {batch}, \
                     {unit} = {length}, micro_batch = {micro_batch}, schedule = \"{schedule}\" }}"
                )
            })
            .collect();
        sets.push(format!("stage=[{}]", stages.join(", ")));
        sets
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_valid_config_survives_the_round_trip(draw in draws()) {
        let sets = draw.sets();
        let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
        let config = load_with(MINIMAL, &sets).unwrap();
        prop_assert_eq!(config.stages.len(), draw.stages.len());
        let again = reload(&config);
        prop_assert_eq!(&again, &config);
        prop_assert_eq!(again.resolved_toml().unwrap(), config.resolved_toml().unwrap());
        let last = config.stages.len() - 1;
        prop_assert!(config.result_affecting_difference(&again, last).unwrap().is_empty());
    }
}
