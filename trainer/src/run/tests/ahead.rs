//! Runs whose steps are issued before the one before is concluded, beside those that wait.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use oxitron_data::shard::{DocumentRow, ShardHeader, ShardWriter};
use oxitron_kernels::Threads;
use oxitron_kernels::cuda::{HostWaits, devices, emulated};

use crate::comm::Comm;
use crate::config::Config;
use crate::run::trainer::{Options, Trainer};
use crate::run::{RunError, Watch};

const VOCAB: u32 = 64;

/// Documents of 5 to 35 tokens.
fn write_tokens(path: &Path) {
    let header = ShardHeader {
        tokenizer: "made".into(),
        vocab_size: VOCAB as usize,
        eos_id: 0,
    };
    let mut writer = ShardWriter::create(path, &header, 200, false).unwrap();
    for number in 0..400u32 {
        let length = 4 + number * 7 % 31;
        // Each token says a good deal about the next one.
        let mut tokens: Vec<u32> = (0..length)
            .map(|at| 1 + (number + 3 * at) % (VOCAB - 1))
            .collect();
        tokens.push(0);
        let doc_id = number.to_string();
        writer
            .push(DocumentRow {
                doc_id: &doc_id,
                source: "",
                tokens: &tokens,
                loss_weight: None,
            })
            .unwrap();
    }
    writer.finish().unwrap();
}

fn config(folder: &Path, device: &str, more: &str) -> Config {
    let text = format!(
        "[run]\nname = \"a\"\ndir = \"run\"\nseed = 5\ndevice = \"{device}\"\n\
         [model]\nfamily = \"llama\"\nvocab_size = {VOCAB}\nhidden_size = 16\n\
         intermediate_size = 24\nnum_layers = 2\nnum_heads = 2\nnum_kv_heads = 1\nhead_dim = 8\n\
         dtype = \"fp32\"\nresidual_dtype = \"fp32\"\n\
         [data]\nwindow_tokens = 1000\n[[data.source]]\nname = \"a\"\npath = \"tokens.parquet\"\n\
         [optimizer]\nlr = 1e-2\n\
         [validation]\nfraction = 0.1\nevery_steps = 9\nbatches = 1\n\
         [checkpoint]\nevery_steps = 7\n\
         [[stage]]\nname = \"short\"\nseq_len = 16\nsteps = 24\nbatch_tokens = 64\nmicro_batch = 2\n\
         [[stage]]\nname = \"long\"\nseq_len = 32\nsteps = 5\nbatch_tokens = 64\nmicro_batch = 1\n\
         {more}"
    );
    Config::from_text(&text, "test", folder, &[]).unwrap()
}

/// What is left of a run: the figures of its steps but those that measure time and memory, its
/// events but those of the thread that writes checkpoints, and the files of the last of these.
#[derive(Debug, PartialEq)]
struct Remains {
    outcome: String,
    steps: Vec<String>,
    events: Vec<String>,
    last: Vec<(String, Vec<u8>)>,
}

/// What happens to a run.
#[derive(Clone, Copy, Default)]
struct Circumstances<'a> {
    /// Beside the configuration.
    more: &'a str,
    /// It is asked to stop before it begins.
    stop: bool,
    /// As of `FAILPOINTS`.
    faults: &'a str,
}

/// Trains in a folder of its own.
fn train(circumstances: Circumstances<'_>, ahead: bool) -> Remains {
    let Circumstances { more, stop, faults } = circumstances;
    Threads::set(1).unwrap();
    crate::faults::set(faults);
    let folder = tempfile::tempdir().unwrap();
    write_tokens(&folder.path().join("tokens.parquet"));
    let config = config(folder.path(), "cpu", more);
    let stop = Arc::new(AtomicBool::new(stop));
    let options = Options {
        stop: Arc::clone(&stop),
        ..Options::default()
    };
    let comm = Comm::solo();
    let exit = Arc::new(|reason: &str| panic!("{reason}"));
    let watch = Watch::new(&config, &comm, exit, Arc::clone(&stop)).unwrap();
    let mut trainer = Trainer::open(&config, &comm, &watch, &options).unwrap();
    trainer.runs_ahead = ahead;
    let outcome = match trainer.run() {
        Ok(outcome) => format!("{outcome:?} after step {}", trainer.progress.step),
        Err(RunError::BadSteps(message)) => message,
        Err(error) => panic!("{error}"),
    };
    trainer.end_saves();
    drop(trainer);
    watch.leave();
    remains(&config, outcome)
}

fn remains(config: &Config, outcome: String) -> Remains {
    let lines = |file: &str, without: &[&str]| -> Vec<String> {
        let text = std::fs::read_to_string(config.run.dir.join(file)).unwrap();
        let line = |line: &str| {
            let mut value: serde_json::Value = serde_json::from_str(line).unwrap();
            let keys = value.as_object_mut().unwrap();
            keys.retain(|key, _| !without.contains(&key.as_str()));
            value.to_string()
        };
        text.lines().map(line).collect()
    };
    let measured = [
        "unix_seconds",
        "tokens_per_second",
        "tgs",
        "step_seconds",
        "data_wait_seconds",
        "comm_seconds",
        "exposed_comm_seconds",
        "optimizer_seconds",
        "peak_bytes",
    ];
    let mut folders: Vec<_> = std::fs::read_dir(&config.checkpoint.dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    folders.sort();
    let last = folders.last().unwrap();
    let mut files: Vec<_> = std::fs::read_dir(last)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|end| end == "safetensors"))
        .map(|path| {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            (name, std::fs::read(&path).unwrap())
        })
        .collect();
    files.sort();
    assert!(!files.is_empty());
    let mut events = lines("events.jsonl", &["unix_seconds", "seconds", "run_id"]);
    events.retain(|event| !event.contains("save_durable"));
    Remains {
        outcome,
        steps: lines("metrics.jsonl", &measured),
        events,
        last: files,
    }
}

/// Trains with and without running ahead, and expects the same remains.
fn the_same(circumstances: Circumstances<'_>) -> Remains {
    let waiting = train(circumstances, false);
    let ahead = train(circumstances, true);
    assert_eq!(waiting.steps, ahead.steps);
    assert_eq!(waiting.events, ahead.events);
    assert!(waiting == ahead);
    ahead
}

/// The steps that were not learned from.
fn skipped(remains: &Remains) -> usize {
    let steps = remains.steps.iter();
    steps
        .filter(|line| line.contains("\"skipped\":true"))
        .count()
}

#[test]
fn two_stages_with_saves_and_validation() {
    let remains = the_same(Circumstances::default());
    assert_eq!(remains.outcome, "Finished after step 29");
    assert_eq!((remains.steps.len(), skipped(&remains)), (29, 0));
    let validations = remains
        .events
        .iter()
        .filter(|line| line.contains("validation"));
    assert_eq!(validations.count(), 5);
}

#[test]
fn kernels_of_gpus_run_ahead() {
    emulated(|| the_same(Circumstances::default()));
}

#[test]
fn a_stop_is_answered_after_the_step_under_way() {
    let asked = Circumstances {
        stop: true,
        ..Circumstances::default()
    };
    let waiting = train(asked, false);
    assert_eq!(waiting.outcome, "Stopped after step 1");
    // It is known of when step 2 has been issued.
    let ahead = train(asked, true);
    assert_eq!(ahead.outcome, "Stopped after step 2");
    assert_eq!(ahead.steps[..1], waiting.steps[..]);
    assert_eq!(ahead.steps.len(), 2);
}

#[cfg(feature = "faults")]
#[test]
fn bad_steps_are_skipped() {
    let remains = the_same(Circumstances {
        faults: "step::loss=3*off->2*return(nan)->10*off->1*return(nan)->off",
        ..Circumstances::default()
    });
    assert_eq!(remains.outcome, "Finished after step 29");
    assert_eq!((remains.steps.len(), skipped(&remains)), (29, 3));
}

#[cfg(feature = "faults")]
#[test]
fn a_spike_is_told_from_the_step_before() {
    let remains = the_same(Circumstances {
        more: "[guard]\nspike_policy = \"skip\"\nspike_window = 16\nspike_zscore = 3.0\n",
        // The first step of which it can be told, and only with the step before it.
        faults: "step::loss=16*off->1*return(spike:1.5)->off",
        ..Circumstances::default()
    });
    assert_eq!(skipped(&remains), 1, "{:?}", remains.events);
    assert!(remains.steps[16].contains("\"skipped\":true"));
}

#[cfg(feature = "faults")]
#[test]
fn a_run_goes_back() {
    let remains = the_same(Circumstances {
        more: "[guard]\nspike_policy = \"rollback\"\nmax_skipped_steps = 1\n",
        faults: "step::loss=9*off->2*return(nan)->off",
        ..Circumstances::default()
    });
    // Steps 8 to 11 come twice.
    assert_eq!(remains.outcome, "Finished after step 29");
    assert_eq!((remains.steps.len(), skipped(&remains)), (33, 2));
    let rollbacks = remains
        .events
        .iter()
        .filter(|line| line.contains("rollback"));
    assert_eq!(rollbacks.count(), 1);
}

#[cfg(feature = "faults")]
#[test]
fn a_run_is_given_up() {
    let remains = the_same(Circumstances {
        more: "[guard]\nmax_skipped_steps = 1\n",
        faults: "step::gradient=9*off->2*return(nan)->off",
        ..Circumstances::default()
    });
    assert!(remains.outcome.contains("guard.max_skipped_steps is 1"));
    assert_eq!((remains.steps.len(), skipped(&remains)), (11, 2));
}

#[test]
fn no_step_waits_for_a_gpu() {
    if !devices().is_ok_and(|devices| !devices.is_empty()) {
        println!("skipped: this machine has no GPU");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    write_tokens(&folder.path().join("tokens.parquet"));
    let config = config(folder.path(), "cuda", "");
    let (comm, stop) = (Comm::solo(), Arc::new(AtomicBool::new(false)));
    let exit = Arc::new(|reason: &str| panic!("{reason}"));
    let watch = Watch::new(&config, &comm, exit, stop).unwrap();
    let mut trainer = Trainer::open(&config, &comm, &watch, &Options::default()).unwrap();
    let mut stage = trainer.begin_stage().unwrap();
    for _ in 0..3 {
        trainer.step(&mut stage).unwrap();
    }
    let waits = HostWaits::watch().unwrap();
    // Before the first save.
    for _ in 3..6 {
        trainer.step(&mut stage).unwrap();
        assert_eq!(waits.count(), 0, "step {}", trainer.progress.step);
    }
    drop(trainer);
    watch.leave();
}
