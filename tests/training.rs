//! Runs of the built binary: killed and resumed, stopped, on one process and on several.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)]

mod support;

use std::fs;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use support::runs::{
    assert_same_bits, events, figures, losses, ranks_of, signal, wait_for_step, wait_until_gone,
};
use support::{Fixture, ONE_STAGE, TWO_STAGES, run, start, start_with, train};

/// Steps of [`LONG`]: enough that a signal meets a run at work.
const STEPS: u64 = 60;
const LONG: [&str; 8] = [
    "--set",
    "stage.0.steps=30",
    "--set",
    "stage.1.steps=30",
    "--set",
    "stage.0.batch_tokens=512",
    "--set",
    "stage.1.batch_tokens=512",
];
const SAVE_OFTEN: &str = "[checkpoint]\nevery_steps = 4\nkeep = 2\n";

fn arguments<'a>(command: &[&'a str], dir: &'a str) -> Vec<&'a str> {
    [command, &LONG, &["--set", dir]].concat()
}

/// SIGKILL in the middle of a run and SIGTERM both leave a run that goes on bit for bit.
#[test]
fn a_run_that_was_killed_or_stopped_ends_as_if_nothing_had_happened() {
    let fixture = Fixture::new();
    let config = fixture.config(&format!("{SAVE_OFTEN}{TWO_STAGES}"));
    let command = ["train", config.to_str().unwrap()];
    run(&arguments(&command, "run.dir=calm")).done();

    let mut running = start(&arguments(&command, "run.dir=killed"));
    wait_for_step(&fixture.path("killed"), 13);
    running.child.kill().unwrap();
    assert_eq!(
        running.wait().code,
        None,
        "the run ended before it was killed"
    );
    run(&arguments(&command, "run.dir=killed")).done();
    assert_same_bits(&fixture, "calm", "killed", STEPS);
    assert_eq!(events(&fixture.path("killed"), "resume").len(), 1);

    let running = start(&arguments(&command, "run.dir=stopped"));
    wait_for_step(&fixture.path("stopped"), 31);
    signal(running.child.id(), Signal::TERM);
    assert_eq!(running.wait().code, Some(75));
    run(&arguments(&command, "run.dir=stopped")).done();
    assert_same_bits(&fixture, "calm", "stopped", STEPS);

    // Once more: everything is done already.
    let before = fs::read(fixture.path("calm/metrics.jsonl")).unwrap();
    run(&arguments(&command, "run.dir=calm")).done();
    assert_eq!(
        before,
        fs::read(fixture.path("calm/metrics.jsonl")).unwrap()
    );
}

/// Threads share out the sums of a product, always in the same way: micro-batches are so large and
/// weights so small that another number of threads gives other bits here.
#[test]
fn a_run_in_bf16_on_two_threads_repeats_to_the_bit() {
    let fixture = Fixture::new();
    let config = fixture.config(ONE_STAGE);
    let sets = [
        "model.dtype=\"bf16\"",
        "run.deterministic=true",
        "run.threads=2",
        "stage.0.seq_len=1024",
        "stage.0.batch_tokens=4096",
        "stage.0.micro_batch=4",
        "stage.0.steps=60",
    ];
    // Where other tests have the cores, a thread that waits must sleep: it is asked for thousands
    // of times.
    let patient = [("OMP_WAIT_POLICY", "passive")];
    for dir in ["run.dir=first", "run.dir=second"] {
        let sets = sets.iter().chain([&dir]).flat_map(|&set| ["--set", set]);
        let command = ["train", config.to_str().unwrap()];
        let arguments: Vec<&str> = command.into_iter().chain(sets).collect();
        start_with(&arguments, &patient).wait().done();
    }
    assert_same_bits(&fixture, "first", "second", 60);
    let losses = losses(&fixture.path("first"));
    assert!(losses[59] < 0.7 * losses[0], "it does not learn");
}

/// Both stages get longer after they are done, and end where longer ones would have ended at once.
#[test]
fn a_stage_that_got_longer_goes_on() {
    let fixture = Fixture::new();
    let config = fixture.config(TWO_STAGES);
    // A schedule that does not know how long it takes.
    let longer = |stages: &[&'static str], dir: &'static str| {
        let fixed = ["optimizer.schedule=\"constant\"", dir];
        let sets = fixed.iter().chain(stages);
        let sets = sets.flat_map(|&set| ["--set", set]);
        let arguments: Vec<&str> = sets.chain(["--allow-config-change"]).collect();
        train(&config, &arguments).done();
    };
    longer(&["stage.1.steps=7"], "run.dir=calm");
    longer(&[], "run.dir=longer");
    longer(&["stage.1.steps=7"], "run.dir=longer");
    assert_same_bits(&fixture, "calm", "longer", 11);
    assert_eq!(
        events(&fixture.path("longer"), "stage_switch").len(),
        2,
        "it did not go on in its stage"
    );
    // Shorter than it is already: done.
    longer(&["stage.1.steps=2"], "run.dir=longer");
    assert_same_bits(&fixture, "calm", "longer", 11);
}

/// A run that moves to a processor with fewer instructions goes on and says so.
#[test]
fn another_choice_of_the_machine_is_an_event() {
    let fixture = Fixture::new();
    let config = fixture.config(ONE_STAGE);
    train(&config, &[]).done();
    let longer = ["--allow-config-change", "--set", "stage.0.steps=12"];
    let arguments = [&["train", config.to_str().unwrap()], &longer[..]].concat();
    start_with(&arguments, &[("OXITRON_SIMD", "portable")])
        .wait()
        .done();
    let changed = events(&fixture.run_dir(), "choice_changed");
    let of = |choice: &str| changed.iter().find(|event| event["choice"] == choice);
    let Some(simd) = of("simd") else {
        let manifest = fixture
            .run_dir()
            .join("checkpoints/step-00000006/manifest.json");
        let manifest: serde_json::Value =
            serde_json::from_slice(&fs::read(manifest).unwrap()).unwrap();
        assert_eq!(manifest["choices"]["simd"], "portable");
        println!("skipped: this processor has the portable instructions alone");
        return;
    };
    assert_eq!(simd["after"], "portable");
    assert_eq!(of("products").unwrap()["after"], "libtorch");
    assert!(of("dtype").is_none(), "it is kept");
}

#[test]
fn stages_switch_by_themselves_with_a_checkpoint_and_validation() {
    let fixture = Fixture::new();
    let validation = "[validation]\nfraction = 0.1\nevery_steps = 3\nbatches = 2\n";
    let config = fixture.config(&format!("{SAVE_OFTEN}{validation}{TWO_STAGES}"));
    train(&config, &[]).done();
    let run_dir = fixture.run_dir();
    let switches = events(&run_dir, "stage_switch");
    assert_eq!(switches.len(), 2);
    assert_eq!(switches[1]["from"], "short");
    assert_eq!(switches[1]["to"], "long");
    assert_eq!(switches[1]["seq_len"], 128);
    assert_eq!(switches[1]["rope_base"], 40_000.0);
    let validated: Vec<u64> = events(&run_dir, "validation")
        .iter()
        .map(|event| event["step"].as_u64().unwrap())
        .collect();
    assert_eq!(validated, [3, 4, 6, 8]);
    let saved: Vec<u64> = events(&run_dir, "save_durable")
        .iter()
        .map(|event| event["step"].as_u64().unwrap())
        .collect();
    assert_eq!(saved, [4, 8]);
    let kept = fs::read_dir(run_dir.join("checkpoints")).unwrap().count();
    assert_eq!(kept, 2);

    // Each stage needs the memory that was planned for it.
    let log = fs::read_to_string(run_dir.join("logs/rank-0000.log")).unwrap();
    for stage in ["short", "long"] {
        let said = log.split(&format!("stage {stage}: memory planned ")).nth(1);
        let share = said.and_then(|rest| rest.split(['(', '%']).nth(1)).unwrap();
        let share: f64 = share.trim().parse().unwrap();
        assert!((share - 100.0).abs() <= 5.0, "stage {stage}: {share} %");
    }
}

/// What a step counts as follows from model and data, on however many ranks; a run may leave no
/// checkpoint behind at its end.
#[test]
fn utilisation_follows_a_stated_peak_and_the_end_need_not_be_saved() {
    const PEAK: f64 = 0.5e12;
    let fixture = Fixture::new();
    let config = fixture.config(TWO_STAGES);
    let config = config.to_str().unwrap();
    let sets = [
        "--set",
        "checkpoint.at_end=false",
        "--set",
        "run.peak_tflops=0.5",
    ];
    run(&[&["train", config, "--set", "run.dir=one"], &sets[..]].concat()).done();
    let two = ["launch", config, "--ranks", "2", "--set", "run.dir=two"];
    run(&[&two[..], &sets[..]].concat()).done();

    // Blocks and head; layers · heads · head_dim.
    let (weights, pairs) = (2 * 46_080 + 64 * 512, 2 * 4 * 16);
    for (dir, ranks) in [("one", 1.0), ("two", 2.0)] {
        let records = figures(&fixture.path(dir));
        assert_eq!(records.len(), 8);
        for (step, record) in records {
            let number = |key: &str| record[key].as_f64().unwrap();
            let available = number("step_seconds") * ranks * PEAK;
            let seq_len = number("seq_len");
            let products = 6.0 * f64::from(weights) * 256.0;
            let full = products + 12.0 * f64::from(pairs) * 256.0 * seq_len;
            let off = number("mfu_full") * available / full - 1.0;
            assert!(off.abs() < 1e-9, "step {step}: {off:e}");
            // Documents are shorter than samples.
            let attention = number("mfu") * available - products;
            assert!(
                attention > 0.0 && attention < (full - products) / 2.0,
                "step {step}"
            );
            assert_eq!(number("hfu"), number("mfu"));
            let counted = |dir| {
                let record = &figures(&fixture.path(dir))[&step];
                record["mfu"].as_f64().unwrap() / record["mfu_full"].as_f64().unwrap()
            };
            assert!(
                (counted("one") / counted("two") - 1.0).abs() < 1e-9,
                "step {step}"
            );
        }
    }
    let saved = events(&fixture.path("one"), "save_durable");
    let steps: Vec<u64> = saved
        .iter()
        .map(|event| event["step"].as_u64().unwrap())
        .collect();
    assert_eq!(steps, [4], "the first stage's end alone");
}

/// A damaged checkpoint is passed over with a word, and is not in the way of the older ones that the
/// run goes on to write.
#[test]
fn a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used() {
    let fixture = Fixture::new();
    let config = fixture.config(&format!("{SAVE_OFTEN}{TWO_STAGES}"));
    train(&config, &["--set", "run.dir=calm"]).done();
    train(&config, &[]).done();
    let run_dir = fixture.run_dir();
    let checkpoints = run_dir.join("checkpoints");
    let part = fs::read_dir(checkpoints.join("step-00000008")).unwrap();
    let part = part
        .map(|entry| entry.unwrap().path())
        .find(|path| path.extension().is_some_and(|kind| kind == "safetensors"))
        .unwrap();
    let mut bytes = fs::read(&part).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&part, bytes).unwrap();

    // The next attempt stops after one step, before the step of the damaged one.
    fs::write(run_dir.join("stop"), "").unwrap();
    let output = train(&config, &[]);
    assert_eq!(output.code, Some(75), "{}", output.stderr);
    let rejected = events(&run_dir, "checkpoint_rejected");
    assert_eq!(rejected.len(), 1);
    assert_eq!(rejected[0]["step"], 8);
    assert!(checkpoints.join("damaged-step-00000008").is_dir());
    assert!(!checkpoints.join("step-00000008").exists());
    assert!(checkpoints.join("step-00000005/manifest.json").is_file());

    train(&config, &[]).done();
    assert_eq!(events(&run_dir, "resume")[1]["step"], 5);
    assert_eq!(losses(&run_dir), losses(&fixture.path("calm")));
}

/// One, two and four processes, and a run that changes from one to two on its way.
#[test]
fn ranks_as_processes_train_the_same_model() {
    let fixture = Fixture::new();
    let config = fixture.config(&format!("{SAVE_OFTEN}{TWO_STAGES}"));
    let alone = ["train", config.to_str().unwrap()];
    run(&arguments(&alone, "run.dir=calm")).done();
    let expected = losses(&fixture.path("calm"));
    let assert_close = |dir: &str| {
        let found = losses(&fixture.path(dir));
        assert_eq!(found.len(), expected.len());
        for (step, (a, b)) in expected.iter().zip(&found).enumerate() {
            let error = (b / a - 1.0).abs();
            assert!(
                error <= 1e-5,
                "{dir}: loss of step {step} differs by {error:e}"
            );
        }
    };
    for ranks in ["2", "4"] {
        let launch = ["launch", config.to_str().unwrap(), "--ranks", ranks];
        let dir = format!("run.dir=ranks-{ranks}");
        run(&arguments(&launch, &dir)).done();
        assert_close(&format!("ranks-{ranks}"));
    }

    let mut running = start(&arguments(&alone, "run.dir=moved"));
    wait_for_step(&fixture.path("moved"), 9);
    running.child.kill().unwrap();
    assert_eq!(
        running.wait().code,
        None,
        "the run ended before it was killed"
    );
    let launch = ["launch", config.to_str().unwrap(), "--ranks", "2"];
    run(&arguments(&launch, "run.dir=moved")).done();
    assert_close("moved");
}

/// A run changes the number of ranks and what they share on its way: its checkpoints know neither.
#[test]
fn ranks_and_sharding_may_change_in_a_run() {
    let fixture = Fixture::new();
    let config = fixture.config(&format!("{SAVE_OFTEN}{TWO_STAGES}"));
    let config = config.to_str().unwrap();
    run(&arguments(&["train", config], "run.dir=calm")).done();
    let four = ["launch", config, "--ranks", "4"];
    let hybrid = [
        "--set",
        "parallel.zero_stage=3",
        "--set",
        "parallel.shard_size=2",
    ];
    let running = start(&[&arguments(&four, "run.dir=changed")[..], &hybrid].concat());
    wait_for_step(&fixture.path("changed"), 9);
    signal(running.child.id(), Signal::TERM);
    assert_eq!(running.wait().code, Some(75));
    let two = ["launch", config, "--ranks", "2"];
    let sliced = ["--set", "parallel.zero_stage=2"];
    run(&[&arguments(&two, "run.dir=changed")[..], &sliced].concat()).done();
    let (calm, changed) = (
        losses(&fixture.path("calm")),
        losses(&fixture.path("changed")),
    );
    assert_eq!(calm.len(), changed.len());
    for (step, (a, b)) in calm.iter().zip(&changed).enumerate() {
        let error = (b / a - 1.0).abs();
        assert!(error <= 1e-5, "loss of step {step} differs by {error:e}");
    }
}

const ENDLESS: [&str; 4] = [
    "--set",
    "stage.0.steps=100000",
    "--set",
    "stage.1.batch_tokens=512",
];

#[test]
fn a_dead_rank_ends_the_launch_and_is_named() {
    let fixture = Fixture::new();
    let config = fixture.config(TWO_STAGES);
    let running = start(
        &[
            &["launch", config.to_str().unwrap(), "--ranks", "3"][..],
            &ENDLESS,
        ]
        .concat(),
    );
    wait_for_step(&fixture.run_dir(), 3);
    let victim = ranks_of(&config)
        .into_iter()
        .find(|&(_, rank)| rank == 1)
        .unwrap();
    let killed = Instant::now();
    signal(victim.0, Signal::KILL);
    let output = running.wait();
    assert!(
        killed.elapsed() < Duration::from_secs(10),
        "{:?}",
        killed.elapsed()
    );
    output.refused(1, &["rank 1"]);
    wait_until_gone(&config);
}

#[test]
fn no_rank_outlives_a_killed_launcher() {
    let fixture = Fixture::new();
    let config = fixture.config(TWO_STAGES);
    let mut running = start(
        &[
            &["launch", config.to_str().unwrap(), "--ranks", "2"][..],
            &ENDLESS,
        ]
        .concat(),
    );
    wait_for_step(&fixture.run_dir(), 3);
    assert_eq!(ranks_of(&config).len(), 2);
    running.child.kill().unwrap();
    assert_eq!(running.wait().code, None);
    wait_until_gone(&config);
}
