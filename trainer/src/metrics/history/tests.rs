#![allow(clippy::unwrap_used)]

use std::fs::{self, OpenOptions};
use std::io::Write;

use super::*;
use crate::metrics::MetricsWriter;

fn step(step: u64, loss: f64) -> StepRecord {
    let tokens = step * 100;
    StepRecord {
        step,
        loss,
        tokens,
        stage: "4k".into(),
        ..StepRecord::default()
    }
}

fn validation(step: u64, loss: f64) -> Event {
    let (tokens, stage) = (step * 100, "4k".into());
    Event::Validation {
        step,
        tokens,
        stage,
        loss,
        target_tokens: 10,
        seconds: 0.5,
    }
}

fn resume(step: u64) -> Event {
    Event::Resume {
        step,
        tokens: step * 100,
        checkpoint: String::new(),
        world: 1,
    }
}

#[test]
fn a_later_attempt_replaces_what_it_did_over_and_what_lay_beyond() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path();
    assert_eq!(next_attempt(run).unwrap(), 1);
    let mut first = MetricsWriter::open(run, 1).unwrap();
    for k in 1..=8 {
        first.step(&step(k, k as f64));
    }
    first.event(validation(5, 0.5));
    first.event(validation(8, 0.8));
    drop(first);

    assert_eq!(next_attempt(run).unwrap(), 2);
    let mut second = MetricsWriter::open(run, 2).unwrap();
    second.event(resume(5));
    second.step(&step(6, 60.0));
    drop(second);

    let history = History::read(run).unwrap();
    let losses: Vec<(u64, f64)> = history.steps.iter().map(|r| (r.step, r.loss)).collect();
    assert_eq!(
        losses,
        [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 5.0), (6, 60.0)]
    );
    assert_eq!(history.steps[5].attempt, 2);
    let validated: Vec<u64> = history
        .validations()
        .iter()
        .map(|point| point.step)
        .collect();
    assert_eq!(validated, [5]);
    assert_eq!((history.attempts(), history.warnings.len()), (2, 0));
    assert_eq!(
        (
            history.tokens_at(0),
            history.tokens_at(6),
            history.tokens_at(99)
        ),
        (0, 600, 600)
    );
}

#[test]
fn within_an_attempt_the_later_line_wins() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = MetricsWriter::open(folder.path(), 1).unwrap();
    for (k, loss) in [(1, 1.0), (2, 2.0), (3, 3.0), (2, 20.0), (3, 30.0)] {
        writer.step(&step(k, loss));
    }
    let steps = History::read(folder.path()).unwrap().steps;
    assert_eq!(
        steps.iter().map(|r| r.loss).collect::<Vec<_>>(),
        [1.0, 20.0, 30.0]
    );
}

#[test]
fn the_higher_attempt_wins_wherever_its_line_stands() {
    let (mut early, mut late) = (step(1, 1.0), step(1, 2.0));
    (early.attempt, late.attempt) = (1, 2);
    assert_eq!(surviving(vec![late.clone(), early]), [late]);
}

#[test]
fn the_writer_stamps_its_attempt() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = MetricsWriter::open(folder.path(), 7).unwrap();
    writer.step(&StepRecord {
        attempt: 3,
        ..step(1, 1.0)
    });
    assert_eq!(History::read(folder.path()).unwrap().steps[0].attempt, 7);
}

#[test]
fn a_torn_line_costs_one_record_and_the_next_attempt_starts_afresh() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = MetricsWriter::open(folder.path(), 1).unwrap();
    writer.step(&step(1, 1.0));
    let path = folder.path().join(METRICS_FILE);
    OpenOptions::new()
        .append(true)
        .open(&path)
        .unwrap()
        .write_all(b"{\"step\":2,\"att")
        .unwrap();
    let torn = History::read(folder.path()).unwrap();
    assert_eq!(
        (torn.steps.len(), torn.warnings.len()),
        (1, 1),
        "{:?}",
        torn.warnings
    );

    MetricsWriter::open(folder.path(), 2)
        .unwrap()
        .step(&step(2, 2.0));
    let mended = History::read(folder.path()).unwrap();
    assert_eq!((mended.steps.len(), mended.warnings.len()), (2, 0));
}

#[test]
fn a_damaged_line_is_refused_when_read_but_does_not_stop_a_resume() {
    let folder = tempfile::tempdir().unwrap();
    MetricsWriter::open(folder.path(), 4)
        .unwrap()
        .step(&step(1, 1.0));
    let path = folder.path().join(METRICS_FILE);
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, format!("not json\n{text}")).unwrap();
    let message = History::read(folder.path()).unwrap_err().to_string();
    assert!(
        message.contains("metrics.jsonl, line 1: expected the record of a step"),
        "{message}"
    );
    assert_eq!(next_attempt(folder.path()).unwrap(), 5);
}

#[test]
fn a_folder_that_is_no_run_is_named_with_what_was_expected() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("nowhere");
    for (path, found) in [
        (missing.as_path(), "no such folder"),
        (folder.path(), "neither"),
    ] {
        let message = History::read(path).unwrap_err().to_string();
        assert!(
            message.contains(found) && message.contains("run directory"),
            "{message}"
        );
    }
}

#[test]
fn a_follower_sees_each_whole_line_once() {
    let folder = tempfile::tempdir().unwrap();
    let mut follower = StepFollower::new(folder.path());
    assert!(follower.poll().unwrap().is_empty());
    let mut writer = MetricsWriter::open(folder.path(), 1).unwrap();
    writer.step(&step(1, 1.0));
    writer.step(&step(2, 2.0));
    assert_eq!(follower.poll().unwrap().len(), 2);
    let path = folder.path().join(METRICS_FILE);
    let line = serde_json::to_string(&step(3, 3.0)).unwrap() + "\n";
    let (head, tail) = line.split_at(20);
    let mut file = OpenOptions::new().append(true).open(&path).unwrap();
    file.write_all(head.as_bytes()).unwrap();
    assert!(follower.poll().unwrap().is_empty());
    file.write_all(tail.as_bytes()).unwrap();
    assert_eq!(follower.poll().unwrap(), [step(3, 3.0)]);
    // Removed under the run, which writes a new one with the next save.
    fs::remove_file(&path).unwrap();
    for k in 4..=9 {
        writer.step(&step(k, 1.0));
    }
    writer.sync();
    for k in 10..=19 {
        writer.step(&step(k, 1.0));
    }
    let anew: Vec<u64> = follower.poll().unwrap().iter().map(|r| r.step).collect();
    assert_eq!(anew, (10..=19).collect::<Vec<_>>());
}
