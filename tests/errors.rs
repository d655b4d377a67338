//! Bad input: every refusal names the place and the remedy, has the right exit code, and leaves
//! nothing half-written.

#![allow(clippy::unwrap_used)]

#[path = "support/mod.rs"]
mod support;

use std::fs;

use support::{Fixture, ONE_STAGE, cut, golden, run, start_with, train};

/// Asserts that a run was refused before its first step: its folder may hold the log and the
/// record of the attempt, but no figures, no data index and nothing temporary.
#[track_caller]
fn nothing_begun(fixture: &Fixture) {
    let begun = |name: &&String| {
        name.contains("step-") || name.contains("tmp") || name.ends_with("dataset.lock")
    };
    let files = fixture.files();
    assert_eq!(files.iter().find(begun), None, "{files:?}");
    let metrics = fixture.run_dir().join("metrics.jsonl");
    assert!(!metrics.exists() || fixture.metrics().is_empty());
}

#[test]
fn a_config_that_is_wrong_is_refused_with_line_and_column() {
    let fixture = Fixture::without_data();
    let config = fixture.config(ONE_STAGE);
    let right = fs::read_to_string(&config).unwrap();
    let wrong = right
        .replace("seq_len", "seq_lne")
        .replace("= 512", "= \"512\"");
    fs::write(&config, &wrong).unwrap();
    let place = |key: &str| {
        let line = wrong
            .lines()
            .position(|line| line.starts_with(key))
            .unwrap()
            + 1;
        format!("{}:{line}:", config.display())
    };
    train(&config, &[]).refused(
        2,
        &[
            "unknown key `stage.0.seq_lne`",
            &format!("{}1", place("seq_lne")),
            "did you mean `seq_len`?",
            "`model.vocab_size` is the string \"512\", it must be a whole number",
            &format!("{}14", place("vocab_size")),
            "write `vocab_size = 512`, without quotes",
        ],
    );
    fs::write(&config, right).unwrap();
    train(&config, &["--set", "optimizer.clip_nrom=1"]).refused(
        2,
        &[
            "unknown key `optimizer.clip_nrom`",
            "--set:1:11",
            "did you mean `clip_norm`?",
        ],
    );
    train(&config, &["--set", "stage.0.batch_tokens=100"]).refused(
        2,
        &[
            "it must be a multiple of `seq_len` (64)",
            "help: use 64 or 128",
        ],
    );
    assert_eq!(fixture.files(), ["config.toml"]);
}

#[test]
fn a_missing_file_is_named() {
    let fixture = Fixture::without_data();
    let missing = fixture.text("missing");
    let out = fixture.text("out");
    let absent = "No such file or directory";
    let output = train(&fixture.path("missing"), &[]).refused(2, &[&missing, absent, "help: "]);
    assert_eq!(
        output.stderr.matches(absent).count(),
        1,
        "{}",
        output.stderr
    );
    run(&["data", "train-tokenizer", &missing, "--out", &out])
        .refused(1, &[&missing, absent, "check the path"]);
    run(&[
        "data",
        "tokenize",
        &missing,
        "--tokenizer",
        &missing,
        "--out",
        &out,
    ])
    .refused(1, &["tokenizer", &missing, absent, "check the path"]);
    run(&["inspect", &missing]).refused(1, &[&missing, "check the path"]);
    run(&["convert", "to-hf", &missing, &out]).refused(1, &[&missing, "check the path"]);
    run(&["convert", "from-hf", &missing, &out]).refused(1, &[&missing, "Hugging Face folder"]);
    let output = run(&["generate", &missing, "--prompt", "the"]).refused(1, &[&missing]);
    assert_eq!(output.stdout, "");
    assert_eq!(fixture.files(), [""; 0]);

    let config = fixture.config(ONE_STAGE);
    train(&config, &[]).refused(
        1,
        &[
            &fixture.text("shards/*.parquet"),
            "write shards with `oxitron data tokenize`",
        ],
    );
    nothing_begun(&fixture);
    let from = format!("model.init_from={missing}");
    train(&config, &["--set", &from]).refused(1, &[&missing, "check the path"]);
    nothing_begun(&fixture);
}

#[test]
fn an_empty_corpus_is_refused() {
    let fixture = Fixture::without_data();
    let out = fixture.text("out");
    fs::create_dir(fixture.path("folder")).unwrap();
    fs::write(fixture.path("empty.jsonl"), "").unwrap();
    fs::copy(
        golden("hf-tiny-5/tokenizer.json"),
        fixture.path("tokenizer.json"),
    )
    .unwrap();
    let before = fixture.files();
    for (name, remedy) in [
        ("folder", "check the paths"),
        ("empty.jsonl", "name inputs with text"),
    ] {
        let input = fixture.text(name);
        let says = ["no documents found", &input, remedy];
        run(&["data", "train-tokenizer", &input, "--out", &out]).refused(1, &says);
        let tokenizer = fixture.text("tokenizer.json");
        run(&[
            "data",
            "tokenize",
            &input,
            "--tokenizer",
            &tokenizer,
            "--out",
            &out,
        ])
        .refused(1, &says);
    }
    assert_eq!(fixture.files(), before);
}

/// Replaces the one place where a shard's footer states the vocabulary by a smaller one.
fn understate_vocabulary(shard: &[u8]) -> Vec<u8> {
    let key = b"oxitron.vocab_size";
    let at = shard
        .windows(key.len())
        .rposition(|bytes| bytes == key)
        .unwrap()
        + key.len();
    let digits = (at..at + 8)
        .find(|&at| shard[at..at + 3].iter().all(u8::is_ascii_digit))
        .unwrap();
    let mut changed = shard.to_vec();
    changed[digits..digits + 3].copy_from_slice(b"300");
    changed
}

#[test]
fn shards_that_do_not_fit_are_refused_and_the_right_ones_then_train() {
    let fixture = Fixture::new();
    let config = fixture.config(ONE_STAGE);
    let shard = fixture.path("shards/shard-00000.parquet");
    let name = shard.to_str().unwrap();
    let whole = fs::read(&shard).unwrap();

    train(&config, &["--set", "model.vocab_size=300"]).refused(
        1,
        &[
            name,
            "the model has 300; set model.vocab_size to at least",
            "or tokenise with",
        ],
    );
    nothing_begun(&fixture);

    cut(&shard, whole.len() as u64 / 2);
    let says = [
        name,
        "not readable as Parquet, cut short or damaged",
        "restore the file",
    ];
    train(&config, &[]).refused(1, &says);
    nothing_begun(&fixture);
    run(&["data", "inspect", name]).refused(1, &says);
    let verified = run(&["data", "verify", name]).refused(1, &["1 problems in 1 files"]);
    assert!(
        says.iter().all(|phrase| verified.stdout.contains(phrase)),
        "{}",
        verified.stdout
    );

    fs::write(&shard, understate_vocabulary(&whole)).unwrap();
    let lock = fixture.text("understated.lock");
    let sets = [
        "--set",
        "model.vocab_size=300",
        "--set",
        &format!("data.lock={lock}"),
    ];
    train(&config, &sets).refused(
        1,
        &[
            name,
            "row group ",
            "but the vocabulary ends at 299",
            "raise model.vocab_size",
        ],
    );
    nothing_begun(&fixture);

    fs::write(&shard, whole).unwrap();
    train(&config, &[]).done();
    assert_eq!(fixture.metrics().len(), 6);
}

#[test]
fn a_sequence_longer_than_the_data_allow_is_refused() {
    let fixture = Fixture::new();
    let config = fixture.config(ONE_STAGE);
    let long = [
        "--set",
        "stage.0.seq_len=8192",
        "--set",
        "stage.0.batch_tokens=8192",
    ];
    train(&config, &long).refused(
        2,
        &[
            "`data.window_tokens` is 4096, less than `stage.0.seq_len` (8192)",
            "help: use at least",
        ],
    );
    assert!(!fixture.run_dir().exists());
    let long = [
        "--set",
        "stage.0.seq_len=65536",
        "--set",
        "stage.0.batch_tokens=65536",
    ];
    train(
        &config,
        &[&long[..], &["--set", "data.window_tokens=65536"]].concat(),
    )
    .refused(
        1,
        &[
            "seq_len 65536 is longer than the data allow",
            "\"words\" holds",
            "use a seq_len of at most",
        ],
    );
    let once = [
        "--set",
        "data.source.0.max_epochs=1",
        "--set",
        "stage.0.steps=100",
    ];
    let lock = ["--set", "data.lock=once.lock", "--set", "run.dir=once"];
    train(&config, &[&once[..], &lock].concat()).refused(
        1,
        &[
            "the data are used up",
            "left within max_epochs",
            "add data or raise max_epochs",
        ],
    );
    let written = |name: &&String| name.contains("step-");
    assert_eq!(fixture.files().iter().find(written), None);
}

#[test]
fn a_folder_that_cannot_be_written_is_refused() {
    let fixture = Fixture::without_data();
    let config = fixture.config(ONE_STAGE);
    fs::write(fixture.path("file"), "").unwrap();
    let before = fixture.files();
    let file = fixture.text("file");
    // A file where a folder should be: it stops the superuser too.
    let output = train(&config, &["--set", "run.dir=file/run"]).refused(
        1,
        &[
            &file,
            "Not a directory",
            "run.dir must be a folder that can be written",
        ],
    );
    assert_eq!(
        output.stderr.matches("Not a directory").count(),
        1,
        "{}",
        output.stderr
    );
    let hf = golden("hf-tiny-5");
    run(&[
        "convert",
        "from-hf",
        hf.to_str().unwrap(),
        &fixture.text("file/out"),
    ])
    .refused(1, &[&file, "a part of this path is a file"]);
    assert_eq!(fixture.files(), before);
    train(&config, &["--set", "checkpoint.dir=file/checkpoints"])
        .refused(1, &[&file, "a part of this path is a file"]);
    nothing_begun(&fixture);
}

/// Data that have changed are refused with the difference, or used on request, which is on record.
#[test]
#[cfg(feature = "mpi")]
fn changed_data_and_keys_are_refused_on_all_ranks_unless_they_are_allowed() {
    let fixture = Fixture::new();
    let more = ONE_STAGE
        .replace("short", "more")
        .replace("steps = 6", "steps = 4");
    let config = fixture.config(ONE_STAGE);
    train(&config, &[]).done();
    let config = fixture.config(&format!("{ONE_STAGE}{more}"));

    // The same corpus without its last documents.
    let corpus = fs::read_to_string(fixture.path("corpus.jsonl")).unwrap();
    let fewer: Vec<&str> = corpus.lines().take(200).collect();
    fs::write(fixture.path("corpus.jsonl"), fewer.join("\n")).unwrap();
    let [corpus, tokenizer, shards] =
        ["corpus.jsonl", "tokenizer", "fewer"].map(|name| fixture.text(name));
    let words = ["data", "tokenize", &corpus, "--tokenizer", &tokenizer];
    run(&[&words[..], &["--out", &shards, "--threads", "1"]].concat()).done();
    for entry in fs::read_dir(&shards).unwrap() {
        let from = entry.unwrap().path();
        let to = fixture.path("shards").join(from.file_name().unwrap());
        fs::copy(&from, &to).unwrap();
    }

    let lines = ["parquet changed: bytes", "documents 240 → 200"];
    let remedy = ["restore the files", "--allow-data-change"];
    train(&config, &[]).refused(1, &[&lines[..], &remedy].concat());
    assert_eq!(fixture.metrics().len(), 6);
    let launch = ["launch", config.to_str().unwrap(), "--ranks", "2"];
    run(&[&launch[..], &["--allow-data-change"]].concat()).done();
    assert_eq!(fixture.metrics().len(), 10);
    assert!(fixture.path("run/dataset.lock.replaced-1").exists());
    let events = || fs::read_to_string(fixture.run_dir().join("events.jsonl")).unwrap();
    let of_kind = |kind: &str| {
        let mark = format!("\"event\":\"{kind}\",\"step\":");
        let events = events();
        let found: Vec<&str> = events.lines().filter(|line| line.contains(&mark)).collect();
        assert_eq!(found.len(), 1, "{kind} in {events}");
        found[0].to_owned()
    };
    let changed = of_kind("data_changed");
    assert!(
        changed.contains("\"step\":6,") && changed.contains(lines[1]),
        "{changed}"
    );

    // These are its data now; another key has to be allowed by itself.
    let config = fixture.config(&format!(
        "{ONE_STAGE}{more}{}",
        more.replace("more", "third")
    ));
    let warmer = ["--set", "optimizer.weight_decay=0.2"];
    train(&config, &warmer).refused(2, &["optimizer.weight_decay", "--allow-config-change"]);
    train(&config, &[&warmer[..], &["--allow-config-change"]].concat()).done();
    let changed = of_kind("config_changed");
    assert!(
        changed.contains("\"step\":10,") && changed.contains("weight_decay"),
        "{changed}"
    );
    assert_eq!(fixture.metrics().len(), 14);
    of_kind("data_changed");
}

#[test]
#[cfg(feature = "mpi")]
fn more_ranks_than_samples_are_refused_before_any_starts() {
    let fixture = Fixture::without_data();
    let config = fixture.config(ONE_STAGE);
    run(&["launch", config.to_str().unwrap(), "--ranks", "5"]).refused(
        2,
        &[
            "stage \"short\": a global batch of 256 tokens holds 4 samples of 64 tokens",
            "start at most 4 ranks, or raise batch_tokens to 320",
        ],
    );
    assert_eq!(fixture.files(), ["config.toml"]);
}

#[test]
fn an_instruction_set_that_there_is_not_is_refused() {
    let fixture = Fixture::without_data();
    let config = fixture.config(ONE_STAGE);
    let arguments = ["train", config.to_str().unwrap()];
    start_with(&arguments, &[("OXITRON_SIMD", "sse9")])
        .wait()
        .refused(2, &["OXITRON_SIMD is \"sse9\"", "one of portable, avx2"]);
    nothing_begun(&fixture);
}
