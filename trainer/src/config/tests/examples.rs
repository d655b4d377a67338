//! The presets and the example configs of the repository.

use std::path::{Path, PathBuf};

use super::load_with;
use crate::config::{Config, PRESETS};

fn configs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs")
}

fn toml_files(folder: &str) -> Vec<PathBuf> {
    let folder = configs().join(folder);
    let entries =
        std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.retain(|file| {
        file.extension()
            .is_some_and(|extension| extension == "toml")
    });
    files.sort();
    files
}

fn preset(name: &str) -> Config {
    load_with(super::MINIMAL, &[&format!("model.preset={name}")])
        .unwrap_or_else(|error| panic!("{name}: {error}"))
}

#[test]
fn every_file_of_models_is_a_preset() {
    let mut files: Vec<String> = toml_files("models")
        .iter()
        .map(|file| file.file_stem().unwrap().to_str().unwrap().to_owned())
        .collect();
    let mut names: Vec<String> = PRESETS
        .iter()
        .map(|preset| preset.name.to_owned())
        .collect();
    files.sort();
    names.sort();
    assert_eq!(files, names);
}

#[test]
fn presets_have_the_published_parameter_counts() {
    for (name, parameters) in [
        ("tiny", 121_152),
        ("demo", 6_752_512),
        ("internlm2-1.8b", 1_889_110_016),
        ("internlm2-7b", 7_737_708_544),
        ("internlm2-20b", 19_861_149_696),
        ("llama-7b", 6_738_415_616),
    ] {
        let config = preset(name);
        assert_eq!(config.model.parameters(), parameters, "{name}");
        let text = PRESETS
            .iter()
            .find(|preset| preset.name == name)
            .unwrap()
            .text;
        let spelt = spell(parameters);
        assert!(
            text.contains(&spelt),
            "the comment of {name} does not say {spelt}"
        );
    }
}

fn spell(number: u64) -> String {
    let digits = number.to_string();
    let groups: Vec<&str> = digits
        .as_bytes()
        .rchunks(3)
        .rev()
        .map(|group| std::str::from_utf8(group).unwrap())
        .collect();
    groups.join(",")
}

#[test]
fn presets_have_the_published_sizes() {
    let heads = |name: &str| {
        let model = preset(name).model;
        (
            model.num_heads,
            model.num_kv_heads,
            model.head_dim,
            model.rope_base,
            model.rms_norm_eps,
        )
    };
    assert_eq!(heads("internlm2-1.8b"), (16, 8, 128, 1e6, 1e-5));
    assert_eq!(heads("internlm2-7b"), (32, 8, 128, 1e6, 1e-5));
    assert_eq!(heads("internlm2-20b"), (48, 8, 128, 1e6, 1e-5));
    assert_eq!(heads("llama-7b"), (32, 32, 128, 1e4, 1e-5));
    assert_eq!(heads("tiny"), (8, 2, 8, 1e4, 1e-5));
}

#[test]
fn every_example_loads() {
    let mut count = 0;
    for folder in ["pretrain", "finetune"] {
        for file in toml_files(folder) {
            let config = Config::load(&file, &[]).unwrap_or_else(|error| panic!("{error}"));
            let text = config.resolved_toml().unwrap();
            let again = Config::from_text(&text, "config.toml", Path::new("/"), &[]).unwrap();
            assert_eq!(again, config, "{}", file.display());
            count += 1;
        }
    }
    assert!(count >= 3, "only {count} examples were found");
}

#[test]
fn the_demo_goes_from_4k_to_32k_at_a_constant_batch() {
    let config = Config::load(&configs().join("pretrain/demo.toml"), &[]).unwrap();
    let lengths: Vec<usize> = config.stages.iter().map(|stage| stage.seq_len).collect();
    assert_eq!(lengths, [4096, 8192, 16384, 32768]);
    assert!(
        config
            .stages
            .windows(2)
            .all(|pair| pair[0].rope_base < pair[1].rope_base)
    );
    let batches: Vec<u64> = config
        .stages
        .iter()
        .map(|stage| stage.batch_tokens)
        .collect();
    assert!(
        batches
            .iter()
            .all(|batch| *batch == batches[0] && *batch >= 65_536)
    );
    assert_eq!(config.model.vocab_size, 8192);
    assert!(config.model.num_kv_heads < config.model.num_heads);
    let root = configs().canonicalize().unwrap();
    assert_eq!(config.run.dir, root.parent().unwrap().join("runs/demo"));
}
