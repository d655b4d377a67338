//! Attempts with shell scripts as ranks, under a real `mpirun`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use oxitron_trainer::config::Config;
use oxitron_trainer::metrics::{Event, History};
use signal_hook::consts::SIGTERM;

use super::accepts;
use super::attempts::{Attempts, Watcher};
use crate::ranks::tests::{
    Listener, WAIT, alone, assert_all_gone, fake_ssh, job, pids, with_variables,
};
use crate::ranks::{Ending, Failure, Hosts, Line, View};

/// Keeps everything for the assertions, and does something when certain words are said.
struct Recorder<'a> {
    listener: Listener,
    said: Vec<String>,
    again: Vec<u32>,
    at: (&'static str, &'a dyn Fn()),
}

impl Recorder<'_> {
    fn new() -> Self {
        Self {
            listener: Listener::default(),
            said: Vec::new(),
            again: Vec::new(),
            at: ("", &|| {}),
        }
    }

    /// Whether these words were said, in this order, each in a line of its own.
    #[track_caller]
    fn said(&self, words: &[&str]) {
        assert_eq!(self.said.len(), words.len(), "{:#?}", self.said);
        for (line, words) in self.said.iter().zip(words) {
            assert!(line.contains(words), "{words} in {:#?}", self.said);
        }
    }

    fn heard(&self, text: &str) -> usize {
        let lines = self.listener.lines.iter();
        lines.filter(|line| line.text == text).count()
    }
}

impl View for Recorder<'_> {
    fn line(&mut self, line: &Line) {
        self.listener.line(line);
    }

    fn tick(&mut self) {}

    fn stopping(&mut self) {}
}

impl Watcher for Recorder<'_> {
    fn failed(&mut self, _: &Failure, _: SystemTime) {}

    fn say(&mut self, words: &str) {
        self.said.push(words.to_owned());
        if words.contains(self.at.0) {
            (self.at.1)();
        }
    }

    fn again(&mut self, attempt: u32) {
        self.again.push(attempt);
    }
}

fn any_number(_: usize, _: &Hosts) -> bool {
    true
}

/// Runs `script` on `ranks` ranks, with `$1` as its folder, `$rank`, and in `$n` the number of the
/// attempt. Every rank counts for itself, and none goes on before all have.
fn attempts<'a>(ranks: usize, restarts: u32, folder: &'a Path, script: &str) -> Attempts<'a> {
    let count = "n=$(cat \"$1/count-$rank\" 2>/dev/null || echo 0); n=$((n + 1)); \
                 echo $n >\"$1/count-$rank\"; \
                 while [ $(cat \"$1\"/count-* | grep -cx $n) -lt $OMPI_COMM_WORLD_SIZE ]; \
                 do sleep 0.1; done; ";
    Attempts {
        job: job(ranks, folder, &format!("{count}{script}")),
        max_restarts: restarts,
        min_ranks: None,
        run_dir: folder,
        checkpoints: folder,
        accepts: &any_number,
        probe_limit: Duration::from_secs(4),
    }
}

fn count(folder: &Path) -> String {
    let count = std::fs::read_to_string(folder.join("count-1")).unwrap();
    count.trim().to_owned()
}

#[test]
fn a_job_that_fails_twice_is_started_again_and_its_restarts_are_on_record() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let mut recorder = Recorder::new();
    // Each attempt leaves a trace, as a run does.
    let trace = "{\\\"unix_seconds\\\":1,\\\"attempt\\\":$n,\\\"event\\\":\\\"skip\\\",\
                 \\\"step\\\":1,\\\"reason\\\":\\\"\\\",\\\"first_sample\\\":0,\\\"end_sample\\\":4}";
    let script = format!(
        "[ $rank = 1 ] && echo \"{trace}\" >>\"$1/events.jsonl\"; \
         [ $rank = 1 ] && [ $n = 1 ] && echo 'oxitron: no disk' >&2 && exit 1; \
         [ $rank = 1 ] && [ $n = 2 ] && kill -KILL $$; [ $n = 3 ] || {{ {WAIT}; }}"
    );
    let attempts = attempts(2, 3, folder.path(), &script);
    let ending = attempts.run(&mut recorder).unwrap();
    assert!(matches!(ending, Ending::Done), "{ending:?}");
    recorder.said(&[
        "rank 1 exited with code 1; restart 1 of 3 in 1 s, from the beginning",
        "; restart 2 of 3 in 2 s, from the beginning",
    ]);
    assert!(recorder.said[1].starts_with("rank 1 was killed by SIGKILL"));
    assert_eq!(recorder.again, [2, 3]);
    assert_eq!(count(folder.path()), "3");
    let history = History::read(folder.path()).unwrap();
    let restarts: Vec<_> = history
        .events
        .iter()
        .filter_map(|record| match &record.event {
            Event::Restart {
                restarts,
                failed_rank,
                reason,
            } => Some((record.attempt, *restarts, *failed_rank, &**reason)),
            _ => None,
        })
        .collect();
    assert_eq!(restarts.len(), 2);
    assert_eq!(restarts[0], (1, 1, Some(1), "rank 1 exited with code 1"));
    assert_eq!(
        (restarts[1].0, restarts[1].1, restarts[1].2),
        (2, 2, Some(1))
    );
    assert_all_gone(&pids(folder.path()));
}

#[test]
fn a_job_that_fails_in_the_same_way_twice_is_left_alone() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let mut recorder = Recorder::new();
    let script = format!("[ $rank = 1 ] && echo 'oxitron: no file' >&2 && exit 1; {WAIT}");
    let attempts = attempts(2, 5, folder.path(), &script);
    let ending = attempts.run(&mut recorder).unwrap();
    assert!(matches!(ending, Ending::Failed(_)), "{ending:?}");
    recorder.said(&[
        "restart 1 of 5",
        "two attempts in a row failed with the same words",
    ]);
    assert_eq!(count(folder.path()), "2");
}

#[test]
fn without_restarts_nothing_is_said_and_with_them_a_refusal_is_final() {
    let _alone = alone();
    for (restarts, said) in [(0, &[][..]), (5, &["no restart would change that"][..])] {
        let folder = tempfile::tempdir().unwrap();
        let mut recorder = Recorder::new();
        let script = format!("[ $rank = 1 ] && echo 'oxitron: bad key' >&2 && exit 2; {WAIT}");
        let ending = attempts(2, restarts, folder.path(), &script).run(&mut recorder);
        assert!(matches!(ending.unwrap(), Ending::Failed(_)));
        recorder.said(said);
        assert_eq!(count(folder.path()), "1");
    }
}

#[test]
fn a_locked_folder_costs_no_restart() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let mut recorder = Recorder::new();
    let locked = "oxitron: /runs/a is in use by another process; wait for it to end";
    let script = format!(
        "[ $rank = 1 ] && [ $n = 1 ] && kill -KILL $$; \
         [ $rank = 1 ] && [ $n -lt 4 ] && echo '{locked}' >&2 && exit 1; \
         [ $n = 4 ] || {{ {WAIT}; }}"
    );
    let attempts = attempts(2, 1, folder.path(), &script);
    let ending = attempts.run(&mut recorder).unwrap();
    assert!(matches!(ending, Ending::Done), "{ending:?}");
    recorder.said(&["restart 1 of 1", "another try in 2 s", "another try in 4 s"]);
}

#[test]
fn a_request_to_stop_ends_a_pause() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let mut recorder = Recorder::new();
    let stop = || signal_hook::low_level::raise(SIGTERM).unwrap();
    recorder.at = ("restart 1 of 5", &stop);
    let script = format!("[ $rank = 1 ] && kill -KILL $$; {WAIT}");
    let attempts = attempts(2, 5, folder.path(), &script);
    let ending = attempts.run(&mut recorder).unwrap();
    assert!(matches!(ending, Ending::Failed(_)), "{ending:?}");
    recorder.said(&[
        "restart 1 of 5",
        "stopped on request before the ranks were started again",
    ]);
    assert_eq!(count(folder.path()), "1");
    assert!(!folder.path().join("events.jsonl").exists());
}

/// Two machines of two slots; the second vanishes with a rank in the first attempt.
fn two_machines(name: &str, test: impl FnOnce(&Path, Attempts<'_>)) {
    const FOLDER: &str = "OXITRON_TEST_FOLDER";
    let folder = tempfile::tempdir().unwrap();
    let agent = fake_ssh(folder.path());
    let variables = [("OMPI_MCA_plm_rsh_agent", &*agent), (FOLDER, folder.path())];
    if !with_variables(&format!("launch::tests::{name}"), &variables) {
        return;
    }
    let folder = PathBuf::from(std::env::var_os(FOLDER).unwrap());
    let hosts = folder.join("hosts");
    std::fs::write(&hosts, "node1 slots=2\nnode2 slots=2\n").unwrap();
    let script = format!(
        "[ $rank = 3 ] && [ $n = 1 ] && touch \"$1/down-node2\" && kill -KILL $$; \
         [ $n = 1 ] && {{ {WAIT}; }}; echo world $OMPI_COMM_WORLD_SIZE"
    );
    let mut attempts = attempts(4, 3, &folder, &script);
    attempts.job.hosts = Some(Hosts::read(&hosts).unwrap());
    test(&folder, attempts);
    let pids = pids(&folder);
    assert!(pids.len() > 4, "the fake ssh waited for nothing");
    assert_all_gone(&pids);
}

#[test]
fn a_machine_that_is_gone_is_left_out_where_fewer_ranks_will_do() {
    let name = "a_machine_that_is_gone_is_left_out_where_fewer_ranks_will_do";
    two_machines(name, |folder, mut attempts| {
        attempts.min_ranks = Some(1);
        let mut recorder = Recorder::new();
        let ending = attempts.run(&mut recorder).unwrap();
        assert!(matches!(ending, Ending::Done), "{ending:?}");
        recorder.said(&["restart 1 of 3", "starting on 2 of 4 ranks, without node2"]);
        assert_eq!(recorder.heard("world 2"), 2);
        let events = std::fs::read_to_string(folder.join("events.jsonl")).unwrap();
        assert!(
            events.contains("on 2 of 4 ranks, without node2"),
            "{events}"
        );
    });
}

#[test]
fn a_machine_that_is_gone_is_waited_for_where_all_ranks_are_needed() {
    let name = "a_machine_that_is_gone_is_waited_for_where_all_ranks_are_needed";
    two_machines(name, |folder, attempts| {
        let mut recorder = Recorder::new();
        let back = || std::fs::remove_file(folder.join("down-node2")).unwrap();
        recorder.at = ("1 of 2 machines cannot be used: node2", &back);
        let ending = attempts.run(&mut recorder).unwrap();
        assert!(matches!(ending, Ending::Done), "{ending:?}");
        recorder.said(&["restart 1 of 3", "restart 2 of 3 in 2 s"]);
        assert_eq!(recorder.heard("world 4"), 4);
    });
}

#[test]
fn too_few_machines_end_the_launch_with_their_names() {
    let name = "too_few_machines_end_the_launch_with_their_names";
    two_machines(name, |_, mut attempts| {
        (attempts.max_restarts, attempts.min_ranks) = (1, Some(3));
        let mut recorder = Recorder::new();
        let ending = attempts.run(&mut recorder).unwrap();
        assert!(matches!(ending, Ending::Failed(_)), "{ending:?}");
        recorder.said(&[
            "restart 1 of 1",
            "node2 (no answer in 4 s); the others have 2 slots, and --min-ranks 3 needs as many; \
             the one restart is used up",
        ]);
    });
}

#[test]
fn ranks_are_as_many_as_batches_groups_and_machines_allow() {
    let folder = tempfile::tempdir().unwrap();
    let (config, hosts) = (
        folder.path().join("config.toml"),
        folder.path().join("hosts"),
    );
    std::fs::write(&hosts, "a slots=4\nb slots=3\n").unwrap();
    let hosts = Hosts::read(&hosts).unwrap();
    let text = "[run]\nname = \"tiny\"\n[model]\nfamily = \"llama\"\nvocab_size = 512\n\
                hidden_size = 64\nintermediate_size = 176\nnum_layers = 2\nnum_heads = 4\n\
                num_kv_heads = 2\n[data]\ntokenizer = \"t.json\"\n[[data.source]]\n\
                name = \"words\"\npath = \"shards/*.parquet\"\n[optimizer]\nlr = 1e-3\n[[stage]]\nname = \"short\"\n\
                seq_len = 64\nsteps = 6\nbatch_tokens = 384\n";
    std::fs::write(&config, text).unwrap();
    let accepted = |set: &str| {
        let config = Config::load(&config, &[set.to_owned()]).unwrap();
        let ranks = (1..=7).filter(|&ranks| accepts(&config, ranks, &hosts));
        ranks.collect::<Vec<_>>()
    };
    // Six samples in a batch.
    assert_eq!(
        accepted("parallel.shard_size=\"world\""),
        [1, 2, 3, 4, 5, 6]
    );
    assert_eq!(accepted("parallel.shard_size=2"), [2, 4, 6]);
    // Four on the first machine, and the second has no four slots.
    assert_eq!(accepted("parallel.shard_size=\"node\""), [1, 2, 3, 4]);
}
