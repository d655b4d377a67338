//! Which changes stop a resume.

use super::{MINIMAL, load_with};

const TWO_STAGES: &str = "stage=[
    { name = \"a\", seq_len = 4096, steps = 10, batch_tokens = 65536 },
    { name = \"b\", seq_len = 8192, steps = 10, batch_tokens = 65536 }]";

/// Differences that `sets` make on top of two stages, as text.
fn differences(sets: &[&str], current_stage: usize) -> Vec<String> {
    let old = load_with(MINIMAL, &[TWO_STAGES]).unwrap();
    let sets: Vec<&str> = [TWO_STAGES].iter().chain(sets).copied().collect();
    let new = load_with(MINIMAL, &sets).unwrap();
    let found = old
        .result_affecting_difference(&new, current_stage)
        .unwrap();
    found.iter().map(ToString::to_string).collect()
}

#[test]
fn free_keys_do_not_count() {
    let free = [
        "run.name=other",
        "run.dir=/other",
        "run.device=cpu",
        "run.deterministic=true",
        "run.threads=2",
        "run.peak_tflops=989.0",
        "run.trace_steps=[1, 2]",
        "run.time_limit=11h30m",
        "parallel.grad_reduce_dtype=bf16",
        "parallel.overlap=false",
        "parallel.zero_stage=3",
        "parallel.shard_size=2",
        "parallel.prefetch_units=4",
        "parallel.recompute=full",
        "parallel.recompute=attention",
        "checkpoint.every_steps=7",
        "checkpoint.at_end=false",
        "checkpoint.keep=9",
        "checkpoint.dir=/c",
        "checkpoint.keep_every=14",
        "checkpoint.ephemeral_every_steps=2",
        "checkpoint.async=false",
        "checkpoint.when_busy=skip",
        "guard.replica_check_steps=0",
        "guard.skip_samples=[[3, 9]]",
        "guard.spike_policy=rollback",
        "guard.spike_zscore=5",
        "guard.hang_timeout=90",
        "stage.0.micro_batch=4",
        "data.tokenizer=/t.json",
        "data.lock=/l",
        "data.source.0.path=/moved/*.parquet",
        "model.init_from=/hf",
        "model.dtype=bf16",
    ];
    assert_eq!(differences(&free, 1), Vec::<String>::new());
}

/// Where state lies changes no bit; the device it takes is free as well.
#[test]
fn offload_is_free() {
    let sets = ["optimizer.offload=true", "run.device=cuda"];
    assert_eq!(differences(&sets, 0), Vec::<String>::new());
}

#[test]
fn what_changes_the_result_is_named_with_both_values() {
    assert_eq!(differences(&["run.seed=5"], 0), ["run.seed: 0 → 5"]);
    assert_eq!(
        differences(&["model.num_layers=3"], 0),
        ["model.num_layers: 2 → 3"]
    );
    assert_eq!(
        differences(&["optimizer.eps=1e-6"], 0),
        ["optimizer.eps: 0.00000001 → 0.000001"]
    );
    assert_eq!(
        differences(&["stage.0.batch_tokens=131072"], 0),
        ["stage.0.batch_tokens: 65536 → 131072"]
    );
    assert_eq!(
        differences(&["data.source.0.max_epochs=2"], 0),
        ["data.source.0.max_epochs: absent → 2.0"]
    );
    assert_eq!(
        differences(&["optimizer.moments_dtype=bf16"], 0),
        ["optimizer.moments_dtype: \"fp32\" → \"bf16\""]
    );
    assert_eq!(
        differences(&["model.freeze=[\"*\"]"], 0),
        ["model.freeze: [] → [\"*\"]"]
    );
}

#[test]
fn a_default_counts_through_the_stages_that_use_it() {
    assert_eq!(
        differences(&["optimizer.lr=2e-3"], 0),
        ["stage.0.lr: 0.001 → 0.002"]
    );
    assert_eq!(
        differences(&["optimizer.lr=2e-3", "stage.0.lr=1e-3"], 0),
        Vec::<String>::new()
    );
}

#[test]
fn stages_that_have_not_begun_are_free() {
    assert_eq!(
        differences(&["stage.1.seq_len=16384"], 0),
        Vec::<String>::new()
    );
    assert_eq!(
        differences(&["stage.1.seq_len=16384"], 1),
        ["stage.1.seq_len: 8192 → 16384"]
    );
    let one = load_with(MINIMAL, &["stage.0.steps=10", "stage.0.name=a"]).unwrap();
    let two = load_with(MINIMAL, &[TWO_STAGES]).unwrap();
    assert!(two.result_affecting_difference(&one, 0).unwrap().is_empty());
    let gone = two.result_affecting_difference(&one, 1).unwrap();
    assert!(
        gone.iter()
            .any(|d| d.key == "stage.1.steps" && d.new.is_none()),
        "{gone:?}"
    );
}

#[test]
fn a_recorded_dtype_is_kept_but_not_overruled() {
    let old = load_with(MINIMAL, &["model.dtype=bf16"]).unwrap();
    let auto = load_with(MINIMAL, &[]).unwrap();
    let fp32 = load_with(MINIMAL, &["model.dtype=fp32"]).unwrap();
    assert!(
        old.result_affecting_difference(&auto, 0)
            .unwrap()
            .is_empty()
    );
    let found = old.result_affecting_difference(&fp32, 0).unwrap();
    assert_eq!(found[0].to_string(), "model.dtype: \"bf16\" → \"fp32\"");
}
