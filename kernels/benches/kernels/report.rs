//! Time of an op and of its floor in turns, a row for each, and the line of JSON.

use std::time::{Duration, Instant};

use oxitron_kernels::{Error, simd};
use tch::Kind;

use crate::floors::{Floor, Floors};

/// An op that takes longer gets fewer rounds, but no fewer than [`FEW_ROUNDS`].
const LONG: Duration = Duration::from_secs(2);
const FEW_ROUNDS: usize = 3;

const USAGE: &str = "kernels [--threads N] [--ops NAME[,NAME]…] [--quick]";

/// What the command line asks for.
pub struct Options {
    /// All cores where absent.
    pub threads: Option<usize>,
    /// Parts of names of the ops to measure; all where empty.
    ops: Vec<String>,
    /// Few rounds, small shapes.
    pub quick: bool,
}

impl Options {
    /// # Errors
    /// A message for an option that there is not.
    pub fn parse(arguments: impl Iterator<Item = String>) -> Result<Options, String> {
        let mut options = Options {
            threads: None,
            ops: Vec::new(),
            quick: false,
        };
        let mut arguments = arguments;
        while let Some(argument) = arguments.next() {
            let mut value = || {
                let missing = || format!("{argument} needs a value: {USAGE}");
                arguments.next().ok_or_else(missing)
            };
            match argument.as_str() {
                "--threads" => {
                    let text = value()?;
                    let count = text.parse();
                    let count = count.map_err(|_| format!("--threads {text}: a number, please"));
                    options.threads = Some(count?);
                }
                "--ops" => options.ops.extend(value()?.split(',').map(str::to_owned)),
                "--quick" => options.quick = true,
                // `cargo bench` says it to every benchmark.
                "--bench" => {}
                other => return Err(format!("{other}: {USAGE}")),
            }
        }
        Ok(options)
    }

    fn rounds(&self) -> usize {
        if self.quick { 2 } else { 7 }
    }

    /// How long an op is called in a round, at least once.
    fn slice(&self) -> Duration {
        Duration::from_millis(if self.quick { 10 } else { 40 })
    }
}

/// An op on one shape.
pub struct Op {
    /// As in a trace.
    pub name: String,
    pub shape: String,
    pub kind: Kind,
    /// Operations, or bytes with each operand read or written once.
    pub work: f64,
    pub floor: Floor,
}

struct Row {
    op: Op,
    /// Of each round.
    seconds: Vec<f64>,
    /// Of each round: the rate over the floor's, which was measured just before.
    share: Vec<f64>,
}

/// Measures ops and remembers what it found.
pub struct Bench {
    pub options: Options,
    floors: Floors,
    /// What each floor has reached, in the order of [`Floor::ALL`].
    reached: [Vec<f64>; Floor::ALL.len()],
    rows: Vec<Row>,
}

impl Bench {
    /// Measures and prints the floors, then the head of the table.
    pub fn new(options: Options, floors: Floors) -> Bench {
        let rounds = options.rounds();
        let mut bench = Bench {
            options,
            floors,
            reached: Default::default(),
            rows: Vec::new(),
        };
        for floor in Floor::ALL {
            let rates: Vec<f64> = (0..rounds).map(|_| bench.rate_now(floor)).collect();
            let (name, unit) = (floor.name(), floor.unit());
            println!("{name:14} {:8.1} {unit}", median(&rates));
        }
        println!();
        print_cells([
            "op", "shape", "dtype", "ms", "least", "rate", "", "floor", "of it",
        ]);
        bench
    }

    fn rate_now(&mut self, floor: Floor) -> f64 {
        let rate = self.floors.rate(floor);
        let at = Floor::ALL.iter().position(|&other| other == floor);
        self.reached[at.unwrap_or_default()].push(rate);
        rate
    }

    /// Whether any of these ops was asked for.
    pub fn wants(&self, names: &[&str]) -> bool {
        let parts = &self.options.ops;
        let wanted = |name: &&str| parts.is_empty() || parts.iter().any(|part| name.contains(part));
        names.iter().any(wanted)
    }

    /// So many rows of so many bytes that caches hardly help.
    pub fn rows_of(&self, bytes: i64) -> i64 {
        let rows = self.floors.large() as i64 / bytes;
        (rows / 1024 + 1) * 1024
    }

    /// Calls `run` in several rounds, each behind a look at the floor, and prints the medians.
    ///
    /// # Errors
    /// The op's.
    pub fn measure(
        &mut self,
        op: Op,
        mut run: impl FnMut() -> Result<(), Error>,
    ) -> Result<(), Error> {
        if !self.wants(&[op.name.as_str()]) {
            return Ok(());
        }
        // The first call takes scratch from the system.
        run()?;
        let (mut seconds, mut share) = (Vec::new(), Vec::new());
        let begun = Instant::now();
        for round in 0..self.options.rounds() {
            if round >= FEW_ROUNDS && begun.elapsed() > LONG {
                break;
            }
            let floor = self.rate_now(op.floor);
            let time = seconds_of(&mut run, self.options.slice())?;
            share.push(1e-9 * op.work / time / floor);
            seconds.push(time);
        }
        let row = Row { op, seconds, share };
        row.print();
        self.rows.push(row);
        Ok(())
    }

    /// Prints the line of JSON.
    pub fn finish(self) {
        let floors: Vec<String> = Floor::ALL
            .iter()
            .zip(&self.reached)
            .map(|(floor, rates)| {
                let (name, unit) = (floor.name(), floor.unit());
                let (median, best) = (median(rates), greatest(rates));
                format!(
                    "\"{name}\":{{\"unit\":\"{unit}\",\"median\":{median:.2},\"best\":{best:.2}}}"
                )
            })
            .collect();
        let rows: Vec<String> = self.rows.iter().map(Row::json).collect();
        println!(
            "{{\"bench\":\"kernels\",\"threads\":{},\"level\":\"{}\",\"floors\":{{{}}},\"ops\":[{}]}}",
            oxitron_kernels::Threads::current().count(),
            simd::level().name(),
            floors.join(","),
            rows.join(",")
        );
    }
}

impl Row {
    fn dtype(&self) -> &'static str {
        match self.op.kind {
            Kind::BFloat16 => "bf16",
            _ => "fp32",
        }
    }

    fn milliseconds(&self) -> (f64, f64) {
        let least = self.seconds.iter().copied().fold(f64::INFINITY, f64::min);
        (1e3 * median(&self.seconds), 1e3 * least)
    }

    /// Of the median.
    fn rate(&self) -> f64 {
        1e-9 * self.op.work / median(&self.seconds)
    }

    fn print(&self) {
        let (middle, least) = self.milliseconds();
        print_cells([
            &self.op.name,
            &self.op.shape,
            self.dtype(),
            &format!("{middle:.3}"),
            &format!("{least:.3}"),
            &format!("{:.1}", self.rate()),
            self.op.floor.unit(),
            self.op.floor.name(),
            &format!("{:.0}%", 100.0 * median(&self.share)),
        ]);
    }

    fn json(&self) -> String {
        let Op {
            name, shape, floor, ..
        } = &self.op;
        let (middle, least) = self.milliseconds();
        format!(
            "{{\"op\":\"{name}\",\"shape\":\"{shape}\",\"dtype\":\"{}\",\"ms\":{middle:.4},\
             \"least_ms\":{least:.4},\"rate\":{:.2},\"unit\":\"{}\",\"floor\":\"{}\",\
             \"of_floor\":{:.4}}}",
            self.dtype(),
            self.rate(),
            floor.unit(),
            floor.name(),
            median(&self.share)
        )
    }
}

fn print_cells([op, shape, dtype, ms, least, rate, unit, floor, share]: [&str; 9]) {
    println!(
        "{op:18} {shape:28} {dtype:5} {ms:>9} {least:>9} {rate:>8} {unit:7} {floor:13} {share:>5}"
    );
}

/// Seconds of a call: as many as fit in a slice of time, at least one.
fn seconds_of(run: &mut impl FnMut() -> Result<(), Error>, slice: Duration) -> Result<f64, Error> {
    let (begun, mut calls) = (Instant::now(), 0);
    while calls == 0 || begun.elapsed() < slice {
        run()?;
        calls += 1;
    }
    Ok(begun.elapsed().as_secs_f64() / f64::from(calls))
}

fn median(x: &[f64]) -> f64 {
    let mut sorted = x.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n => (sorted[(n - 1) / 2] + sorted[n / 2]) / 2.0,
    }
}

fn greatest(x: &[f64]) -> f64 {
    x.iter().copied().fold(f64::NEG_INFINITY, f64::max)
}
