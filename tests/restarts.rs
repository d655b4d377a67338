//! Runs of the built binary that go on after a failure without anybody's help.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use oxitron_trainer::metrics::{Event, History};
use rustix::process::{Pid, Signal, kill_process};
use support::{Fixture, ONE_STAGE, Output, Running, run, start_with};

/// Enough steps that a signal meets a run at work.
const STEPS: u64 = 160;
const SAVES: &str = "[checkpoint]\nevery_steps = 8\n";

/// `oxitron launch` of the fixture's config into the run directory `dir`.
fn launch(fixture: &Fixture, dir: &str, more: &[&str]) -> Vec<String> {
    let config = fixture.config(&format!("{ONE_STAGE}{SAVES}"));
    let (dir, steps) = (format!("run.dir={dir}"), format!("stage.0.steps={STEPS}"));
    let fixed = [
        "launch",
        config.to_str().unwrap(),
        "--set",
        &dir,
        "--set",
        &steps,
    ];
    let words = fixed.iter().chain(more);
    words.map(|&word| word.to_owned()).collect()
}

/// Waits until so many steps are on record.
fn wait_for_step(run_dir: &Path, step: usize) {
    let began = Instant::now();
    let steps = || fs::read_to_string(run_dir.join("metrics.jsonl")).unwrap_or_default();
    while steps().lines().count() < step {
        assert!(began.elapsed() < Duration::from_secs(60), "no step {step}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The process of a rank that trains by this config.
fn rank(fixture: &Fixture, rank: usize) -> Pid {
    let config = fixture.path("config.toml").canonicalize().unwrap();
    let config = config.to_str().unwrap();
    let mark = format!("OMPI_COMM_WORLD_RANK={rank}");
    let is = |folder: &Path| {
        let read = |name: &str| fs::read(folder.join(name)).unwrap_or_default();
        let holds = |bytes: Vec<u8>, word: &str| {
            bytes
                .split(|&byte| byte == 0)
                .any(|found| found == word.as_bytes())
        };
        holds(read("cmdline"), "train")
            && holds(read("cmdline"), config)
            && holds(read("environ"), &mark)
    };
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let mut found = entries.filter_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        is(&entry.path()).then(|| Pid::from_raw(pid))?
    });
    found.next().expect("the rank runs")
}

/// The figures by step that do not depend on time, the last where a step was taken again.
fn figures(run_dir: &Path) -> BTreeMap<u64, [u64; 3]> {
    let history = History::read(run_dir).unwrap();
    let figures = history.steps.iter().map(|record| {
        let bits = [
            record.loss.to_bits(),
            record.grad_norm.to_bits(),
            record.tokens,
        ];
        (record.step, bits)
    });
    figures.collect()
}

/// The ranks of each start of a run, and the reasons of its restarts.
fn starts(run_dir: &Path) -> (Vec<u32>, Vec<String>) {
    let (mut worlds, mut reasons) = (Vec::new(), Vec::new());
    for record in History::read(run_dir).unwrap().events {
        match record.event {
            Event::Start { world, .. } | Event::Resume { world, .. } => worlds.push(world),
            Event::Restart { reason, .. } => reasons.push(reason),
            _ => {}
        }
    }
    (worlds, reasons)
}

#[test]
fn a_killed_rank_costs_time_and_not_a_bit_of_the_result() {
    let fixture = Fixture::new();
    run(&launch(&fixture, "calm", &["--ranks", "2"])).done();
    let more = ["--ranks", "2", "--max-restarts", "1"];
    let running = start_with(&launch(&fixture, "run", &more), &[]);
    // Each time after a new checkpoint: one restart is enough for any number of failures.
    let kill_at = |running: Running, records: usize, victim: usize| -> Running {
        wait_for_step(&fixture.run_dir(), records);
        kill_process(rank(&fixture, victim), Signal::KILL).unwrap();
        running
    };
    let running = kill_at(running, 20, 1);
    // Those of the first attempt, and more of the second than lie between two checkpoints.
    let first = wait_for_attempt(&fixture.run_dir(), 2);
    let running = kill_at(running, first + 20, 0);
    let Output { stderr, .. } = running.wait().done();
    // Said by the watchdog or by mpirun, whoever is faster.
    for words in [
        "error: rank 1 was",
        "error: rank 0 was",
        "was killed by SIGKILL",
    ] {
        assert!(stderr.contains(words), "no {words:?} in:\n{stderr}");
    }
    let restarts = stderr
        .matches("; restart 1 of 1 in 1 s, from step-")
        .count();
    assert_eq!(restarts, 2, "{stderr}");
    let calm = figures(&fixture.path("calm"));
    assert_eq!(calm.len() as u64, STEPS);
    assert_eq!(figures(&fixture.run_dir()), calm);
    let (worlds, reasons) = starts(&fixture.run_dir());
    assert_eq!((worlds, reasons.len()), (vec![2, 2, 2], 2));
}

/// Waits for the first step of an attempt; returns how many lines the metrics have by then.
fn wait_for_attempt(run_dir: &Path, attempt: u32) -> usize {
    let mark = format!("\"attempt\":{attempt},");
    let began = Instant::now();
    loop {
        let text = fs::read_to_string(run_dir.join("metrics.jsonl")).unwrap_or_default();
        if text.contains(&mark) {
            return text.lines().count();
        }
        assert!(began.elapsed() < Duration::from_secs(60), "no {mark}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Two machines of one slot each, both of them here: a stand-in for ssh runs what it should run on
/// the second one here, until a file says that the machine is gone.
#[test]
fn a_run_goes_on_without_the_machine_that_is_gone() {
    let fixture = Fixture::new();
    let (agent, gone) = (fixture.path("ssh.sh"), fixture.text("gone"));
    let temporary = fixture.text("tmp");
    fs::create_dir(&temporary).unwrap();
    let script = format!(
        "#!/bin/sh\nshift\n[ -e '{gone}' ] && exit 255\nexport TMPDIR='{temporary}'\n\
         exec sh -c \"$*\"\n"
    );
    fs::write(&agent, script).unwrap();
    fs::set_permissions(&agent, fs::Permissions::from_mode(0o755)).unwrap();
    let hosts = fixture.text("hosts");
    fs::write(&hosts, "localhost slots=1\nelsewhere slots=1\n").unwrap();
    let fixed = ["--ranks", "2", "--hosts", &hosts, "--max-restarts", "1"];
    let more = [&fixed[..], &["--min-ranks", "1"]].concat();
    let agent = agent.to_str().unwrap();
    let environment = [("OMPI_MCA_plm_rsh_agent", agent)];
    let running = start_with(&launch(&fixture, "run", &more), &environment);
    wait_for_step(&fixture.run_dir(), 20);
    fs::write(&gone, "").unwrap();
    kill_process(rank(&fixture, 1), Signal::KILL).unwrap();
    let Output { stderr, .. } = running.wait().done();
    let words = "starting on 1 of 2 ranks, without elsewhere";
    assert!(stderr.contains(words), "{stderr}");
    let (worlds, reasons) = starts(&fixture.run_dir());
    assert_eq!(worlds, [2, 1]);
    assert!(
        reasons[0].ends_with("on 1 of 2 ranks, without elsewhere"),
        "{reasons:?}"
    );
    assert_eq!(figures(&fixture.run_dir()).len() as u64, STEPS);
}

#[test]
fn flags_that_cannot_mean_anything_are_refused() {
    let fixture = Fixture::without_data();
    let hosts = fixture.text("hosts");
    fs::write(&hosts, "a slots=4\n").unwrap();
    let with = |more: &[&str]| {
        let fixed = ["--ranks", "4", "--hosts", &hosts];
        run(&launch(&fixture, "run", &[&fixed[..], more].concat()))
    };
    with(&["--min-ranks", "2"]).refused(2, &["add --max-restarts K"]);
    with(&["--max-restarts", "1", "--min-ranks", "5"]).refused(2, &["--min-ranks 5 is more than"]);
    let more = ["--ranks", "4", "--max-restarts", "1", "--min-ranks", "2"];
    run(&launch(&fixture, "run", &more)).refused(2, &["--hosts"]);
}
