//! Steps that must not be applied, in real runs.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use oxitron_trainer::checkpoint::{self, Checkpoint, folder_name};
use oxitron_trainer::metrics::{Event, History};
use rustix::process::{Pid, Signal, kill_process};
use support::runs::{checkpoint, tensors};
use support::{Fixture, ONE_STAGE, Output, TWO_STAGES, run, start_with};

/// Samples of a step.
const BATCH: u64 = 4;

/// Steps of the runs that meet a spike, the step that is one, and the checkpoint before it.
const STEPS: u64 = 24;
const SPIKE: u64 = 19;
const BEFORE: u64 = 16;

/// Saves, and goes back to what was saved.
const GOES_BACK: &str = r#"
[checkpoint]
every_steps = 4
keep = 20
async = false

[guard]
spike_policy = "rollback"
spike_window = 16

[[stage]]
name = "short"
seq_len = 64
steps = 24
batch_tokens = 256
"#;

/// A spike on rank 0 in the step of this number, counted from where the processes start. It comes
/// once, though the run goes back and takes a step of this number again.
fn spike_at(visit: u64) -> String {
    format!("step::loss={}*off->1*return(spike:100@0)", visit - 1)
}

/// `oxitron launch --ranks N` of `config` into the run directory `dir`.
fn launch(config: &Path, dir: &str, ranks: u32, more: &[&str], faults: &str) -> Output {
    let (ranks, dir) = (ranks.to_string(), format!("run.dir={dir}"));
    let fixed = ["launch", config.to_str().unwrap(), "--ranks", &ranks];
    let words = [&fixed[..], &["--set", &dir], more].concat();
    start_with(&words, &[("FAILPOINTS", faults)]).wait()
}

/// The figures by step that do not depend on time, the last where a step was taken again.
fn figures(run_dir: &Path) -> BTreeMap<u64, [u64; 4]> {
    let history = History::read(run_dir).unwrap();
    let figures = history.steps.iter().map(|record| {
        let bits = [
            record.loss.to_bits(),
            record.grad_norm.to_bits(),
            record.lr.to_bits(),
            record.target_tokens,
        ];
        (record.step, bits)
    });
    figures.collect()
}

fn events(run_dir: &Path) -> Vec<Event> {
    let history = History::read(run_dir).unwrap();
    history
        .events
        .into_iter()
        .map(|record| record.event)
        .collect()
}

/// One rank's loss or gradient that is not a number is nobody's update.
#[test]
fn what_is_not_finite_on_one_rank_changes_no_weight_on_any() {
    let fixture = Fixture::new();
    let extra = format!("[checkpoint]\nevery_steps = 1\nkeep = 20\n{ONE_STAGE}");
    let config = fixture.config(&extra);
    for (point, reason) in [
        ("step::loss", "the loss is not finite"),
        ("step::gradient", "the gradient norm is not finite"),
    ] {
        let dir = point.replace("::", "-");
        let fault = format!("{point}=return(nan@1#5)");
        launch(&config, &dir, 2, &[], &fault).done();
        let run_dir = fixture.path(&dir);

        let [before, skipped, after] = [4, 5, 6].map(|step| checkpoint(&run_dir, step));
        assert!(
            tensors(&before) == tensors(&skipped),
            "{point}: step 5 changed something"
        );
        assert!(
            tensors(&skipped) != tensors(&after),
            "{point}: step 6 changed nothing"
        );
        let adam = |checkpoint: &Checkpoint| checkpoint.meta().schedule.adam_step;
        assert_eq!([&before, &skipped, &after].map(adam), [4, 4, 5]);
        let listed = &after.meta().skipped;
        let listed: Vec<_> = listed
            .iter()
            .map(|s| (s.step, s.first_sample, s.samples))
            .collect();
        assert_eq!(listed, [(5, 4 * BATCH, BATCH)]);

        let history = History::read(&run_dir).unwrap();
        let skips: Vec<bool> = history.steps.iter().map(|record| record.skipped).collect();
        assert_eq!(skips, [false, false, false, false, true, false], "{point}");
        let found = events(&run_dir).into_iter().find_map(|event| match event {
            Event::Skip {
                step,
                reason,
                first_sample,
                end_sample,
            } => Some((step, reason, first_sample..end_sample)),
            _ => None,
        });
        let (step, text, samples) = found.expect("an event");
        assert_eq!((step, samples), (5, 4 * BATCH..5 * BATCH));
        assert!(
            text.contains(reason) && text.contains("samples 16 to 19"),
            "{text}"
        );
    }
}

#[test]
fn samples_are_left_out_alike_on_any_number_of_ranks() {
    let fixture = Fixture::new();
    let config = fixture.config(ONE_STAGE);
    let run_dir = |dir: &str| fixture.path(dir);
    // A first step that is skipped leaves the initial weights to the samples of the second.
    launch(&config, "skipped", 1, &[], "step::loss=return(nan#1)").done();
    let leave_out = ["--set", "guard.skip_samples=[[0, 4]]"];
    launch(&config, "one", 1, &leave_out, "").done();
    let (skipped, one) = (figures(&run_dir("skipped")), figures(&run_dir("one")));
    let loss = |figures: [u64; 4]| [figures[0], figures[1], figures[3]];
    assert_eq!(loss(one[&1]), loss(skipped[&2]));
    // Ranges that begin and end inside a batch, and that lie in one.
    let ragged = ["--set", "guard.skip_samples=[[2, 7], [12, 13]]"];
    launch(&config, "ragged-1", 1, &ragged, "").done();
    launch(&config, "ragged-2", 2, &ragged, "").done();
    let (one, two) = (figures(&run_dir("ragged-1")), figures(&run_dir("ragged-2")));
    assert_ne!(one[&1], skipped[&1]);
    for (step, figures) in &one {
        assert_eq!(figures[3], two[step][3], "targets of step {step}");
        let [a, b] = [figures[0], two[step][0]].map(f64::from_bits);
        assert!((a - b).abs() < 1e-5 * a.abs(), "step {step}: {a} and {b}");
    }
}

/// The run goes back, and from there on is the run that never met those samples, bit for bit;
/// whatever kills it on the way back.
#[test]
fn a_spike_on_a_rank_takes_the_run_back_to_before_it() {
    let fixture = Fixture::new();
    let config = fixture.config(GOES_BACK);
    let left_out = BEFORE * BATCH..SPIKE * BATCH;
    let spike = spike_at(SPIKE);
    let beside = ["--set", "checkpoint.async=true"];
    launch(&config, "back", 2, &beside, &spike).done();
    let back = fixture.path("back");
    let rollbacks: Vec<Event> = events(&back)
        .into_iter()
        .filter(|event| matches!(event, Event::Rollback { .. }))
        .collect();
    let [
        Event::Rollback {
            step,
            to_step,
            first_sample,
            end_sample,
            reason,
        },
    ] = &rollbacks[..]
    else {
        panic!("{rollbacks:?}");
    };
    assert_eq!((*step, *to_step), (SPIKE, BEFORE));
    assert_eq!(*first_sample..*end_sample, left_out);
    assert!(reason.contains("standard deviations above"), "{reason}");
    for step in [BEFORE, 20, STEPS] {
        let meta = checkpoint(&back, step).meta().clone();
        assert_eq!(
            meta.left_out,
            [[left_out.start, left_out.end]],
            "step {step}"
        );
        assert_eq!(meta.guard.bad_steps.rollbacks, 1);
    }
    // Before the spike nothing was left out.
    assert_eq!(checkpoint(&back, 12).meta().left_out, [[0; 2]; 0]);

    launch(&config, "never", 2, &["--set", &leave_out(&left_out)], "").done();
    let calm = figures(&fixture.path("never"));
    assert_eq!(calm.len() as u64, STEPS);
    assert_eq!(figures(&back), calm);
    let end = |dir: &str| tensors(&checkpoint(&fixture.path(dir), STEPS));
    assert!(end("back") == end("never"), "other weights");

    // Where the checkpoint cannot be changed, the next one says what is left out.
    let full = format!("{spike};disk::rename::before=return(enospc@0#{SPIKE})");
    launch(&config, "full", 2, &[], &full).done();
    assert_eq!(left_out_at(&fixture.path("full"), BEFORE), [[0; 2]; 0]);
    let told = left_out_at(&fixture.path("full"), 20);
    assert_eq!(told, [[left_out.start, left_out.end]]);
    assert_eq!(figures(&fixture.path("full")), calm);

    // Killed before the checkpoint is changed, the run comes to the spike again and decides again;
    // killed after it, it has decided.
    let again = spike_at(SPIKE - BEFORE);
    let kill = |point: &str| format!("{spike};{point}=return(kill@0#{SPIKE})");
    let first_step_after = format!("{spike};step::control={SPIKE}*off->1*return(kill@1)");
    for (dir, faults, then) in [
        ("undecided", kill("disk::rename::before"), &again[..]),
        ("decided", kill("disk::rename::after"), ""),
        ("gone-back", first_step_after, ""),
    ] {
        launch(&config, dir, 2, &[], &faults).refused(1, &["SIGKILL"]);
        assert_eq!(newest(&fixture.path(dir)), BEFORE, "{dir}");
        launch(&config, dir, 2, &[], then).done();
        assert_eq!(figures(&fixture.path(dir)), calm, "{dir}");
        assert!(end(dir) == end("never"), "{dir}: other weights");
    }
}

/// The step of the newest checkpoint.
fn newest(run_dir: &Path) -> u64 {
    checkpoint::find(run_dir).unwrap().meta().step
}

/// The samples that the manifest of a step leaves out.
fn left_out_at(run_dir: &Path, step: u64) -> Vec<[u64; 2]> {
    checkpoint(run_dir, step).meta().left_out.clone()
}

/// Where the newest checkpoint has gone bad meanwhile, the run goes back to the one before it and
/// leaves nothing of the branch that it abandons.
#[test]
fn a_damaged_checkpoint_is_no_place_for_a_rank_to_go_back_to() {
    const OLDER: u64 = 12;
    let fixture = Fixture::new();
    let config = fixture.config(GOES_BACK);
    let left_out = OLDER * BATCH..SPIKE * BATCH;
    launch(&config, "never", 1, &["--set", &leave_out(&left_out)], "").done();
    let calm = figures(&fixture.path("never"));

    let pause = format!("step::control={BEFORE}*off->1*return(stop)");
    let damaged = |dir: &str, faults: &str| {
        let dir_key = format!("run.dir={dir}");
        let words = ["train", config.to_str().unwrap(), "--set", &dir_key];
        let faults = format!("{};{pause};{faults}", spike_at(SPIKE));
        let running = start_with(&words, &[("FAILPOINTS", &faults)]);
        let process = running.child.id();
        wait_until(|| is_stopped(process));
        let checkpoints = fixture.path(dir).join("checkpoints");
        damage_payload(&checkpoints.join(folder_name(BEFORE)));
        kill_process(Pid::from_raw(process as i32).unwrap(), Signal::CONT).unwrap();
        running.wait()
    };

    damaged("back", "").done();
    let back = fixture.path("back");
    let told: Vec<Event> = events(&back)
        .into_iter()
        .filter(|event| {
            matches!(
                event,
                Event::CheckpointRejected { .. } | Event::Rollback { .. }
            )
        })
        .collect();
    let [
        Event::CheckpointRejected {
            step: rejected,
            reason,
        },
        Event::Rollback {
            to_step,
            first_sample,
            end_sample,
            ..
        },
    ] = &told[..]
    else {
        panic!("{told:?}");
    };
    assert_eq!((*rejected, *to_step), (BEFORE, OLDER));
    assert!(reason.contains("checksum"), "{reason}");
    assert_eq!(*first_sample..*end_sample, left_out);
    assert_eq!(figures(&back), calm);
    // The checkpoint of that step is one of the branch that the run is on now.
    for step in [OLDER, BEFORE, STEPS] {
        let expected = [[left_out.start, left_out.end]];
        assert_eq!(left_out_at(&back, step), expected, "step {step}");
    }

    // Killed when it has decided and the damaged one is still there.
    let kill = format!("disk::remove_file::before=return(kill#{SPIKE})");
    assert_eq!(damaged("killed", &kill).code, None);
    let killed = fixture.path("killed");
    assert_eq!(
        left_out_at(&killed, OLDER),
        [[left_out.start, left_out.end]]
    );
    launch(&config, "killed", 1, &[], "").done();
    assert_eq!(figures(&killed), calm);
}

/// Whether a process stands still, as SIGSTOP makes it.
fn is_stopped(process: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    status.contains("\nState:\tT")
}

/// Turns a byte in the middle of the largest file of a checkpoint.
fn damage_payload(folder: &Path) {
    let files = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let payload = files
        .max_by_key(|path| fs::metadata(path).unwrap().len())
        .unwrap();
    let mut bytes = fs::read(&payload).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    fs::write(&payload, bytes).unwrap();
}

fn wait_until(mut condition: impl FnMut() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(
            began.elapsed() < Duration::from_secs(60),
            "it does not come"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A `--set` that leaves samples out.
fn leave_out(samples: &Range<u64>) -> String {
    format!("guard.skip_samples=[[{}, {}]]", samples.start, samples.end)
}

#[test]
fn a_run_on_ranks_ends_when_skipping_and_going_back_do_not_help() {
    let fixture = Fixture::new();
    let config = fixture.config(GOES_BACK);
    let skips = ["--set", "guard.spike_policy=\"skip\""];
    launch(&config, "skips", 1, &skips, &spike_at(SPIKE)).done();
    let skipped = |event: &Event| matches!(event, Event::Skip { step: SPIKE, .. });
    let told = events(&fixture.path("skips"));
    assert_eq!(told.iter().filter(|event| skipped(event)).count(), 1);
    assert!(
        !told
            .iter()
            .any(|event| matches!(event, Event::Rollback { .. }))
    );
    assert_eq!(figures(&fixture.path("skips")).len() as u64, STEPS);

    let spikes = format!("step::loss={}*off->return(spike:100@0)", SPIKE - 1);
    let once = ["--set", "guard.max_rollbacks=1"];
    launch(&config, "spikes", 2, &once, &spikes).refused(
        1,
        &[
            "step 17 (samples 76 to 79",
            "standard deviations above",
            "has gone back to a checkpoint once, and guard.max_rollbacks is 1",
            "--set 'guard.skip_samples=[[64, 80]]'",
        ],
    );

    let bad = [
        "--set",
        "guard.max_skipped_steps=2",
        "--set",
        "guard.spike_policy=\"off\"",
    ];
    launch(&config, "bad", 2, &bad, "step::loss=4*off->return(nan@1)").refused(
        1,
        &[
            "step 7 (samples 24 to 27",
            "the loss is not finite",
            "step number 3 in a row that must be skipped, and guard.max_skipped_steps is 2",
            "--set 'guard.skip_samples=[[16, 28]]'",
        ],
    );
    // As the message says.
    let remedy = [&bad[..], &["--set", "guard.skip_samples=[[16, 28]]"]].concat();
    launch(&config, "bad", 2, &remedy, "").done();
    launch(&config, "good", 2, &remedy, "").done();
    assert_eq!(
        figures(&fixture.path("bad")),
        figures(&fixture.path("good"))
    );
}

/// A run without more stages is done; with one more it goes on as if it had always had it.
#[test]
fn a_finished_run_on_ranks_trains_the_stage_that_is_added() {
    let fixture = Fixture::new();
    let (first, _) = TWO_STAGES.split_at(TWO_STAGES.rfind("[[stage]]").unwrap());
    launch(&fixture.config(first), "grown", 2, &[], "").done();
    let grown = fixture.path("grown");
    assert_eq!(figures(&grown).len(), 4);
    let nothing = launch(&fixture.config(first), "grown", 2, &[], "").done();
    assert_eq!(figures(&grown).len(), 4, "{}", nothing.stderr);

    let config = fixture.config(TWO_STAGES);
    launch(&config, "grown", 2, &[], "").done();
    launch(&config, "whole", 2, &[], "").done();
    let whole = figures(&fixture.path("whole"));
    assert_eq!(whole.len(), 8);
    assert_eq!(figures(&grown), whole);
    let end = |dir: &str| tensors(&checkpoint(&fixture.path(dir), 8));
    assert!(end("grown") == end("whole"), "other weights");
}

/// The checkpoint to go back to may know the data as they were before they were changed.
#[test]
fn ranks_go_back_to_before_their_data_changed() {
    let fixture = Fixture::new();
    let config = fixture.config(GOES_BACK);
    let kill = format!("step::control={}*off->1*return(kill@0)", BEFORE + 1);
    launch(&config, "back", 2, &[], &kill).refused(1, &["SIGKILL"]);
    copy_folder(&fixture.path("back"), &fixture.path("never"));

    let corpus = fs::read_to_string(fixture.path("corpus.jsonl")).unwrap();
    let (first, _) = corpus.split_at(corpus.rfind('{').unwrap());
    fs::write(fixture.path("corpus.jsonl"), first).unwrap();
    fs::remove_dir_all(fixture.path("shards")).unwrap();
    let [corpus, tokenizer, shards] =
        ["corpus.jsonl", "tokenizer", "shards"].map(|name| fixture.text(name));
    let words = ["data", "tokenize", &corpus, "--tokenizer", &tokenizer];
    run(&[&words[..], &["--out", &shards, "--threads", "1"]].concat()).done();

    let allowed = ["--allow-data-change"];
    let again = spike_at(SPIKE - BEFORE);
    launch(&config, "back", 2, &allowed, &again).done();
    let told = events(&fixture.path("back"));
    let count = |wanted: fn(&Event) -> bool| told.iter().filter(|event| wanted(event)).count();
    assert_eq!(count(|event| matches!(event, Event::Rollback { .. })), 1);
    assert_eq!(
        count(|event| matches!(event, Event::DataChanged { step: BEFORE, .. })),
        2
    );
    let never = leave_out(&(BEFORE * BATCH..SPIKE * BATCH));
    let never = [&allowed[..], &["--set", &never]].concat();
    launch(&config, "never", 2, &never, "").done();
    let calm = figures(&fixture.path("never"));
    assert_eq!(calm.len() as u64, STEPS);
    assert_eq!(figures(&fixture.path("back")), calm);
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_folder(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}
