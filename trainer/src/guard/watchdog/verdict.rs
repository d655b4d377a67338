//! From what the ranks last said to who is to blame: pure.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use super::pulse::Phase;

/// What opens the last line of a run that lost a rank, followed by the number of the rank, as in
/// `watchdog: lost rank 2 (node7, pid 4711): its connection closed without a goodbye`. A launcher
/// reads it with [`parse_verdict`].
pub const VERDICT_MARK: &str = "watchdog: lost rank";

/// What opens the last line of a run that hangs without a rank to blame.
const NOBODY_MARK: &str = "watchdog: no rank is missing:";

/// Ranks that are listed one by one; of more, equal states are put together.
const LISTED: usize = 32;

/// The rank that a line with [`VERDICT_MARK`] blames, and what it says about it.
///
/// ```
/// use oxitron_trainer::guard::watchdog::parse_verdict;
/// let line = "watchdog: lost rank 2 (node7, pid 4711): its connection closed";
/// assert_eq!(parse_verdict(line), Some((2, "(node7, pid 4711): its connection closed")));
/// ```
#[must_use]
pub fn parse_verdict(line: &str) -> Option<(usize, &str)> {
    let (_, rest) = line.split_once(VERDICT_MARK)?;
    let rest = rest.strip_prefix(' ')?;
    let (rank, rest) = rest.split_once(' ')?;
    Some((rank.parse().ok()?, rest))
}

/// What is known of a rank.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Row {
    pub(super) rank: usize,
    pub(super) host: String,
    /// Absent before it has joined.
    pub(super) pid: Option<u32>,
    pub(super) step: u64,
    pub(super) action: u64,
    pub(super) phase: Phase,
    /// Since its last progress.
    pub(super) idle: Duration,
    pub(super) waits_for: Option<String>,
    /// It has said goodbye.
    pub(super) left: bool,
}

/// Why a run cannot go on.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Cause {
    /// The connection of a rank has closed.
    Closed(usize),
    /// A rank sends nothing although its connection stands.
    Silent(usize, Duration),
    /// A rank has never come.
    NeverJoined(usize, Duration),
    /// Some rank makes no progress for longer than it may.
    Stalled,
}

/// What is to be said.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Verdict {
    pub(super) table: String,
    pub(super) line: String,
    /// Whether stacks would tell more.
    pub(super) dump: bool,
}

/// Judges. `stalled` says for each row whether it is past its limit.
pub(super) fn judge(cause: &Cause, rows: &[Row], stalled: &[bool]) -> Verdict {
    let (culprits, why) = match cause {
        Cause::Closed(rank) => (
            vec![*rank],
            "its connection closed without a goodbye; the process died or was killed, see its log"
                .to_owned(),
        ),
        Cause::Silent(rank, silence) => (
            vec![*rank],
            format!(
                "no word from it for {} s although its connection stands; the process is stopped \
                 or its host is gone",
                seconds(*silence)
            ),
        ),
        Cause::NeverJoined(rank, limit) => (
            vec![*rank],
            format!("it did not join within {} s, see its log", seconds(*limit)),
        ),
        Cause::Stalled => missing(rows, stalled),
    };
    let line = match culprits.split_first() {
        Some((&first, more)) => {
            let mut line = format!("{VERDICT_MARK} {first} {}: {why}", person(rows, first));
            if !more.is_empty() {
                let _ = write!(line, "; the same holds of {}", ranks(more));
            }
            line
        }
        None => format!("{NOBODY_MARK} {why}"),
    };
    Verdict {
        table: table(rows, &culprits),
        line,
        dump: *cause == Cause::Stalled,
    }
}

/// "(host, pid n)".
fn person(rows: &[Row], rank: usize) -> String {
    match rows.get(rank) {
        Some(Row {
            host,
            pid: Some(pid),
            ..
        }) => format!("({host}, pid {pid})"),
        _ => "(host unknown)".to_owned(),
    }
}

/// Who keeps the others waiting, and why we think so.
///
/// A rank that waits in a collective is not to blame for that as long as another one has not come
/// to it. So first those that wait for nothing; then, as all ranks walk the same actions, those that
/// are behind; then those that wait for another collective than most. Where nothing of this tells
/// ranks apart, all have come and the messages are lost.
fn missing(rows: &[Row], stalled: &[bool]) -> (Vec<usize>, String) {
    let here: Vec<&Row> = rows.iter().filter(|row| !row.left).collect();
    let is_stalled = |row: &Row| stalled.get(row.rank).copied().unwrap_or_default();
    let (waiting, working): (Vec<&Row>, Vec<&Row>) =
        here.iter().partition(|row| row.waits_for.is_some());

    if !working.is_empty() {
        // Of those that wait for nothing, some may be on their way and others stuck.
        let stuck: Vec<&Row> = working
            .iter()
            .copied()
            .filter(|row| is_stalled(row))
            .collect();
        let blamed = if stuck.is_empty() { working } else { stuck };
        let Some(first) = blamed.first() else {
            return (Vec::new(), "nobody is left".to_owned());
        };
        let mut why = format!(
            "no progress for {} s in {} of step {}",
            seconds(first.idle),
            first.phase.name(),
            first.step
        );
        if let Some(one) = waiting.first() {
            let _ = write!(
                why,
                ", while {} in {}",
                wait(&waiting),
                one.waits_for.as_deref().unwrap_or_default()
            );
        }
        return (numbers(&blamed), why);
    }

    let place = |row: &Row| (row.step, row.action);
    let last = here.iter().map(|row| place(row)).max();
    let behind = here.iter().map(|row| place(row)).min();
    if let (Some(last), Some(behind)) = (last, behind)
        && last != behind
    {
        let blamed: Vec<&Row> = here
            .iter()
            .copied()
            .filter(|row| place(row) == behind)
            .collect();
        let others = here.iter().find(|row| place(row) == last);
        if let (Some(first), Some(other)) = (blamed.first(), others) {
            let why = format!(
                "it is behind, in {} of step {} (action {}) waiting for {}, while others wait in \
                 step {} (action {}) for {}",
                first.phase.name(),
                first.step,
                first.action,
                first.waits_for.as_deref().unwrap_or_default(),
                other.step,
                other.action,
                other.waits_for.as_deref().unwrap_or_default()
            );
            return (numbers(&blamed), why);
        }
    }

    let mut groups: BTreeMap<&str, Vec<&Row>> = BTreeMap::new();
    for &row in &here {
        let collective = row.waits_for.as_deref().unwrap_or_default();
        groups.entry(collective).or_default().push(row);
    }
    let most = groups.iter().max_by_key(|(_, group)| group.len());
    if let Some((&common, group)) = most
        && 2 * group.len() > here.len()
        && group.len() < here.len()
    {
        let blamed: Vec<&Row> = here
            .iter()
            .copied()
            .filter(|row| row.waits_for.as_deref() != Some(common))
            .collect();
        let odd = blamed.first().and_then(|row| row.waits_for.as_deref());
        let why = format!(
            "it waits in {}, while {} in {common}",
            odd.unwrap_or_default(),
            wait(group)
        );
        return (numbers(&blamed), why);
    }
    let idle = here.iter().map(|row| row.idle).max().unwrap_or_default();
    let places: Vec<&str> = groups.keys().copied().take(4).collect();
    let why = format!(
        "all {} ranks wait for each other in {} for {} s; messages between them are lost or very \
         late, look at the network",
        here.len(),
        places.join(" or "),
        seconds(idle)
    );
    (Vec::new(), why)
}

fn numbers(rows: &[&Row]) -> Vec<usize> {
    rows.iter().map(|row| row.rank).collect()
}

/// "rank 3 waits" or "7 ranks wait".
fn wait(rows: &[&Row]) -> String {
    match rows {
        [one] => format!("rank {} waits", one.rank),
        more => format!("{} ranks wait", more.len()),
    }
}

/// "rank 3", "ranks 0 and 2", "ranks 0–6, 8 and 11"; `numbers` ascend.
pub(super) fn ranks(numbers: &[usize]) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for &rank in numbers {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == rank => *last = rank,
            _ => runs.push((rank, rank)),
        }
    }
    // Two neighbours read better apart.
    let mut texts: Vec<String> = Vec::new();
    for (first, last) in runs {
        match last - first {
            0 => texts.push(first.to_string()),
            1 => texts.extend([first.to_string(), last.to_string()]),
            _ => texts.push(format!("{first}–{last}")),
        }
    }
    let word = if numbers.len() == 1 { "rank" } else { "ranks" };
    match texts.split_last() {
        None => "no rank".to_owned(),
        Some((only, [])) => format!("{word} {only}"),
        Some((last, rest)) => format!("{word} {} and {last}", rest.join(", ")),
    }
}

/// The states of all ranks: one line for each in a small world, one for each different state in a
/// large one, where the culprits keep their own.
fn table(rows: &[Row], culprits: &[usize]) -> String {
    let header = [
        "rank",
        "host",
        "pid",
        "step",
        "phase",
        "no progress",
        "waits for",
        "",
    ];
    let mut lines: Vec<[String; 8]> = vec![header.map(str::to_owned)];
    let marked = |row: &Row| {
        culprits
            .iter()
            .take(LISTED / 2)
            .any(|&rank| rank == row.rank)
    };
    let (alone, grouped): (Vec<&Row>, Vec<&Row>) = rows
        .iter()
        .partition(|row| rows.len() <= LISTED || marked(row));
    let mut groups: BTreeMap<_, Vec<&Row>> = BTreeMap::new();
    for row in grouped {
        let state = (
            row.left,
            row.pid.is_some(),
            row.step,
            row.phase,
            &row.waits_for,
        );
        groups.entry(state).or_default().push(row);
    }
    let mut entries: Vec<Vec<&Row>> = alone.into_iter().map(|row| vec![row]).collect();
    entries.extend(groups.into_values());
    entries.sort_by_key(|rows| rows.first().map(|row| row.rank));
    for entry in &entries {
        let Some(row) = entry.first() else { continue };
        let text = ranks(&numbers(entry));
        let text = text.split_once(' ').map_or("", |(_, numbers)| numbers);
        let (host, pid) = if entry.len() == 1 {
            (row.host.clone(), row.pid)
        } else {
            let mut hosts: Vec<&str> = entry.iter().map(|row| row.host.as_str()).collect();
            hosts.sort_unstable();
            hosts.dedup();
            let host = match hosts.as_slice() {
                [one] => (*one).to_owned(),
                more => format!("{} hosts", more.len()),
            };
            (host, None)
        };
        let least = entry.iter().map(|row| row.idle).min().unwrap_or_default();
        let most = entry.iter().map(|row| row.idle).max().unwrap_or_default();
        let idle = if seconds(least) == seconds(most) {
            format!("{} s", seconds(most))
        } else {
            format!("{}–{} s", seconds(least), seconds(most))
        };
        let phase = match (row.left, row.pid) {
            (true, _) => "has left",
            (false, None) => "never joined",
            _ => row.phase.name(),
        };
        let blamed = entry.iter().any(|row| culprits.contains(&row.rank));
        lines.push([
            text.to_owned(),
            host,
            pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string()),
            row.step.to_string(),
            phase.to_owned(),
            idle,
            row.waits_for.clone().unwrap_or_else(|| "-".to_owned()),
            if blamed {
                "◀".to_owned()
            } else {
                String::new()
            },
        ]);
    }
    layout(&lines)
}

fn layout(lines: &[[String; 8]]) -> String {
    let width = |column: usize| {
        let cells = lines.iter().map(|line| line[column].chars().count());
        cells.max().unwrap_or_default()
    };
    let widths: [usize; 8] = std::array::from_fn(width);
    let mut text = String::new();
    for line in lines {
        let mut row = String::from("  ");
        for (cell, width) in line.iter().zip(widths) {
            let _ = write!(row, "{cell:width$}  ");
        }
        let _ = writeln!(text, "{}", row.trim_end());
    }
    text
}

/// Whole seconds, tenths below ten.
fn seconds(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    if seconds < 10.0 {
        format!("{seconds:.1}")
    } else {
        format!("{seconds:.0}")
    }
}

#[cfg(test)]
mod tests;
