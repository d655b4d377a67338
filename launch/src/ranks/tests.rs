//! The supervisor with shell scripts as ranks, under a real `mpirun`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use signal_hook::consts::SIGTERM;

use super::*;

/// Keeps everything for the assertions and raises a signal when it hears a certain line.
#[derive(Default)]
pub(crate) struct Listener {
    pub(crate) lines: Vec<Line>,
    stop_at: Option<(&'static str, usize)>,
    stopping: usize,
}

impl View for Listener {
    fn line(&mut self, line: &Line) {
        self.lines.push(line.clone());
        if let Some((words, times)) = self.stop_at
            && line.text.contains(words)
        {
            self.stop_at = (times > 1).then_some(("once more", times - 1));
            signal_hook::low_level::raise(SIGTERM).unwrap();
        }
    }

    fn tick(&mut self) {}

    fn stopping(&mut self) {
        self.stopping += 1;
    }
}

/// Signals and start-up times are shared by all tests of a process: one job at a time.
pub(crate) fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs the test `name` in a process of its own, in which these variables are set; true in there.
/// The environment is read at many places, and a process cannot change its own safely.
pub(crate) fn with_variables(name: &str, variables: &[(&str, &Path)]) -> bool {
    const INSIDE: &str = "OXITRON_TEST_INSIDE";
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let _alone = alone();
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", name, "--nocapture"])
        .env(INSIDE, "1");
    command.envs(variables.iter().copied());
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && said.contains("1 passed"),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    false
}

/// Stands in for ssh: runs the command here, whatever the machine, unless there is a file
/// `down-MACHINE` in `folder`; then it waits for ever and leaves its number there. Each machine has
/// its folder for temporary files: daemons of one job get into each other's way in a common one.
pub(crate) fn fake_ssh(folder: &Path) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let agent = folder.join("ssh.sh");
    let folder = folder.display();
    let script = format!(
        "#!/bin/sh\nhost=$1; shift\n\
         [ -e '{folder}/down-'$host ] && {{ echo $$ >'{folder}/pid-ssh-'$$; exec sleep 600; }}\n\
         export TMPDIR='{folder}/'$host; mkdir -p \"$TMPDIR\"; exec sh -c \"$*\"\n"
    );
    std::fs::write(&agent, script).unwrap();
    std::fs::set_permissions(&agent, std::fs::Permissions::from_mode(0o755)).unwrap();
    agent
}

fn supervise(job: &Job, listener: &mut Listener) -> anyhow::Result<Ending> {
    super::supervise(job, listener, &mut Requests::watch()?)
}

/// Ranks that run `script` with `$1` as their folder and `$rank` as their number.
pub(crate) fn job(ranks: usize, folder: &Path, script: &str) -> Job {
    let script = format!("rank=$OMPI_COMM_WORLD_RANK; echo $$ >\"$1/pid-$rank\"; {script}");
    Job {
        program: PathBuf::from("/bin/sh"),
        arguments: vec!["-c".into(), script.into(), "sh".into(), folder.into()],
        ranks,
        hosts: None,
        threads: None,
    }
}

/// The process numbers that the ranks left in `folder`.
pub(crate) fn pids(folder: &Path) -> Vec<String> {
    let files = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    files
        .filter(|path| {
            path.file_name()
                .unwrap()
                .to_str()
                .unwrap()
                .starts_with("pid-")
        })
        .map(|path| std::fs::read_to_string(path).unwrap().trim().to_owned())
        .collect()
}

/// Waits until none of the processes lives; a zombie does not.
pub(crate) fn assert_all_gone(pids: &[String]) {
    let begun = Instant::now();
    let lives = |pid: &String| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit(')')
            .next()
            .is_some_and(|rest| !rest.is_empty() && !rest.starts_with(" Z"))
    };
    while pids.iter().any(lives) {
        assert!(
            begun.elapsed() < Duration::from_secs(10),
            "ranks live on: {pids:?}"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Runs a job that fails, within the time a user may be kept waiting, and nobody is left.
fn failure(ranks: usize, script: &str) -> (Failure, Listener) {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let mut listener = Listener::default();
    let begun = Instant::now();
    let ending = supervise(&job(ranks, folder.path(), script), &mut listener).unwrap();
    assert!(
        begun.elapsed() < Duration::from_secs(10),
        "took {:?}",
        begun.elapsed()
    );
    let pids = pids(folder.path());
    assert!(!pids.is_empty());
    assert_all_gone(&pids);
    match ending {
        Ending::Failed(failure) => (failure, listener),
        other => panic!("{other:?}"),
    }
}

/// Waits in a way that a signal ends at once, as a shell's `sleep` would not.
pub(crate) const WAIT: &str = "sleep 60 & wait";

#[test]
fn more_ranks_than_cores_run_to_their_end_and_share_the_threads() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let mut listener = Listener::default();
    let ranks = 2 * std::thread::available_parallelism().unwrap().get() + 1;
    let script = "echo hello from $rank with $OMP_NUM_THREADS; echo to error >&2";
    let ending = supervise(&job(ranks, folder.path(), script), &mut listener).unwrap();
    assert!(matches!(ending, Ending::Done), "{ending:?}");
    for rank in 0..ranks {
        let said = |text: &str, error| {
            let line = Line {
                rank: Some(rank),
                error,
                text: text.to_owned(),
            };
            assert!(listener.lines.contains(&line), "{:?}", listener.lines);
        };
        said(&format!("hello from {rank} with 1"), false);
        said("to error", true);
    }
}

#[test]
fn a_rank_that_fails_is_named_with_its_code_and_last_words() {
    let script = format!("[ $rank = 1 ] && sleep 1 && echo no disk >&2 && exit 3; {WAIT}");
    let (failure, _) = failure(3, &script);
    assert_eq!((failure.rank, failure.how), (Some(1), How::Exit(3)));
    assert_eq!(failure.words, ["no disk"]);
}

#[test]
fn a_rank_that_is_killed_is_named_with_its_signal() {
    let (failure, _) = failure(
        3,
        &format!("[ $rank = 2 ] && sleep 1 && kill -KILL $$; {WAIT}"),
    );
    assert_eq!((failure.rank, failure.how), (Some(2), How::Signal(9)));
}

#[test]
fn ranks_that_ignore_the_end_are_killed() {
    let script = "trap '' TERM; [ $rank = 0 ] && sleep 1 && exit 4; while :; do sleep 1; done";
    let (failure, _) = failure(2, script);
    assert_eq!((failure.rank, failure.how), (Some(0), How::Exit(4)));
}

#[test]
fn the_watchdog_names_the_rank_that_is_lost_and_not_the_one_that_left_first() {
    let script = "[ $rank = 0 ] && sleep 1 && \
                  echo 'watchdog: lost rank 2 (node7, pid 4711): its connection closed' >&2 && \
                  exit 1; ";
    let (failure, _) = failure(3, &format!("{script}{WAIT}"));
    let reason = "(node7, pid 4711): its connection closed";
    assert_eq!(
        (failure.rank, failure.how),
        (Some(2), How::Lost(reason.to_owned()))
    );
}

#[test]
fn a_rank_that_leaves_with_another_is_not_the_one_that_failed() {
    let script = "[ $rank = 0 ] && echo 'oxitron: no disk' >&2; [ $rank = 1 ] && sleep 1 && \
                  echo 'oxitron: rank 0 failed, see its log; this rank stops with it' >&2 && \
                  exit 1; ";
    let (failure, _) = failure(2, &format!("{script}{WAIT}"));
    assert_eq!((failure.rank, failure.how), (Some(0), How::Exit(1)));
    assert_eq!(failure.words, ["oxitron: no disk"]);
}

#[test]
fn machines_that_do_not_answer_are_found_in_time_and_nobody_waits_for_them_any_more() {
    let folder = tempfile::tempdir().unwrap();
    let agent = fake_ssh(folder.path());
    std::fs::write(folder.path().join("down-node2"), "").unwrap();
    let name = "ranks::tests::machines_that_do_not_answer_are_found_in_time_and_nobody_waits_for_them_any_more";
    if !with_variables(
        name,
        &[
            ("OMPI_MCA_plm_rsh_agent", &agent),
            ("FOLDER", folder.path()),
        ],
    ) {
        return;
    }
    let hosts = ["node1", "node2", "node3"].map(str::to_owned);
    let limit = Duration::from_secs(4);
    let begun = Instant::now();
    let answers = probe(&hosts, limit, || false).unwrap().unwrap();
    assert!(begun.elapsed() < 3 * limit);
    let dead: Vec<_> = answers
        .iter()
        .map(|answer| (&*answer.host, answer.dead.as_deref()))
        .collect();
    let silent = Some("no answer in 4 s");
    assert_eq!(dead, [("node1", None), ("node2", silent), ("node3", None)]);
    let waiting = pids(Path::new(&std::env::var_os("FOLDER").unwrap()));
    assert_eq!(waiting.len(), 1);
    assert_all_gone(&waiting);
    assert!(probe(&hosts, limit, || true).unwrap().is_none());
}

#[test]
fn a_program_that_does_not_exist_is_reported_before_anything_starts() {
    let mut job = job(2, Path::new("/"), "");
    job.program = PathBuf::from("/no/such/program");
    let error = supervise(&job, &mut Listener::default())
        .unwrap_err()
        .to_string();
    assert!(error.contains("/no/such/program"), "{error}");
}

#[test]
fn the_first_request_reaches_the_ranks_as_sigusr1_and_they_may_take_their_time() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let mut listener = Listener {
        stop_at: Some(("ready 0", 1)),
        ..Listener::default()
    };
    let script = "trap 'stop=1' USR1; [ $rank = 0 ] && sleep 1; echo ready $rank; \
                  while [ -z \"$stop\" ]; do sleep 0.1; done; sleep 2; echo saved $rank; exit 75";
    let ending = supervise(&job(2, folder.path(), script), &mut listener).unwrap();
    assert!(matches!(ending, Ending::Stopped), "{ending:?}");
    assert_eq!(listener.stopping, 1);
    assert!(
        listener.lines.iter().any(|line| line.text == "saved 0"),
        "{:?}",
        listener.lines
    );
}

#[test]
fn the_second_request_kills() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let mut listener = Listener {
        stop_at: Some(("ready 0", 2)),
        ..Listener::default()
    };
    let script = "trap 'echo once more' USR1; [ $rank = 0 ] && sleep 1; echo ready $rank; \
                  while :; do sleep 0.1; done";
    let ending = supervise(&job(2, folder.path(), script), &mut listener).unwrap();
    assert!(matches!(ending, Ending::Killed), "{ending:?}");
    assert_all_gone(&pids(folder.path()));
}

/// The kernel ends mpirun when the thread that started it is gone, as it does when the launcher is
/// killed, and the ranks when mpirun is gone.
#[test]
fn no_rank_outlives_a_launcher_that_vanished() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let job = job(3, folder.path(), "trap '' TERM; while :; do sleep 1; done");
    let watched = folder.path().to_owned();
    let vanishing = std::thread::spawn(move || {
        // Neither waited for nor killed.
        let child = job.command(&leftover::new_mark()).unwrap().spawn().unwrap();
        let begun = Instant::now();
        while pids(&watched).iter().filter(|pid| !pid.is_empty()).count() < 3 {
            assert!(
                begun.elapsed() < Duration::from_secs(20),
                "the ranks did not start"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        std::mem::forget(child);
    });
    vanishing.join().unwrap();
    assert_all_gone(&pids(folder.path()));
}
