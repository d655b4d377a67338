//! Requests to stop: at any moment, on any rank, in long steps too.
//!
//! Whatever asks, the end is the same: exit code 75, a checkpoint of one step on all ranks, nobody
//! left behind, and a resumed run that ends bit for bit like one that nobody disturbed.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use support::runs::{
    assert_same_bits, events, rank_of, ranks_of, signal, wait_for_event, wait_for_step,
    wait_until_gone,
};
use support::{Fixture, ONE_STAGE, Running, TWO_STAGES, run, start_with};

/// Steps of [`short`].
const STEPS: u64 = 8;

/// Two stages of four steps, with saves after steps 3, 4, 6 and 8.
fn short(fixture: &Fixture) -> PathBuf {
    let config = fixture.config(&format!("[checkpoint]\nevery_steps = 3\n{TWO_STAGES}"));
    let text = fs::read_to_string(&config).unwrap();
    // One sample for each of four ranks, whatever its length.
    let (first, second) = text.rsplit_once("batch_tokens = 256").unwrap();
    fs::write(&config, format!("{first}batch_tokens = 512{second}")).unwrap();
    config
}

/// The arguments of `oxitron train`, or of `oxitron launch` on four ranks.
fn arguments(config: &Path, alone: bool, dir: &str, more: &[&str]) -> Vec<String> {
    let config = config.to_str().unwrap();
    let command = if alone {
        vec!["train", config]
    } else {
        vec!["launch", config, "--ranks", "4"]
    };
    let dir = format!("run.dir={dir}");
    let set = ["--set", &dir];
    let words = command.iter().chain(&set).chain(more);
    words.map(|&word| word.to_owned()).collect()
}

fn start_with_faults(arguments: &[String], faults: &str) -> Running {
    start_with(arguments, &[("FAILPOINTS", faults)])
}

/// Asserts that the run ends as one that was asked to, and goes on to the end of the calm one.
#[track_caller]
fn assert_stops_and_goes_on(fixture: &Fixture, running: Running, dir: &str) {
    let config = fixture.path("config.toml");
    let output = running.wait();
    assert_eq!(output.code, Some(75), "{dir}: {}", output.stderr);
    wait_until_gone(&config);
    run(&arguments(&config, false, dir, &[])).done();
    assert_same_bits(fixture, "calm", dir, STEPS);
}

/// The step that the second attempt of a run began after.
fn resumed_after(run_dir: &Path) -> u64 {
    let resumes = events(run_dir, "resume");
    assert_eq!(resumes.len(), 1, "{resumes:?}");
    resumes[0]["step"].as_u64().unwrap()
}

/// In the middle of a step, during a save, at a stage switch; one rank, all of them, the launcher.
#[test]
fn ranks_stop_together_whichever_is_asked_and_when() {
    let fixture = Fixture::new();
    let config = short(&fixture);
    run(&arguments(&config, false, "calm", &[])).done();
    let begin = |dir: &str, faults: &str, more: &[&str]| {
        start_with_faults(&arguments(&config, false, dir, more), faults)
    };

    let running = begin("step", "step::forward=return(sleep:50)", &[]);
    wait_for_step(&fixture.path("step"), 2);
    sleep(Duration::from_millis(100));
    signal(rank_of(&config, 2), Signal::TERM);
    assert_stops_and_goes_on(&fixture, running, "step");
    assert!(resumed_after(&fixture.path("step")) < 5);

    // A scheduler signals every rank; the request of the first is everywhere before the last is.
    let running = begin("all", "step::forward=return(sleep:500#3)", &[]);
    wait_for_step(&fixture.path("all"), 2);
    let ranks = [0, 1, 2, 3].map(|rank| rank_of(&config, rank));
    for pid in ranks {
        signal(pid, Signal::USR1);
        sleep(Duration::from_millis(400));
    }
    assert_stops_and_goes_on(&fixture, running, "all");
    assert_eq!(resumed_after(&fixture.path("all")), 3);

    let running = begin("save", "disk::write::before=return(sleep:30)", &[]);
    let run_dir = fixture.path("save");
    wait_for_event(&run_dir, "save_staged", |event| event["step"] == 3);
    signal(rank_of(&config, 3), Signal::TERM);
    assert!(events(&run_dir, "save_durable").is_empty(), "too late");
    assert_stops_and_goes_on(&fixture, running, "save");
    assert!(resumed_after(&run_dir) < STEPS);

    let running = begin("switch", "step::forward=return(sleep:300#4)", &[]);
    wait_for_step(&fixture.path("switch"), 3);
    sleep(Duration::from_millis(200));
    signal(rank_of(&config, 0), Signal::TERM);
    assert_stops_and_goes_on(&fixture, running, "switch");
    assert_eq!(resumed_after(&fixture.path("switch")), 4);
    let switches = events(&fixture.path("switch"), "stage_switch");
    assert_eq!(switches[1]["attempt"], 2, "{switches:?}");

    let slow = "step::forward=return(sleep:200)";
    let running = begin("limit", slow, &["--set", "run.time_limit=1"]);
    assert_stops_and_goes_on(&fixture, running, "limit");
    assert!(resumed_after(&fixture.path("limit")) < STEPS);

    // The processes are there, but none has come as far as to hear signals.
    let running = begin("launcher", slow, &[]);
    let began = Instant::now();
    while ranks_of(&config).is_empty() {
        assert!(began.elapsed() < Duration::from_secs(60), "no rank");
        sleep(Duration::from_millis(1));
    }
    signal(running.child.id(), Signal::USR1);
    assert_stops_and_goes_on(&fixture, running, "launcher");
    assert_eq!(resumed_after(&fixture.path("launcher")), 1);
}

/// A run in a step that would take more than a minute.
struct Stuck {
    name: &'static str,
    alone: bool,
    more: &'static [&'static str],
    /// Whom to signal; without, a file asks.
    rank: Option<usize>,
    /// From the request to the end, at most.
    limit: Duration,
}

/// Seconds after the request, and not at the end of the step.
const ENDS: Duration = Duration::from_secs(25);

const STUCK: [Stuck; 4] = [
    Stuck {
        name: "replicated",
        alone: false,
        more: &[],
        rank: Some(2),
        limit: ENDS,
    },
    // The state that is kept has been saved already, after the step that made it.
    Stuck {
        name: "sharded",
        alone: false,
        more: &[
            "--set",
            "parallel.zero_stage=3",
            "--set",
            "checkpoint.every_steps=1",
        ],
        rank: Some(1),
        limit: ENDS,
    },
    Stuck {
        name: "alone",
        alone: true,
        more: &[],
        rank: Some(0),
        limit: ENDS,
    },
    Stuck {
        name: "file",
        alone: false,
        more: &["--set", "guard.stop_grace=2s"],
        rank: None,
        limit: Duration::from_secs(17),
    },
];

impl Stuck {
    /// A config of its own, by which its processes are known.
    fn config(&self, fixture: &Fixture) -> PathBuf {
        let config = fixture.path(&format!("{}.toml", self.name));
        fs::copy(fixture.path("config.toml"), &config).unwrap();
        config
    }

    /// 32 samples, in micro-batches of one, go through four layers.
    fn faults(&self) -> &'static str {
        if self.alone {
            "step::forward=return(sleep:500#4)"
        } else {
            "step::forward=return(sleep:2000#4)"
        }
    }

    fn stop(&self, fixture: &Fixture) {
        let config = self.config(fixture);
        let arguments = arguments(&config, self.alone, self.name, self.more);
        let running = start_with_faults(&arguments, self.faults());
        let run_dir = fixture.path(self.name);
        wait_for_step(&run_dir, 3);
        sleep(Duration::from_millis(500));
        let asked = Instant::now();
        match self.rank {
            Some(_) if self.alone => signal(running.child.id(), Signal::TERM),
            Some(rank) => signal(rank_of(&config, rank), Signal::TERM),
            None => fs::write(run_dir.join("stop"), "").unwrap(),
        }
        let output = running.wait();
        let seconds = asked.elapsed();
        println!("{}: ended {seconds:.1?} after the request", self.name);
        assert_eq!(output.code, Some(75), "{}: {}", self.name, output.stderr);
        assert!(seconds < self.limit, "{}: {seconds:?}", self.name);
        assert!(!run_dir.join("stop").exists());
        wait_until_gone(&config);
    }

    fn go_on(&self, fixture: &Fixture) {
        let config = self.config(fixture);
        let calm = format!("{}-calm", self.name);
        for dir in [self.name, &calm] {
            run(&arguments(&config, self.alone, dir, self.more)).done();
        }
        assert_eq!(resumed_after(&fixture.path(self.name)), 3, "{}", self.name);
        assert_same_bits(fixture, &calm, self.name, 5);
    }
}

#[test]
fn ranks_do_not_wait_for_the_end_of_a_step_of_a_minute() {
    let fixture = Fixture::new();
    let config = fixture.config(ONE_STAGE);
    let text = fs::read_to_string(&config).unwrap();
    let text = text.replace("steps = 6", "steps = 5");
    fs::write(&config, text.replace("= 256", "= 2048")).unwrap();
    // They sleep most of the time, so they can do it together.
    std::thread::scope(|scope| {
        for stuck in &STUCK {
            scope.spawn(|| stuck.stop(&fixture));
        }
    });
    for stuck in &STUCK {
        stuck.go_on(&fixture);
    }
}

/// Impatience costs what came after the last checkpoint, and nothing else.
#[test]
fn a_second_signal_ends_ranks_at_once_and_harms_nothing() {
    let fixture = Fixture::new();
    let config = short(&fixture);
    for alone in [true, false] {
        let (calm, dir) = if alone {
            ("calm-alone", "alone")
        } else {
            ("calm", "ranks")
        };
        run(&arguments(&config, alone, calm, &[])).done();
        let again = arguments(&config, alone, dir, &[]);
        // In the middle of the save after step 4, with the one after step 3 complete.
        let faults = "disk::write::before=return(sleep:40)";
        let running = start_with_faults(&again, faults);
        let run_dir = fixture.path(dir);
        wait_for_event(&run_dir, "save_durable", |event| event["step"] == 3);
        wait_for_event(&run_dir, "save_staged", |event| event["step"] == 4);
        let pid = running.child.id();
        signal(pid, Signal::TERM);
        sleep(Duration::from_millis(100));
        let asked = Instant::now();
        signal(pid, Signal::TERM);
        let output = running.wait();
        let seconds = asked.elapsed();
        println!("{dir}: ended {seconds:.1?} after the second signal");
        assert_eq!(output.code, Some(1), "{}", output.stderr);
        assert!(seconds < Duration::from_secs(3), "{seconds:?}");
        wait_until_gone(&config);
        run(&again).done();
        assert_eq!(resumed_after(&run_dir), 3);
        assert_same_bits(&fixture, calm, dir, STEPS);
    }
}
