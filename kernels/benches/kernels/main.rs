//! Every kernel beside the rate that this machine could reach.
//!
//! `cargo bench --profile release --workspace --bench kernels -- [--threads N] [--ops NAME[,NAME]…]
//! [--quick]` prints a row per op, shape and dtype and ends with one line of JSON. (The whole
//! workspace, because a single package would choose other features of its dependencies and compile
//! them again.) `make bench` runs it and keeps the figures.
//!
//! * [`floors`] measures what an op is held against: the rate of the micro-kernels on operands that
//!   stay in L1, and the rates at which memory is read and written.
//! * [`ops`] has one small function per op, with its shapes and its work.
//! * [`report`] takes the time of both in turns and prints the rows.

mod floors;
mod ops;
mod report;

use std::process::ExitCode;

use oxitron_kernels::{Error, Threads, simd};

use floors::Floors;
use report::{Bench, Options};

fn main() -> ExitCode {
    let outcome = Options::parse(std::env::args().skip(1)).map(run);
    match outcome {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
        Err(message) => {
            eprintln!("{message}");
            ExitCode::from(2)
        }
    }
}

fn run(options: Options) -> Result<(), Error> {
    let threads = match options.threads {
        Some(count) => Threads::set(count)?,
        None => Threads::current(),
    };
    println!("{} threads, {}", threads.count(), simd::level().name());
    let mut bench = Bench::new(options, Floors::new(threads.count()));
    ops::measure_all(&mut bench)?;
    bench.finish();
    Ok(())
}
