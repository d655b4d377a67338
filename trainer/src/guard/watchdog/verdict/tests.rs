#![allow(clippy::unwrap_used)]

use super::*;

fn row(rank: usize, step: u64, action: u64, waits_for: Option<&str>) -> Row {
    Row {
        rank,
        host: format!("node{}", rank / 8),
        pid: Some(4700 + rank as u32),
        step,
        action,
        phase: Phase::Forward,
        idle: Duration::from_secs(600),
        waits_for: waits_for.map(str::to_owned),
        left: false,
    }
}

const REDUCE: Option<&str> = Some("all-reduce on lane 3");
const GATHER: Option<&str> = Some("all-gather on lane 1");

fn stall(rows: &[Row]) -> Verdict {
    judge(&Cause::Stalled, rows, &vec![true; rows.len()])
}

fn blamed(rows: &[Row]) -> Option<usize> {
    let verdict = stall(rows);
    println!("{}{}", verdict.table, verdict.line);
    parse_verdict(&verdict.line).map(|(rank, _)| rank)
}

#[test]
fn who_waits_for_nothing_is_missing() {
    let rows = [
        row(0, 17, 40, REDUCE),
        row(1, 17, 40, REDUCE),
        row(2, 17, 31, None),
        row(3, 17, 40, REDUCE),
    ];
    let line = stall(&rows).line;
    assert_eq!(
        line,
        "watchdog: lost rank 2 (node0, pid 4702): no progress for 600 s in forward of step 17, \
         while 3 ranks wait in all-reduce on lane 3"
    );
    assert_eq!(blamed(&rows), Some(2));
}

#[test]
fn of_those_that_wait_for_nothing_the_stuck_one_is_missing() {
    let rows = [
        row(0, 17, 40, REDUCE),
        row(1, 17, 39, None),
        row(2, 17, 31, None),
    ];
    let verdict = judge(&Cause::Stalled, &rows, &[true, false, true]);
    assert_eq!(parse_verdict(&verdict.line).unwrap().0, 2);
    // Where nobody is stuck but the waiting, both that are on their way are named.
    let verdict = judge(&Cause::Stalled, &rows, &[true, false, false]);
    assert_eq!(parse_verdict(&verdict.line).unwrap().0, 1);
    assert!(
        verdict.line.ends_with("the same holds of rank 2"),
        "{}",
        verdict.line
    );
}

#[test]
fn who_is_behind_is_missing() {
    let by_step = [
        row(0, 18, 2, GATHER),
        row(1, 17, 90, REDUCE),
        row(2, 18, 2, GATHER),
    ];
    assert_eq!(blamed(&by_step), Some(1));
    let by_action = [
        row(0, 18, 5, GATHER),
        row(1, 18, 5, GATHER),
        row(2, 18, 4, GATHER),
    ];
    assert_eq!(blamed(&by_action), Some(2));
    let first = [
        row(0, 16, 90, REDUCE),
        row(1, 17, 90, REDUCE),
        row(2, 18, 2, GATHER),
    ];
    assert_eq!(blamed(&first), Some(0));
}

#[test]
fn who_waits_elsewhere_is_missing() {
    let rows = [
        row(0, 18, 5, GATHER),
        row(1, 18, 5, REDUCE),
        row(2, 18, 5, GATHER),
        row(3, 18, 5, GATHER),
    ];
    assert_eq!(blamed(&rows), Some(1));
}

#[test]
fn when_all_wait_for_the_same_nobody_is_blamed() {
    let rows = [row(0, 18, 5, GATHER), row(1, 18, 5, GATHER)];
    assert_eq!(blamed(&rows), None);
    let line = stall(&rows).line;
    assert!(
        line.contains("all 2 ranks wait for each other in all-gather on lane 1"),
        "{line}"
    );
    assert!(!line.contains(VERDICT_MARK), "{line}");
    // Two against two is no majority.
    let tie = [
        row(0, 18, 5, GATHER),
        row(1, 18, 5, GATHER),
        row(2, 18, 5, REDUCE),
        row(3, 18, 5, REDUCE),
    ];
    assert_eq!(blamed(&tie), None);
}

#[test]
fn a_rank_alone_or_all_stuck_in_compute_are_named() {
    assert_eq!(blamed(&[row(0, 3, 1, None)]), Some(0));
    let verdict = stall(&[row(0, 3, 1, None), row(1, 3, 1, None)]);
    assert!(
        verdict.line.ends_with("the same holds of rank 1"),
        "{}",
        verdict.line
    );
}

#[test]
fn a_rank_that_has_left_is_not_missed() {
    let mut left = row(0, 1, 0, None);
    left.left = true;
    assert_eq!(
        blamed(&[left, row(1, 9, 0, REDUCE), row(2, 9, 0, None)]),
        Some(2)
    );
}

#[test]
fn the_causes_are_told_apart() {
    let rows = [row(0, 3, 1, REDUCE), row(1, 3, 1, None)];
    let line = |cause| judge(&cause, &rows, &[false; 2]);
    let closed = line(Cause::Closed(1));
    assert!(
        closed
            .line
            .starts_with("watchdog: lost rank 1 (node0, pid 4701): its connection closed"),
        "{}",
        closed.line
    );
    let silent = line(Cause::Silent(0, Duration::from_secs(31)));
    assert!(
        silent.line.contains("no word from it for 31 s"),
        "{}",
        silent.line
    );
    let late = line(Cause::NeverJoined(1, Duration::from_secs(1800)));
    assert!(
        late.line.contains("did not join within 1800 s"),
        "{}",
        late.line
    );
    assert!(!closed.dump && !silent.dump && !late.dump && stall(&rows).dump);
}

#[test]
fn a_verdict_is_read_back_from_a_tagged_line() {
    let line = "[1,0]<stderr>: watchdog: lost rank 12 (n, pid 1): its connection closed";
    assert_eq!(
        parse_verdict(line),
        Some((12, "(n, pid 1): its connection closed"))
    );
    for other in [
        "watchdog: lost rank",
        "watchdog: lost rank x y",
        "all is well",
        "",
    ] {
        assert_eq!(parse_verdict(other), None);
    }
}

#[test]
fn ranks_are_put_together() {
    assert_eq!(ranks(&[]), "no rank");
    assert_eq!(ranks(&[4]), "rank 4");
    assert_eq!(ranks(&[0, 1]), "ranks 0 and 1");
    assert_eq!(ranks(&[0, 1, 2, 3, 7, 9]), "ranks 0–3, 7 and 9");
}

#[test]
fn a_small_world_is_listed_rank_by_rank() {
    let rows = [row(0, 17, 40, REDUCE), row(1, 17, 31, None)];
    let table = stall(&rows).table;
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(lines.len(), 3, "{table}");
    assert!(
        lines[1].contains("4700") && lines[1].ends_with("all-reduce on lane 3"),
        "{table}"
    );
    assert!(
        lines[2].contains("4701") && lines[2].ends_with('◀'),
        "{table}"
    );
}

#[test]
fn a_large_world_is_listed_by_state() {
    let mut rows: Vec<Row> = (0..4096).map(|rank| row(rank, 17, 40, REDUCE)).collect();
    rows[2500].waits_for = None;
    for (rank, row) in rows.iter_mut().enumerate() {
        row.idle = Duration::from_secs(590 + rank as u64 % 11);
    }
    let verdict = stall(&rows);
    let lines: Vec<&str> = verdict.table.lines().collect();
    assert_eq!(lines.len(), 3, "{}", verdict.table);
    assert!(
        lines[1].contains("0–2499 and 2501–4095"),
        "{}",
        verdict.table
    );
    assert!(
        lines[1].contains("512 hosts") && lines[1].contains("590–600 s"),
        "{}",
        verdict.table
    );
    assert!(
        lines[2].contains("2500") && lines[2].ends_with('◀'),
        "{}",
        verdict.table
    );
}
