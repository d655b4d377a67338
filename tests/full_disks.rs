//! Disks that are full, forbidden or gone while a run saves.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)]

mod support;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use support::{Fixture, ONE_STAGE, Output, Running, start_with};

/// Saves are small and many; steps take a while, so that things happen in between.
const SAVES: &str = "[checkpoint]\nevery_steps = 4\nkeep = 2\n";
const PACE: &str = "step::control=return(sleep:40)";

/// Room for four checkpoints of the tiny model, and a little more.
const ROOM: &str = "size=9m";

/// `oxitron launch --ranks N` with so many steps.
fn launch(fixture: &Fixture, ranks: u32, steps: u64, more: &[&str], faults: &str) -> Running {
    let config = fixture.config(&format!("{SAVES}{ONE_STAGE}"));
    let (ranks, steps) = (ranks.to_string(), format!("stage.0.steps={steps}"));
    let fixed = ["launch", config.to_str().unwrap(), "--ranks", &ranks];
    let words = [&fixed[..], &["--set", &steps], more].concat();
    start_with(&words, &[("FAILPOINTS", faults)])
}

/// A small file system of its own, in a folder.
struct Disk {
    folder: PathBuf,
}

impl Disk {
    /// `None`, with the reason on standard error, where this user may not mount one.
    fn mount(folder: PathBuf) -> Option<Self> {
        fs::create_dir(&folder).unwrap();
        let disk = Self { folder };
        if disk.call("mount", &["-t", "tmpfs", "-o", ROOM, "tmpfs"]) {
            return Some(disk);
        }
        eprintln!("skipped: a file system cannot be mounted here; run this as root");
        None
    }

    /// Runs a command of the system on the folder; true when it has done it.
    fn call(&self, program: &str, arguments: &[&str]) -> bool {
        let mut command = Command::new(program);
        command.args(arguments).arg(&self.folder);
        command.output().is_ok_and(|output| output.status.success())
    }

    fn filler(&self) -> PathBuf {
        self.folder.join("filler")
    }

    /// Takes all the room that is left.
    fn fill(&self) {
        let mut file = fs::File::create(self.filler()).unwrap();
        let block = [0u8; 4096];
        while file.write_all(&block).is_ok() {}
    }

    fn make_room(&self) {
        fs::remove_file(self.filler()).unwrap();
    }

    /// Forbids or allows writing. The system refuses to while a file is being written.
    fn set_access(&self, access: &str) {
        let option = format!("remount,{access}");
        wait_until("remounted", || self.call("mount", &["-o", &option]));
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.call("umount", &["--lazy"]);
    }
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < Duration::from_secs(60), "not {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Whole lines of a file that may be written at this moment.
fn records(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let lines = text.lines();
    lines
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect()
}

/// The events of one kind.
fn events(run_dir: &Path, kind: &str) -> Vec<Value> {
    let mut events = records(&run_dir.join("events.jsonl"));
    events.retain(|record| record["event"] == kind);
    events
}

/// Waits for one event of a kind more than there are now.
fn wait_for_another(run_dir: &Path, kind: &str) -> Value {
    let count = events(run_dir, kind).len();
    wait_until(kind, || events(run_dir, kind).len() > count);
    events(run_dir, kind).swap_remove(count)
}

/// Steps on record.
fn steps(run_dir: &Path) -> Vec<u64> {
    let records = records(&run_dir.join("metrics.jsonl"));
    records
        .iter()
        .map(|record| record["step"].as_u64().unwrap())
        .collect()
}

/// The newest checkpoint, with every byte compared with its checksum.
fn newest_sound(place: &Path) -> u64 {
    let checkpoint = oxitron_trainer::checkpoint::find(place).unwrap();
    checkpoint.verify(&mut |_, _| {}).unwrap();
    checkpoint.meta().step
}

/// Files of saves that did not become part of a checkpoint.
fn leftovers(checkpoints: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for folder in fs::read_dir(checkpoints).unwrap() {
        let folder = folder.unwrap().path();
        if !folder.is_dir() {
            continue;
        }
        let Ok(checkpoint) = oxitron_trainer::checkpoint::Checkpoint::open(&folder) else {
            found.push(folder);
            continue;
        };
        let known: Vec<&str> = checkpoint
            .files()
            .iter()
            .map(|file| file.name.as_str())
            .collect();
        for file in fs::read_dir(&folder).unwrap() {
            let name = file.unwrap().file_name().into_string().unwrap();
            if name != "manifest.json" && !known.contains(&name.as_str()) {
                found.push(folder.join(name));
            }
        }
    }
    found
}

/// Checkpoints on a disk that is full for a while, then read-only, then without their folder.
#[test]
fn the_ranks_train_on_while_the_disk_of_checkpoints_fails() {
    const STEPS: u64 = 100;
    let fixture = Fixture::new();
    let Some(disk) = Disk::mount(fixture.path("disk")) else {
        return;
    };
    let checkpoints = disk.folder.join("checkpoints");
    let dir = format!("checkpoint.dir={}", checkpoints.display());
    let running = launch(&fixture, 2, STEPS, &["--set", &dir], PACE);
    let run_dir = fixture.run_dir();
    let failure = || {
        let failed = wait_for_another(&run_dir, "save_failed");
        failed["reason"].as_str().unwrap().to_owned()
    };
    let step_of = |event: &Value| event["step"].as_u64().unwrap();

    let before = step_of(&wait_for_another(&run_dir, "save_durable"));
    disk.fill();
    let reason = failure();
    assert!(
        reason.contains("No space left") || reason.contains("could not write its part"),
        "{reason}"
    );
    assert!(newest_sound(&checkpoints) >= before);
    disk.make_room();
    let full_no_more = wait_for_another(&run_dir, "save_durable");
    assert_eq!(newest_sound(&checkpoints), step_of(&full_no_more));

    disk.set_access("ro");
    let reason = failure();
    assert!(reason.contains("Read-only file system"), "{reason}");
    assert!(newest_sound(&checkpoints) >= step_of(&full_no_more));
    disk.set_access("rw");
    let writable = step_of(&wait_for_another(&run_dir, "save_durable"));
    assert_eq!(newest_sound(&checkpoints), writable);

    wait_until("gone", || fs::remove_dir_all(&checkpoints).is_ok());
    let anew = step_of(&wait_for_another(&run_dir, "save_durable"));
    assert!(anew > writable);
    assert_eq!(newest_sound(&checkpoints), anew);

    assert!(anew < STEPS, "the run was over before the test");
    running.wait().done();
    assert_eq!(newest_sound(&checkpoints), STEPS);
    assert_eq!(leftovers(&checkpoints), Vec::<PathBuf>::new());
    assert_eq!(steps(&run_dir), (1..=STEPS).collect::<Vec<_>>());
    let log = fs::read_to_string(run_dir.join("logs/rank-0000.log")).unwrap();
    assert!(
        log.contains("ERROR") && log.contains("could not be saved; the run goes on"),
        "{log}"
    );
}

/// The whole run directory on a disk that is full for a while.
#[test]
fn figures_that_a_rank_had_no_room_for_come_later() {
    const STEPS: u64 = 90;
    let fixture = Fixture::new();
    let Some(disk) = Disk::mount(fixture.path("disk")) else {
        return;
    };
    let running = launch(&fixture, 1, STEPS, &["--set", "run.dir=disk/run"], PACE);
    let run_dir = disk.folder.join("run");
    wait_for_another(&run_dir, "save_durable");
    disk.fill();
    // What fits into the last blocks still comes.
    wait_until("stuck", || {
        let before = steps(&run_dir).len();
        std::thread::sleep(Duration::from_millis(400));
        steps(&run_dir).len() == before
    });
    let stuck = steps(&run_dir).len() as u64;
    std::thread::sleep(Duration::from_millis(400));
    disk.make_room();
    running.wait().done();
    assert!(
        stuck + 20 < STEPS,
        "the run was over before the test: stuck at {stuck}"
    );
    assert_eq!(steps(&run_dir), (1..=STEPS).collect::<Vec<_>>());
    assert!(!events(&run_dir, "save_failed").is_empty());
    assert_eq!(events(&run_dir, "stop").len(), 1);
    assert_eq!(newest_sound(&run_dir), STEPS);
    assert_eq!(
        leftovers(&run_dir.join("checkpoints")),
        Vec::<PathBuf>::new()
    );
}

#[test]
fn a_run_directory_that_vanishes_takes_no_rank_with_it() {
    const STEPS: u64 = 40;
    let fixture = Fixture::new();
    let running = launch(&fixture, 2, STEPS, &[], PACE);
    let run_dir = fixture.run_dir();
    wait_for_another(&run_dir, "save_durable");
    wait_until("gone", || fs::remove_dir_all(&run_dir).is_ok());
    let durable = wait_for_another(&run_dir, "save_durable");
    let anew = durable["step"].as_u64().unwrap();
    assert_eq!(newest_sound(&run_dir), anew);
    assert!(anew < STEPS, "the run was over before the test");
    running.wait().done();
    assert_eq!(newest_sound(&run_dir), STEPS);
    assert_eq!(*steps(&run_dir).last().unwrap(), STEPS);
    // What is said from then on is in new logs.
    let log = fs::read_to_string(run_dir.join("logs/rank-0000.log")).unwrap();
    assert!(log.contains(&format!("step {STEPS} durable")), "{log}");
}

/// Where only one rank cannot write, the others do not wait for it.
#[test]
fn one_rank_s_full_disk_costs_one_save() {
    const STEPS: u64 = 20;
    let fixture = Fixture::new();
    // A save makes two files on a rank that does not lead: its part, and the word that it is done.
    let fault = format!("{PACE};disk::create_file::before=2*off->1*return(enospc@1)");
    launch(&fixture, 2, STEPS, &[], &fault).wait().done();
    let run_dir = fixture.run_dir();
    let failed = events(&run_dir, "save_failed");
    assert_eq!(failed.len(), 1, "{failed:?}");
    assert_eq!(failed[0]["step"], 8);
    let reason = failed[0]["reason"].as_str().unwrap();
    assert!(
        reason.contains("rank 1 could not write its part"),
        "{reason}"
    );
    let staged = events(&run_dir, "save_staged");
    let staged = staged.iter().find(|event| event["step"] == 8).unwrap();
    let seconds = |event: &Value| event["unix_seconds"].as_f64().unwrap();
    let waited = seconds(&failed[0]) - seconds(staged);
    assert!(waited < 3.0, "given up after {waited} s");
    let durable = events(&run_dir, "save_durable");
    let durable: Vec<&Value> = durable.iter().map(|event| &event["step"]).collect();
    assert_eq!(durable, [4, 12, 16, 20]);
    assert_eq!(
        leftovers(&run_dir.join("checkpoints")),
        Vec::<PathBuf>::new()
    );
    let log = fs::read_to_string(run_dir.join("logs/rank-0001.log")).unwrap();
    assert!(
        log.contains("step 8 could not be saved") && log.contains("No space left"),
        "{log}"
    );
}

/// What a run ends with must be on disk, or its exit code says that it is not.
#[test]
fn a_rank_that_cannot_write_the_last_save_fails_the_run() {
    let fixture = Fixture::new();
    let last = |step: u64| format!("the state after step {step}, the last, could not be saved");
    for fault in ["return(enospc)", "return(enospc@1)", "return(eacces@0)"] {
        let fault = format!("disk::create_file::before={fault}");
        launch(&fixture, 2, 6, &[], &fault)
            .wait()
            .refused(1, &[&last(6), "make room"]);
        let run_dir = fixture.run_dir();
        let stop = events(&run_dir, "stop");
        assert_eq!(stop.last().unwrap()["reason"], "failed", "{fault}");
        assert_eq!(stop.last().unwrap()["step"], 6, "{fault}");
    }
    // The same command finds room again and finishes.
    launch(&fixture, 2, 6, &[], "").wait().done();
    assert_eq!(newest_sound(&fixture.run_dir()), 6);

    let config = fixture.config(&format!("{SAVES}{ONE_STAGE}"));
    let words = [
        "train",
        config.to_str().unwrap(),
        "--set",
        "stage.0.steps=400",
    ];
    let words = [&words[..], &["--set", "run.dir=stopped"]].concat();
    let fault = format!("{PACE};disk::create_file::before=return(enospc)");
    let running = start_with(&words, &[("FAILPOINTS", &fault)]);
    wait_until("running", || steps(&fixture.path("stopped")).len() > 5);
    kill_process(
        Pid::from_raw(running.child.id() as i32).unwrap(),
        Signal::TERM,
    )
    .unwrap();
    let Output { code, stderr, .. } = running.wait();
    assert_eq!(code, Some(1), "{stderr}");
    assert!(
        stderr.contains("could not be saved") && stderr.contains("start again"),
        "{stderr}"
    );
}
