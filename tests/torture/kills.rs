//! Which kills there are, and which of them a torture takes.

use std::collections::BTreeMap;
use std::fmt;

/// The module that makes every change of a checkpoint on disk. Its points are read from its text, so
/// that one that is added there is killed at here.
const DISK: &str = include_str!("../../trainer/src/checkpoint/disk.rs");
/// Where a stage begins: the checkpoint of the stage before is there or on its way, the optimizer is
/// not reset yet or is.
const STAGE: [&str; 2] = ["stage::begin::before", "stage::begin::after"];

/// A small generator with a fixed seed, so that a failure can be looked at again.
pub struct Random(pub u64);

impl Random {
    fn next(&mut self) -> u64 {
        // SplitMix64: any seed is a good one.
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        bits ^ (bits >> 31)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }

    /// From 0 up to 1.
    pub fn share(&mut self) -> f64 {
        self.below(1 << 32) as f64 / (1u64 << 32) as f64
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last as u64 + 1) as usize);
        }
    }
}

/// Whom a kill at some moment hits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Victim {
    Rank(usize),
    AllRanks,
    Launcher,
}

/// One kill.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kill {
    /// A rank (either, where none is named) dies at a fault point.
    Point(&'static str, Option<usize>),
    /// SIGKILL at some moment.
    Moment(Victim),
}

impl fmt::Display for Kill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Point(point, Some(rank)) => write!(f, "{point}, rank {rank}"),
            Self::Point(point, None) => write!(f, "{point}, either rank"),
            Self::Moment(Victim::Rank(rank)) => write!(f, "some moment, rank {rank}"),
            Self::Moment(Victim::AllRanks) => f.write_str("some moment, all ranks"),
            Self::Moment(Victim::Launcher) => f.write_str("some moment, the launcher"),
        }
    }
}

impl Kill {
    /// Whether this is the switch of stages, which a run passes once.
    pub fn is_at_the_switch(self) -> bool {
        matches!(self, Self::Point(point, _) if STAGE.contains(&point))
    }
}

/// How often a run comes to the points, by point and rank.
pub struct Visits(BTreeMap<(&'static str, usize), u64>);

impl Visits {
    /// What must be in `FAILPOINTS` of the run: nothing happens at the points but that each visit is
    /// a line on standard error.
    pub fn counting() -> String {
        let counted = points()
            .into_iter()
            .map(|point| format!("{point}=return(sleep:0)"));
        counted.collect::<Vec<_>>().join(";")
    }

    /// Counts the lines.
    pub fn read(stderr: &str) -> Self {
        let mut visits = BTreeMap::new();
        for point in points() {
            for rank in 0..2 {
                let line = format!("rank {rank}: fault at {point}: sleep:0");
                let count = stderr.lines().filter(|&found| found == line).count();
                visits.insert((point, rank), count as u64);
            }
        }
        Self(visits)
    }

    /// How often the rank of a kill comes to its point; a kill that can never be is a mistake here.
    pub fn of(&self, kill: Kill) -> u64 {
        let visits = match kill {
            Kill::Point(point, Some(rank)) => self.0[&(point, rank)],
            Kill::Point(point, None) => self.0[&(point, 0)].max(self.0[&(point, 1)]),
            Kill::Moment(_) => 1,
        };
        assert!(visits > 0, "a run never comes to {kill}");
        visits
    }
}

/// All fault points of saves and of the switch of stages.
pub fn points() -> Vec<&'static str> {
    let quoted = |text: &'static str| text.split('"').next().unwrap();
    let around = DISK.split("around!(\"").skip(1).map(quoted);
    let single = DISK.split("point(\"").skip(1).map(quoted);
    let mut points: Vec<&'static str> = around
        .flat_map(|operation| {
            ["before", "after"].map(|place| &*format!("disk::{operation}::{place}").leak())
        })
        .chain(single)
        .chain(STAGE)
        .collect();
    points.sort_unstable();
    points
}

/// `count` kills in random order: two thirds at points, the others at some moment, each as evenly as
/// the number allows.
pub fn draw(random: &mut Random, count: usize) -> Vec<Kill> {
    let mut at_points: Vec<Vec<Kill>> = points()
        .into_iter()
        .map(|point| {
            // What is removed is removed by the rank that commits; which rank is first to make the
            // folder is chance.
            let ranks: &[Option<usize>] = match point.split("::").nth(1) {
                Some("remove_file" | "remove_folder") => &[Some(0)],
                Some("create_folder") => &[None],
                _ => &[Some(0), Some(1)],
            };
            let mut kills: Vec<Kill> = ranks.iter().map(|&rank| Kill::Point(point, rank)).collect();
            random.shuffle(&mut kills);
            kills
        })
        .collect();
    random.shuffle(&mut at_points);
    let mut moments = [
        Victim::Rank(0),
        Victim::Rank(1),
        Victim::AllRanks,
        Victim::Launcher,
    ]
    .map(Kill::Moment);
    random.shuffle(&mut moments);
    let (of_moments, of_points) = (count / 3, count - count / 3);
    let mut kills: Vec<Kill> = (0..of_points)
        .map(|index| {
            let of_point = &at_points[index % at_points.len()];
            of_point[index / at_points.len() % of_point.len()]
        })
        .chain((0..of_moments).map(|index| moments[index % moments.len()]))
        .collect();
    random.shuffle(&mut kills);
    kills
}

/// A table: each kill and how often it was made.
pub fn table(made: &BTreeMap<Kill, usize>) -> String {
    let lines = made
        .iter()
        .map(|(kill, count)| format!("{count:5}  {kill}\n"));
    lines.collect()
}
