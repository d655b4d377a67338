//! What is measured: calls, and rows of the table that are made of their times.

use oxitron_kernels::Error;
use tch::Kind;

use crate::options::Options;
use crate::timing::{Clock, Sample};

/// Share of the copy's rate that an op has to reach where memory limits it.
pub const BAR: f64 = 0.8;

/// What an op does in a call.
#[derive(Clone, Copy)]
pub enum Work {
    /// It moves so many bytes, each operand read or written once.
    Bytes(f64),
    /// It multiplies and adds, so many operations in all.
    Flops(f64),
    /// Next to nothing: a launch, that is all.
    Launch,
}

/// A row of the table.
pub struct Op {
    pub name: &'static str,
    pub shape: String,
    pub dtype: &'static str,
    pub work: Work,
}

impl Op {
    /// An op that memory limits.
    pub fn moving(name: &'static str, shape: String, dtype: &'static str, bytes: f64) -> Op {
        Op {
            name,
            shape,
            dtype,
            work: Work::Bytes(bytes),
        }
    }

    /// An op around products in bf16 of `n` rows, `i` numbers each, to `o` numbers each.
    pub fn product(name: &'static str, [n, i, o]: [i64; 3], flops: i64) -> Op {
        Op {
            name,
            shape: format!("{n} × {i} → {o}"),
            dtype: "bf16",
            work: Work::Flops(flops as f64),
        }
    }
}

/// A dtype in the table.
pub fn named(kind: Kind) -> &'static str {
    match kind {
        Kind::BFloat16 => "bf16",
        _ => "fp32",
    }
}

/// An op with its operands.
type Call = Box<dyn FnMut() -> Result<(), Error>>;

/// A call and its times, or why there are none.
struct Case {
    call: Result<Call, String>,
    /// Calls of a sample.
    calls: usize,
    /// One of each round.
    samples: Vec<Sample>,
}

impl Case {
    /// Does something with the call, which is given up where that fails.
    fn attempt<T>(&mut self, act: impl FnOnce(&mut Call) -> Result<T, Error>) -> Option<T> {
        let outcome = act(self.call.as_mut().ok()?);
        outcome
            .map_err(|error| self.call = Err(error.to_string()))
            .ok()
    }
}

/// Where a row's time comes from: numbers of cases.
enum Time {
    /// The time of a call.
    Whole(usize),
    /// What a call takes beyond the product in it, which is timed by itself.
    Beyond { whole: usize, product: usize },
}

/// A row, and how it is judged.
pub struct Row {
    pub op: Op,
    time: Time,
    /// Others are held against it.
    pub is_floor: bool,
}

/// What the rounds found, in seconds of a call.
pub struct Seconds {
    pub least: f64,
    pub median: f64,
    pub most: f64,
    /// Of the host, to issue it.
    pub issue: Option<f64>,
}

/// Rows and their cases.
pub struct Suite {
    filter: Vec<String>,
    cases: Vec<Case>,
    pub rows: Vec<Row>,
}

impl Suite {
    pub fn new(filter: Vec<String>) -> Suite {
        Suite {
            filter,
            cases: Vec::new(),
            rows: Vec::new(),
        }
    }

    /// An op; `build` makes its operands and is called only where the op is wanted.
    pub fn add<C>(&mut self, op: Op, build: impl FnOnce() -> Result<C, Error>)
    where
        C: FnMut() -> Result<(), Error> + 'static,
    {
        if self.wants(op.name) {
            let time = Time::Whole(self.case(build));
            self.rows.push(Row {
                op,
                time,
                is_floor: false,
            });
        }
    }

    /// As [`Suite::add`], for what others are held against, whatever is asked for.
    pub fn add_floor<C>(&mut self, op: Op, build: impl FnOnce() -> Result<C, Error>)
    where
        C: FnMut() -> Result<(), Error> + 'static,
    {
        let time = Time::Whole(self.case(build));
        self.rows.push(Row {
            op,
            time,
            is_floor: true,
        });
    }

    /// The pass of an op that comes on top of its product: its time is the difference between both,
    /// taken one after the other.
    pub fn add_beyond<C, P>(
        &mut self,
        op: Op,
        whole: impl FnOnce() -> Result<C, Error>,
        product: impl FnOnce() -> Result<P, Error>,
    ) where
        C: FnMut() -> Result<(), Error> + 'static,
        P: FnMut() -> Result<(), Error> + 'static,
    {
        if self.wants(op.name) {
            let (whole, product) = (self.case(whole), self.case(product));
            self.rows.push(Row {
                op,
                time: Time::Beyond { whole, product },
                is_floor: false,
            });
        }
    }

    fn wants(&self, name: &str) -> bool {
        self.filter.is_empty() || self.filter.iter().any(|part| name.contains(part.as_str()))
    }

    fn case<C>(&mut self, build: impl FnOnce() -> Result<C, Error>) -> usize
    where
        C: FnMut() -> Result<(), Error> + 'static,
    {
        let call = build().map(|call| Box::new(call) as Call);
        self.cases.push(Case {
            call: call.map_err(|error| error.to_string()),
            calls: 1,
            samples: Vec::new(),
        });
        self.cases.len() - 1
    }

    /// Calls each case twice, with two sets of its operands.
    pub fn call_each(&mut self) {
        for case in &mut self.cases {
            case.attempt(|call| call().and_then(|()| call()));
        }
    }

    /// Takes the time of all cases in turns. What fails is left out from then on.
    pub fn measure(&mut self, clock: &mut Clock, options: &Options) {
        // The first call takes scratch from the system, and libraries choose their kernels.
        for case in &mut self.cases {
            case.attempt(|call| clock.try_call(call));
        }
        let begun = std::time::Instant::now();
        while begun.elapsed() < options.warm_up() {
            for case in &mut self.cases {
                case.attempt(|call| clock.sample(1, call));
            }
        }
        for case in &mut self.cases {
            let calls = case.attempt(|call| clock.calls_in(options.slice(), call));
            case.calls = calls.unwrap_or(1);
        }
        for _ in 0..options.rounds() {
            for case in &mut self.cases {
                let calls = case.calls;
                let sample = case.attempt(|call| clock.sample(calls, call));
                case.samples.extend(sample);
            }
        }
    }

    /// Why a row's calls failed, where they did.
    pub fn failure(&self, row: &Row) -> Option<&str> {
        let cases = match row.time {
            Time::Whole(whole) => [whole, whole],
            Time::Beyond { whole, product } => [whole, product],
        };
        let failure = |case: usize| self.cases[case].call.as_ref().err();
        cases.into_iter().find_map(failure).map(String::as_str)
    }

    /// A row's time.
    ///
    /// # Errors
    /// Why there is none.
    pub fn seconds(&self, row: &Row) -> Result<Seconds, String> {
        if let Some(failure) = self.failure(row) {
            return Err(failure.to_owned());
        }
        let samples = |case: usize| self.cases[case].samples.iter();
        let (seconds, issue): (Vec<f64>, _) = match row.time {
            Time::Whole(case) => (
                samples(case).map(|sample| sample.seconds).collect(),
                Some(samples(case).map(|sample| sample.issue_seconds).collect()),
            ),
            Time::Beyond { whole, product } => {
                let pairs = samples(whole).zip(samples(product));
                (
                    pairs
                        .map(|(one, other)| one.seconds - other.seconds)
                        .collect(),
                    None,
                )
            }
        };
        let [least, median, most] = spread(seconds).ok_or("no time was taken")?;
        if median <= 0.0 {
            return Err("its time cannot be told from that of its product".to_owned());
        }
        Ok(Seconds {
            least,
            median,
            most,
            issue: issue.and_then(spread).map(|[_, median, _]| median),
        })
    }
}

/// Least, median and most.
fn spread(mut numbers: Vec<f64>) -> Option<[f64; 3]> {
    numbers.sort_by(f64::total_cmp);
    let (least, most) = (*numbers.first()?, *numbers.last()?);
    let (low, high) = ((numbers.len() - 1) / 2, numbers.len() / 2);
    Some([least, (numbers[low] + numbers[high]) / 2.0, most])
}
