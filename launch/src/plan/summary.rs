//! A step in a few lines: what is done again and again is said once.
//!
//! The list is folded three times. Neighbouring actions on one layer or unit become one entry
//! (`recompute, backward, reduce: block.3`); entries that repeat layer by layer become one
//! (`block.23 … block.0`); and those that repeat micro-batch by micro-batch become one
//! (`micro-batches 0 … 6`). A bracket joins entries that take turns.

use super::actions::Line;

/// The most entries that repeat together.
const LONGEST_CYCLE: usize = 12;

/// Actions on one object, or the same on several.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    verbs: Vec<String>,
    first: String,
    last: String,
    /// First and last.
    micro_batches: Option<(usize, usize)>,
    /// Of the micro-batches and of the layers that repeat: blanks where nothing takes turns.
    brackets: [char; 2],
}

/// Which bracket a fold draws.
#[derive(Clone, Copy)]
enum Level {
    MicroBatch,
    Layer,
}

/// The step as lines.
pub fn summary(lines: &[Line]) -> Vec<String> {
    let mut entries: Vec<Entry> = Vec::new();
    for entry in lines.iter().map(Entry::new) {
        match entries.last_mut() {
            Some(last) if last.takes(&entry) => last.add(entry),
            _ => entries.push(entry),
        }
    }
    let alike = |a: &Entry, b: &Entry| {
        !a.first.is_empty() && a.verbs == b.verbs && a.micro_batches == b.micro_batches
    };
    let by_layer = |first: &mut Entry, again: &Entry| first.last.clone_from(&again.last);
    // Layers repeat in cycles of few entries; micro-batches in cycles of what that leaves.
    let entries = fold(entries, LONGEST_CYCLE, Level::Layer, &alike, by_layer);
    let next = |a: &Entry, b: &Entry| {
        let follows = match (a.micro_batches, b.micro_batches) {
            (Some((_, last)), Some((first, _))) => first == last + 1,
            _ => false,
        };
        follows && a.verbs == b.verbs && (&a.first, &a.last) == (&b.first, &b.last)
    };
    let longest = entries.len();
    let entries = fold(
        entries,
        longest,
        Level::MicroBatch,
        &next,
        |first, again| {
            if let (Some((_, last)), Some((_, new))) =
                (&mut first.micro_batches, again.micro_batches)
            {
                *last = new;
            }
        },
    );
    let drawn: Vec<usize> = [Level::MicroBatch as usize, Level::Layer as usize]
        .into_iter()
        .filter(|&level| entries.iter().any(|entry| entry.brackets[level] != ' '))
        .collect();
    let line = |entry: &Entry| {
        let mut line: String = drawn.iter().map(|&level| entry.brackets[level]).collect();
        if !line.is_empty() {
            line.push(' ');
        }
        line + &entry.text()
    };
    entries.iter().map(line).collect()
}

/// Merges cycles of up to `longest` entries, each of which is `alike` the one that many places
/// before; wherever several are possible, the one that covers most, and the shorter of equals.
fn fold(
    entries: Vec<Entry>,
    longest: usize,
    level: Level,
    alike: &dyn Fn(&Entry, &Entry) -> bool,
    merge: impl Fn(&mut Entry, &Entry),
) -> Vec<Entry> {
    let mut folded = Vec::new();
    let mut at = 0;
    while at < entries.len() {
        // Entries from `at` that repeat with this period.
        let covered = |period: usize| {
            let again = (at + period..entries.len())
                .take_while(|&index| alike(&entries[index - period], &entries[index]))
                .count();
            (again / period + 1) * period
        };
        let best = (1..=longest)
            .filter(|&period| covered(period) > period)
            .max_by_key(|&period| (covered(period), usize::MAX - period));
        let period = best.unwrap_or(1);
        let covered = if best.is_some() { covered(period) } else { 1 };
        let mut cycle = entries[at..at + period].to_vec();
        for index in at + period..at + covered {
            merge(&mut cycle[(index - at) % period], &entries[index]);
        }
        if let [first, between @ .., last] = &mut cycle[..] {
            first.brackets[level as usize] = '┌';
            for entry in between {
                entry.brackets[level as usize] = '│';
            }
            last.brackets[level as usize] = '└';
        }
        folded.append(&mut cycle);
        at += covered;
    }
    folded
}

impl Entry {
    fn new(line: &Line) -> Self {
        let verb = match line.remark {
            "" => line.verb.to_owned(),
            remark @ ("weights" | "gradients") => format!("{} {remark}", line.verb),
            _ => format!("{} and add", line.verb),
        };
        // All pieces of a unit are one object.
        let object = match line.object.split_once(' ') {
            Some((unit, _)) => unit.to_owned(),
            None => line.object.clone(),
        };
        Self {
            verbs: vec![verb],
            first: object.clone(),
            last: object,
            micro_batches: line.micro_batch.map(|index| (index, index)),
            brackets: [' '; 2],
        }
    }

    /// Whether `other` is done to the same object, in the same micro-batch if in any.
    fn takes(&self, other: &Self) -> bool {
        let both = self.micro_batches.zip(other.micro_batches);
        self.last == other.first && both.is_none_or(|(a, b)| a == b)
    }

    fn add(&mut self, other: Self) {
        for verb in other.verbs {
            if !self.verbs.contains(&verb) {
                self.verbs.push(verb);
            }
        }
        self.micro_batches = self.micro_batches.or(other.micro_batches);
    }

    fn text(&self) -> String {
        let mut text = self.verbs.join(", ");
        if !self.first.is_empty() {
            text += &format!(": {}", self.first);
        }
        if self.last != self.first {
            text += &format!(" … {}", self.last);
        }
        match self.micro_batches {
            Some((first, last)) if first == last => text += &format!(", micro-batch {first}"),
            Some((first, last)) => text += &format!(", micro-batches {first} … {last}"),
            None => {}
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str) -> Vec<Line> {
        let line = |words: &'static str| {
            let mut words = words.split_whitespace();
            Line {
                verb: words.next().unwrap_or_default(),
                object: words.next().unwrap_or_default().replace('_', " "),
                remark: "",
                micro_batch: words.next().and_then(|index| index.parse().ok()),
            }
        };
        // Tests may leak: lines hold verbs that live as long as the program.
        let text: &'static str = Box::leak(text.to_owned().into_boxed_str());
        text.split(';').map(line).collect()
    }

    #[test]
    fn layers_and_micro_batches_that_repeat_are_said_once() {
        let forward = |index: usize| {
            ["embedding", "block.0", "block.1", "head"]
                .map(|layer| format!("forward {layer} {index};"))
                .concat()
        };
        let backward = |index: usize, then: &str| {
            ["head", "block.1", "block.0", "embedding"]
                .map(|layer| format!("backward {layer} {index};{}", then.replace('@', layer)))
                .concat()
        };
        let step = [0, 1, 2]
            .map(|index| forward(index) + &backward(index, ""))
            .concat()
            + &forward(3)
            + &backward(3, "reduce @_1/2;reduce @_2/2;")
            + "control;update head;gather head";
        assert_eq!(
            summary(&lines(&step)),
            [
                "┌ forward: embedding … block.1, micro-batches 0 … 2",
                "│ forward, backward: head, micro-batches 0 … 2",
                "└ backward: block.1 … embedding, micro-batches 0 … 2",
                "  forward: embedding … block.1, micro-batch 3",
                "  forward, backward, reduce: head, micro-batch 3",
                "  backward, reduce: block.1 … embedding, micro-batch 3",
                "  control",
                "  update, gather: head",
            ]
        );
    }
}
