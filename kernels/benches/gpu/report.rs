//! The tables, the bars and the line of JSON.

use oxitron_kernels::cuda::DeviceInfo;

use crate::ops::{Model, Part};
use crate::options::Options;
use crate::suite::{BAR, Row, Seconds, Suite, Work};

/// Rates that ops are held against, in bytes and operations a second; not a number where they could
/// not be measured.
#[derive(Clone, Copy)]
struct Floors {
    copy: f64,
    product: f64,
}

impl Floors {
    /// Of the copy, and of the fastest product.
    fn of(suite: &Suite) -> Floors {
        let mut floors = Floors {
            copy: f64::NAN,
            product: f64::NAN,
        };
        for row in suite.rows.iter().filter(|row| row.is_floor) {
            if let (Ok(seconds), Some((work, _))) = (suite.seconds(row), rated(row.op.work)) {
                let rate = work / seconds.median;
                match row.op.work {
                    Work::Flops(_) => floors.product = floors.product.max(rate),
                    _ => floors.copy = rate,
                }
            }
        }
        floors
    }
}

/// Work that has a rate, and a unit for it: its name, and how much it is.
fn rated(work: Work) -> Option<(f64, (&'static str, f64))> {
    match work {
        Work::Bytes(bytes) => Some((bytes, ("GB/s", 1e9))),
        Work::Flops(flops) => Some((flops, ("TFLOP/s", 1e12))),
        Work::Launch => None,
    }
}

/// A row with all that is printed of it.
struct Judged<'a> {
    row: &'a Row,
    seconds: Result<Seconds, String>,
    /// Of the floor's rate.
    share: Option<f64>,
}

impl<'a> Judged<'a> {
    fn new(suite: &Suite, row: &'a Row, floors: Floors) -> Judged<'a> {
        let seconds = suite.seconds(row);
        let floor = match row.op.work {
            Work::Bytes(_) => floors.copy,
            _ => floors.product,
        };
        let rate = |(work, _)| Some(work / seconds.as_ref().ok()?.median);
        let share = rated(row.op.work).and_then(rate).map(|rate| rate / floor);
        Judged {
            row,
            share,
            seconds,
        }
    }

    fn has_bar(&self) -> bool {
        matches!(self.row.op.work, Work::Bytes(_)) && !self.row.is_floor
    }

    /// Whether it ran, and reached its bar where it has one.
    fn is_well(&self) -> bool {
        self.seconds.is_ok() && (!self.has_bar() || self.share.is_some_and(|share| share >= BAR))
    }

    fn print(&self) {
        let op = &self.row.op;
        let seconds = match &self.seconds {
            Ok(seconds) => seconds,
            Err(failure) => {
                println!(
                    "{:30} {:32} {:12} failed: {failure}",
                    op.name, op.shape, op.dtype
                );
                return;
            }
        };
        let milliseconds = |seconds: f64| format!("{:.4}", 1e3 * seconds);
        let work = match op.work {
            Work::Bytes(bytes) => format!("{:.3} GB", 1e-9 * bytes),
            Work::Flops(flops) => format!("{:.3} TFLOP", 1e-12 * flops),
            Work::Launch => String::new(),
        };
        let rate = rated(op.work).map_or_else(String::new, |(work, (unit, scale))| {
            format!("{:.1} {unit}", work / seconds.median / scale)
        });
        let share = self.share.filter(|_| !self.row.is_floor);
        print_cells([
            op.name,
            &op.shape,
            op.dtype,
            &milliseconds(seconds.median),
            &milliseconds(seconds.least),
            &milliseconds(seconds.most),
            &seconds
                .issue
                .map_or_else(String::new, |issue| format!("{:.1}", 1e6 * issue)),
            &work,
            &rate,
            &share.map_or_else(String::new, |share| format!("{:.0}%", 100.0 * share)),
            if self.is_well() { "" } else { "below the bar" },
        ]);
    }

    fn json(&self) -> String {
        let op = &self.row.op;
        let mut fields = vec![
            format!("\"op\":{}", quoted(op.name)),
            format!("\"shape\":{}", quoted(&op.shape)),
            format!("\"dtype\":{}", quoted(op.dtype)),
        ];
        match &self.seconds {
            Err(failure) => fields.push(format!("\"failed\":{}", quoted(failure))),
            Ok(Seconds {
                least,
                median,
                most,
                issue,
            }) => {
                let us = |seconds: &f64| format!("{:.3}", 1e6 * seconds);
                fields.push(format!("\"median_us\":{}", us(median)));
                fields.push(format!("\"least_us\":{}", us(least)));
                fields.push(format!("\"most_us\":{}", us(most)));
                fields.extend(
                    issue
                        .iter()
                        .map(|issue| format!("\"issue_us\":{}", us(issue))),
                );
                match op.work {
                    Work::Bytes(bytes) => {
                        fields.push(format!("\"bytes\":{bytes:.0}"));
                        fields.push(format!("\"gb_per_second\":{:.2}", 1e-9 * bytes / median));
                    }
                    Work::Flops(flops) => {
                        fields.push(format!("\"flops\":{flops:.0}"));
                        let rate = 1e-12 * flops / median;
                        fields.push(format!("\"tflops_per_second\":{rate:.2}"));
                    }
                    Work::Launch => {}
                }
            }
        }
        if !self.row.is_floor {
            let share = self.share.filter(|share| share.is_finite());
            fields.extend(share.map(|share| format!("\"of_floor\":{share:.4}")));
        }
        if self.has_bar() {
            fields.push(format!("\"bar\":{BAR}"));
        }
        fields.push(format!("\"well\":{}", self.is_well()));
        format!("{{{}}}", fields.join(","))
    }
}

/// What is found, part after part.
pub struct Report<'a> {
    options: &'a Options,
    gpu: &'a DeviceInfo,
    parts: Vec<String>,
    rows: usize,
    /// Rows that failed or missed their bar.
    not_well: Vec<String>,
}

impl<'a> Report<'a> {
    /// Prints what is measured.
    pub fn new(options: &'a Options, gpu: &'a DeviceInfo) -> Report<'a> {
        println!(
            "{} ({}, {:.0} GB), {} rounds",
            gpu.name,
            gpu.architecture,
            1e-9 * gpu.memory as f64,
            options.rounds()
        );
        Report {
            options,
            gpu,
            parts: Vec::new(),
            rows: 0,
            not_well: Vec::new(),
        }
    }

    /// Prints the table of a part.
    pub fn add(&mut self, part: Part, model: Model, suite: &Suite, peak_bytes: u64) {
        let floors = Floors::of(suite);
        println!(
            "\n{}, {}, {} tokens: copies {:.0} GB/s, products {:.0} TFLOP/s; {:.1} GB at most\n",
            model.name,
            part.name(),
            model.tokens,
            1e-9 * floors.copy,
            1e-12 * floors.product,
            1e-9 * peak_bytes as f64
        );
        print_cells([
            "op", "shape", "dtype", "ms", "least", "most", "host us", "work", "rate", "share", "",
        ]);
        let judged = suite.rows.iter().map(|row| Judged::new(suite, row, floors));
        let judged: Vec<Judged> = judged.collect();
        for row in &judged {
            row.print();
        }
        let missed = judged.iter().filter(|row| !row.is_well());
        self.not_well.extend(missed.map(|row| {
            let op = &row.row.op;
            format!("{}: {}, {}, {}", model.name, op.name, op.shape, op.dtype)
        }));
        self.rows += judged.len();
        let rows: Vec<String> = judged.iter().map(Judged::json).collect();
        let number = |rate: f64| match rate.is_finite() {
            true => format!("{rate:.2}"),
            false => "null".to_owned(),
        };
        self.parts.push(format!(
            "{{\"model\":{},\"part\":{},\"tokens\":{},\"copy_gb_per_second\":{},\
             \"product_tflops_per_second\":{},\"peak_bytes\":{peak_bytes},\"rows\":[{}]}}",
            quoted(model.name),
            quoted(part.name()),
            model.tokens,
            number(1e-9 * floors.copy),
            number(1e-12 * floors.product),
            rows.join(",")
        ));
    }

    /// Prints what is not well, and the line of JSON. Whether all is well.
    pub fn finish(self) -> bool {
        println!();
        if self.rows == 0 {
            println!("no op has a name that the filter asks for");
        }
        for row in &self.not_well {
            println!("not well: {row}");
        }
        println!(
            "{} of {} rows are well; the bar of what memory limits is {:.0}% of a copy's rate",
            self.rows - self.not_well.len(),
            self.rows,
            100.0 * BAR
        );
        let passed = self.rows > 0 && self.not_well.is_empty();
        let line = format!(
            "{{\"bench\":\"gpu\",\"gpu\":{},\"architecture\":{},\"memory_bytes\":{},\"rounds\":{},\
             \"quick\":{},\"passed\":{},\"parts\":[{}]}}",
            quoted(&self.gpu.name),
            quoted(&self.gpu.architecture),
            self.gpu.memory,
            self.options.rounds(),
            self.options.quick,
            passed,
            self.parts.join(",")
        );
        say(self.options, &line) && passed
    }
}

/// How calls on the CPU went.
#[derive(Default)]
pub struct Outcomes {
    rows: usize,
    failed: usize,
}

impl Outcomes {
    /// Prints a line for each row.
    pub fn add(&mut self, suite: &Suite) {
        for row in &suite.rows {
            let op = &row.op;
            let failure = suite.failure(row);
            self.rows += 1;
            self.failed += usize::from(failure.is_some());
            let outcome = failure.map_or_else(|| "ok".to_owned(), |text| format!("failed: {text}"));
            println!("{:30} {:32} {:12} {outcome}", op.name, op.shape, op.dtype);
        }
    }

    /// Prints the line of JSON. Whether all went well.
    pub fn finish(self, options: &Options) -> bool {
        if self.rows == 0 {
            println!("no op has a name that the filter asks for");
        }
        let passed = self.rows > 0 && self.failed == 0;
        let line = format!(
            "{{\"bench\":\"gpu\",\"emulated\":true,\"rows\":{},\"failed\":{},\"passed\":{passed}}}",
            self.rows, self.failed
        );
        say(options, &line) && passed
    }
}

/// Prints the line of JSON, and writes it where it is wanted. Whether that could be done.
fn say(options: &Options, line: &str) -> bool {
    println!("{line}");
    let Some(file) = &options.json else {
        return true;
    };
    let written = std::fs::write(file, format!("{line}\n"));
    if let Err(error) = &written {
        eprintln!("gpu: {}: {error}", file.display());
    }
    written.is_ok()
}

fn print_cells(
    [
        op,
        shape,
        dtype,
        ms,
        least,
        most,
        host,
        work,
        rate,
        share,
        note,
    ]: [&str; 11],
) {
    println!(
        "{op:30} {shape:32} {dtype:12} {ms:>9} {least:>9} {most:>9} {host:>8} {work:>12} \
         {rate:>14} {share:>5}  {note}"
    );
}

/// A text as JSON.
fn quoted(text: &str) -> String {
    let mut quoted = String::from('"');
    for character in text.chars() {
        match character {
            '"' | '\\' => quoted.extend(['\\', character]),
            control if control < ' ' => quoted += &format!("\\u{:04x}", u32::from(control)),
            other => quoted.push(other),
        }
    }
    quoted.push('"');
    quoted
}
