//! Ranks that die, hang or are cut off, and runs that go on without them.
//!
//! Each time the run is to find out by itself, soon; to name who is to blame; to start again by
//! itself; and to end as a run that nobody disturbed.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)]

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use support::runs::{
    assert_same_bits, events, losses, rank_of, ranks_of, signal, wait_for_event, wait_for_step,
    wait_until_gone,
};
use support::{Fixture, ONE_STAGE, Running, run, start_with};

const STEPS: u64 = 20;

/// Twenty steps, each second one saved.
fn config(fixture: &Fixture) -> PathBuf {
    let stage = ONE_STAGE.replace("steps = 6", "steps = 20");
    fixture.config(&format!("[checkpoint]\nevery_steps = 2\n{stage}"))
}

/// The arguments of `oxitron launch` on four ranks.
fn launch(config: &Path, dir: &str, more: &[&str]) -> Vec<String> {
    let dir = format!("run.dir={dir}");
    let fixed = ["launch", config.to_str().unwrap(), "--ranks", "4"];
    let set = ["--set", &dir];
    let words = fixed.iter().chain(&set).chain(more);
    words.map(|&word| word.to_owned()).collect()
}

/// Steps of some 80 ms.
const SLOW: &str = "step::forward=return(sleep:20)";

fn start(config: &Path, dir: &str, more: &[&str], faults: &str) -> Running {
    start_with(&launch(config, dir, more), &[("FAILPOINTS", faults)])
}

/// Waits for restart number `number`, which is to be blamed on `rank`, since `began`.
#[track_caller]
fn wait_for_restart(run_dir: &Path, (number, rank): (u32, usize), began: Instant) -> Duration {
    wait_for_event(run_dir, "restart", |event| event["restarts"] == number);
    let seconds = began.elapsed();
    let restarts = events(run_dir, "restart");
    let restart = &restarts[number as usize - 1];
    assert_eq!(restart["failed_rank"], rank, "{restart}");
    println!("restart {number}, after rank {rank}: {seconds:.1?}: {restart}");
    seconds
}

fn assert_words(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "no {word:?} in:\n{text}");
    }
}

#[test]
fn a_killed_rank_is_found_at_once_and_so_is_rank_0() {
    let fixture = Fixture::new();
    let config = config(&fixture);
    run(&launch(&config, "calm", &[])).done();
    let running = start(&config, "run", &["--max-restarts", "2"], SLOW);
    let run_dir = fixture.run_dir();
    let mut records = 7;
    for (number, rank) in [(1, 2), (2, 0)] {
        wait_for_step(&run_dir, records);
        let killed = Instant::now();
        signal(rank_of(&config, rank), Signal::KILL);
        let seconds = wait_for_restart(&run_dir, (number, rank), killed);
        assert!(seconds < Duration::from_secs(10), "{seconds:?}");
        let lines = fs::read_to_string(run_dir.join("metrics.jsonl")).unwrap();
        // Past a checkpoint of the attempt to come.
        records = lines.lines().count() + 5;
    }
    let output = running.wait().done();
    assert_words(
        &output.stderr,
        &["rank 2 was", "rank 0 was", "restart 1 of 2"],
    );
    wait_until_gone(&config);
    assert_same_bits(&fixture, "calm", "run", STEPS);
}

#[test]
fn a_rank_that_stands_still_is_found_within_the_lease() {
    let fixture = Fixture::new();
    let config = config(&fixture);
    run(&launch(&config, "calm", &[])).done();
    let more = ["--max-restarts", "1", "--set", "guard.lease=3s"];
    let running = start(&config, "run", &more, SLOW);
    wait_for_step(&fixture.run_dir(), 7);
    let victim = rank_of(&config, 1);
    let stopped = Instant::now();
    signal(victim, Signal::STOP);
    let seconds = wait_for_restart(&fixture.run_dir(), (1, 1), stopped);
    // The lease, two seconds for the last words of all, a pause of one, and the end of the ranks.
    assert!(seconds < Duration::from_secs(13), "{seconds:?}");
    let living = ranks_of(&config);
    assert!(
        living.iter().all(|&(pid, _)| pid != victim),
        "{victim} lives"
    );
    let output = running.wait().done();
    let words = [
        "watchdog: lost rank 1 (",
        "no word from it for",
        "◀",
        "restart 1 of 1",
    ];
    assert_words(&output.stderr, &words);
    wait_until_gone(&config);
    assert_same_bits(&fixture, "calm", "run", STEPS);
}

/// The process lives and its watchdog speaks, but its step does not go on.
#[test]
fn a_rank_that_hangs_in_a_step_is_named_with_those_who_wait_for_it() {
    let fixture = Fixture::new();
    let config = config(&fixture);
    run(&launch(&config, "calm", &[])).done();
    let more = ["--max-restarts", "1", "--set", "guard.hang_timeout=4s"];
    // In step 16, after four layers in each step before. A run that goes on from a checkpoint does
    // not take so many steps any more.
    let faults = "step::forward=60*off->1*return(sleep:600000@2)";
    let running = start(&config, "run", &more, faults);
    wait_for_step(&fixture.run_dir(), 15);
    let hung = Instant::now();
    let seconds = wait_for_restart(&fixture.run_dir(), (1, 2), hung);
    assert!(seconds > Duration::from_secs(3), "{seconds:?}");
    assert!(seconds < Duration::from_secs(14), "{seconds:?}");
    let output = running.wait().done();
    let words = [
        "watchdog: lost rank 2 (",
        "s in forward of step 16, while 3 ranks wait in reduce-scatter on lane",
        "restart 1 of 1",
    ];
    assert_words(&output.stderr, &words);
    for rank in 0..4 {
        let log = fixture.run_dir().join(format!("logs/rank-000{rank}.log"));
        let log = fs::read_to_string(log).unwrap();
        // The stack of the thread that takes the steps.
        assert_words(&log, &["run at ", "trainer/src/run/step.rs:"]);
    }
    wait_until_gone(&config);
    assert_same_bits(&fixture, "calm", "run", STEPS);
}

#[test]
fn no_rank_outlives_a_launcher_even_one_that_stands_still() {
    let fixture = Fixture::new();
    let config = config(&fixture);
    let more = ["--set", "guard.lease=3s", "--max-restarts", "3"];
    let mut running = start(&config, "run", &more, SLOW);
    wait_for_step(&fixture.run_dir(), 3);
    assert_eq!(ranks_of(&config).len(), 4);
    signal(rank_of(&config, 3), Signal::STOP);
    running.child.kill().unwrap();
    let killed = Instant::now();
    assert_eq!(running.wait().code, None);
    wait_until_gone(&config);
    println!("gone {:.1?} after the launcher", killed.elapsed());
}

/// Two hosts in one machine: network namespaces, joined by a cable.
struct Hosts {
    names: [String; 2],
    cables: [String; 2],
}

const ADDRESSES: [&str; 2] = ["10.98.0.1", "10.98.0.2"];

impl Hosts {
    /// Makes them, or says why it cannot.
    fn new() -> Result<Self, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("only root can make network namespaces".to_owned());
        }
        let own = std::process::id();
        let hosts = Self {
            names: ["a", "b"].map(|end| format!("oxitron-{own}-{end}")),
            cables: ["a", "b"].map(|end| format!("ox{own}{end}")),
        };
        let [one, other] = &hosts.cables;
        for name in &hosts.names {
            ip(&["netns", "add", name])?;
        }
        ip(&["link", "add", one, "type", "veth", "peer", "name", other])?;
        let ends = hosts.names.iter().zip(&hosts.cables).zip(ADDRESSES);
        for ((name, cable), address) in ends {
            let address = format!("{address}/24");
            ip(&["link", "set", cable, "netns", name])?;
            ip(&["-n", name, "address", "add", &address, "dev", cable])?;
            ip(&["-n", name, "link", "set", cable, "up"])?;
            ip(&["-n", name, "link", "set", "lo", "up"])?;
        }
        Ok(hosts)
    }

    /// Cuts the cable at its far end, as when the other host loses power.
    fn cut(&self) {
        ip(&["-n", &self.names[1], "link", "set", &self.cables[1], "down"]).unwrap();
    }

    /// What `mpirun` calls in the place of ssh: `HOST COMMAND…`.
    fn agent(&self) -> String {
        let case = |(address, name): (&str, &String)| {
            // By the name of the host MPI tells its neighbours from others.
            let run = format!("hostname {name}; $*");
            format!("{address}) exec ip netns exec {name} unshare --uts sh -c \"{run}\" ;;\n")
        };
        let cases: String = ADDRESSES.into_iter().zip(&self.names).map(case).collect();
        format!("#!/bin/sh\nhost=$1\nshift\ncase $host in\n{cases}esac\nexit 255\n")
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        // The cable goes with its ends.
        for name in &self.names {
            let _ = ip(&["netns", "delete", name]);
        }
    }
}

fn ip(arguments: &[&str]) -> Result<(), String> {
    let mut command = Command::new("ip");
    let done = command.args(arguments).stdout(Stdio::null()).output();
    let done = done.map_err(|error| format!("cannot run ip: {error}"))?;
    if done.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&done.stderr).into_owned();
    Err(format!("ip {}: {words}", arguments.join(" ")))
}

#[test]
fn ranks_go_on_by_themselves_when_a_host_is_cut_off_for_good() {
    let hosts = match Hosts::new() {
        Ok(hosts) => hosts,
        Err(reason) => {
            println!("SKIPPED: there is no second host here: {reason}");
            return;
        }
    };
    let fixture = Fixture::new();
    let config = config(&fixture);
    run(&launch(&config, "calm", &[])).done();
    let (agent, host_file) = (fixture.path("agent.sh"), fixture.path("hosts"));
    fs::write(&agent, hosts.agent()).unwrap();
    fs::set_permissions(&agent, fs::Permissions::from_mode(0o755)).unwrap();
    let lines = ADDRESSES.map(|address| format!("{address} slots=2\n"));
    fs::write(&host_file, lines.concat()).unwrap();
    let more = [
        "--hosts",
        host_file.to_str().unwrap(),
        "--min-ranks",
        "2",
        "--max-restarts",
        "3",
        "--set",
        "guard.lease=3s",
    ];
    let binary = env!("CARGO_BIN_EXE_oxitron").to_owned();
    let inside = ["netns", "exec", &hosts.names[0]].map(str::to_owned);
    let command = [&inside[..], &[binary], &launch(&config, "run", &more)].concat();
    let environment = [
        ("FAILPOINTS", SLOW),
        ("OMPI_MCA_plm_rsh_agent", agent.to_str().unwrap()),
    ];
    let running = support::start_program("ip", &command, &environment);
    wait_for_step(&fixture.run_dir(), 7);
    let cut = Instant::now();
    hosts.cut();
    wait_for_event(&fixture.run_dir(), "restart", |_| true);
    println!("restarted {:.1?} after the cut", cut.elapsed());
    // The lease, the end of the ranks, and 20 s in which the other host may answer.
    assert!(
        cut.elapsed() < Duration::from_secs(45),
        "{:?}",
        cut.elapsed()
    );
    let output = running.wait().done();
    assert_words(
        &output.stderr,
        &["starting on 2 of 4 ranks, without 10.98.0.2"],
    );
    // The ranks that nobody can reach any more have found out, too.
    let log = fixture.run_dir().join("logs/rank-0002.log");
    assert_words(
        &fs::read_to_string(log).unwrap(),
        &["the run is lost: watchdog: lost rank 0 ("],
    );
    wait_until_gone(&config);
    let resumes = events(&fixture.run_dir(), "resume");
    assert_eq!(resumes.last().unwrap()["world"], 2);
    let (calm, found) = (losses(&fixture.path("calm")), losses(&fixture.run_dir()));
    assert_eq!(calm.len(), found.len());
    for (step, (a, b)) in calm.iter().zip(&found).enumerate() {
        let error = (b / a - 1.0).abs();
        assert!(
            error <= 1e-5,
            "loss of step {} differs by {error:e}",
            step + 1
        );
    }
}
