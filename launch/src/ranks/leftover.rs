//! Whoever is left of a job on this machine.
//!
//! The kernel kills ranks with their `mpirun`, but neither at once (a rank may have gigabytes to
//! give back, and holds its locks until then) nor everybody: `mpirun` starts `ssh` in a process
//! group of its own, and one that waits for a machine that is gone would wait on. So all processes
//! of a job carry a mark in their environment, wherever they come from, and before the job counts
//! as ended those that carry it are killed and waited for.

use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::process::{Pid, Signal, kill_process};

/// The environment variable that holds the mark.
pub const VARIABLE: &str = "OXITRON_JOB";

/// How long processes that were killed may take to be gone. Only the kernel can hold them: one that
/// waits for a file system that does not answer cannot be helped from here.
const PATIENCE: Duration = Duration::from_secs(20);

/// How often they are looked for.
const LOOK: Duration = Duration::from_millis(20);

/// A process, told apart from a later one of the same number by when it started.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Process {
    pid: Pid,
    started: u64,
}

/// A mark that no other job has, on whatever machine its launcher runs.
pub fn new_mark() -> String {
    static JOBS: AtomicU64 = AtomicU64::new(0);
    let job = JOBS.fetch_add(1, Ordering::Relaxed);
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.unwrap_or_default().as_nanos();
    format!("{}-{now:x}-{job}", std::process::id())
}

/// Kills every process of this machine that carries the mark, and waits until they are gone.
pub fn end_all(mark: &str) {
    let until = Instant::now() + PATIENCE;
    let mut known: Vec<Process> = Vec::new();
    loop {
        for process in carriers(mark) {
            if !known.contains(&process) {
                known.push(process);
            }
        }
        // One that is ending has no environment any more, so those seen before are asked for.
        known.retain(|process| started(process.pid) == Some(process.started));
        if known.is_empty() || Instant::now() > until {
            return;
        }
        for process in &known {
            // It may have ended since the line before.
            let _ = kill_process(process.pid, Signal::KILL);
        }
        std::thread::sleep(LOOK);
    }
}

/// The processes that carry the mark.
fn carriers(mark: &str) -> Vec<Process> {
    let entry = format!("{VARIABLE}={mark}");
    let carries = |pid: &Pid| {
        let environment = fs::read(format!("/proc/{}/environ", pid.as_raw_nonzero()));
        // A process of somebody else cannot be read, and is none of ours.
        environment.is_ok_and(|bytes| {
            bytes
                .split(|&byte| byte == 0)
                .any(|e| e == entry.as_bytes())
        })
    };
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| Pid::from_raw(entry.ok()?.file_name().to_str()?.parse().ok()?))
        .filter(carries)
        .filter_map(|pid| {
            let started = started(pid)?;
            Some(Process { pid, started })
        })
        .collect()
}

/// When a process started, in ticks since the machine did; none for one that has ended, even if
/// nobody has taken note of it yet.
fn started(pid: Pid) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
    // The program's name, in brackets, may hold anything. The state follows it as field 3.
    let (_, fields) = stat.rsplit_once(") ")?;
    let fields: Vec<&str> = fields.split(' ').collect();
    match fields.first()? {
        &"Z" | &"X" => None,
        _ => fields.get(19)?.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::os::unix::process::CommandExt;
    use std::process::Command;

    use super::*;

    #[test]
    fn those_with_the_mark_end_whatever_their_group_and_others_stay() {
        let (mark, other) = (new_mark(), new_mark());
        assert_ne!(mark, other);
        let start = |mark: &str| {
            // A shell that ignores the polite end, and its child.
            let mut command = Command::new("/bin/sh");
            command.args(["-c", "trap '' TERM; sleep 60; true"]);
            command.env(VARIABLE, mark).process_group(0);
            command.spawn().unwrap()
        };
        let (mut ours, mut theirs) = (start(&mark), start(&other));
        let begun = Instant::now();
        // The shell and its sleep.
        while carriers(&mark).len() < 2 || carriers(&other).len() < 2 {
            assert!(begun.elapsed() < Duration::from_secs(10));
            std::thread::sleep(LOOK);
        }
        end_all(&mark);
        assert!(carriers(&mark).is_empty());
        assert!(ours.try_wait().unwrap().is_some());
        assert_eq!(carriers(&other).len(), 2);
        assert!(theirs.try_wait().unwrap().is_none());
        end_all(&other);
        theirs.wait().unwrap();
    }
}
