//! Every op beside what one GPU gives: the rates at which it copies memory and multiplies.
//!
//! `cargo bench --profile release --workspace --features oxitron-kernels/emulator --bench gpu --
//! [--filter NAME[,NAME]…] [--quick] [--json FILE]` prints a row per op, shape and dtype for the
//! sizes of two models and ends with one line of JSON. An op that memory limits has to reach 80% of
//! the rate of a copy. The exit code is 1 where one does not or an op fails, and 2 without a GPU.
//!
//! `--emulated` calls every op on small tensors of the CPU, down the path that a GPU takes, and
//! says nothing about time: it shows that the calls are right before a GPU is at hand.
//!
//! * [`ops`] has the sizes of the models and one small function per op, with its shapes and work.
//! * [`floors`] has what ops are held against: libtorch's copy and its products.
//! * [`place`] makes their operands, in several sets where one could stay in a cache.
//! * [`timing`] takes the time of calls between two marks in the stream.
//! * [`suite`] times the ops of a part and the floors in turns, round by round, so that a GPU that
//!   slows down slows all of them down; [`report`] prints what it found.

mod floors;
mod ops;
mod options;
mod place;
mod report;
mod suite;
mod timing;

use std::process::ExitCode;

use oxitron_kernels::Error;
use oxitron_kernels::cuda::{self, DeviceInfo, DeviceMemory, Numerics, Piece, Stream};
use tch::Device;

use floors::Copy;
use ops::{Model, Part};
use options::{Options, Request, USAGE};
use place::Place;
use report::{Outcomes, Report};
use suite::Suite;
use timing::Clock;

/// Several times the caches of any GPU, and far from its memory.
const ROTATED_BYTES: f64 = 1e9;

/// Bytes of what is copied to measure copies.
const COPIED_BYTES: i64 = 2 << 30;

fn main() -> ExitCode {
    let request = Options::parse(std::env::args().skip(1));
    let options = match request {
        Ok(Request::Help) => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Ok(Request::Run(options)) => options,
        Err(message) => {
            eprintln!("{message}");
            return ExitCode::from(2);
        }
    };
    let outcome = if options.emulated {
        cuda::emulated(|| try_all(&options))
    } else {
        match first_gpu() {
            Ok(gpu) => run(&options, &gpu),
            Err(missing) => {
                eprintln!("gpu: {missing}");
                return ExitCode::from(2);
            }
        }
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("gpu: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The GPU to measure, or what is missing.
fn first_gpu() -> Result<DeviceInfo, String> {
    let said = |error: Error| error.to_string();
    let mut gpus = cuda::devices().map_err(said)?;
    for (piece, found) in cuda::pieces() {
        if matches!(piece, Piece::Torch | Piece::Nvrtc)
            && let Err(missing) = found
        {
            return Err(missing.clone());
        }
    }
    if gpus.is_empty() {
        return Err("the driver shows this process no GPU (see CUDA_VISIBLE_DEVICES)".to_owned());
    }
    // The driver has one; libtorch must see it, too.
    Stream::current(0).map_err(said)?;
    Ok(gpus.swap_remove(0))
}

/// Measures everything. Whether every op ran, and every bar was reached.
fn run(options: &Options, gpu: &DeviceInfo) -> Result<bool, Error> {
    tch::manual_seed(20_261);
    // Sums of products in fp32, as in training.
    Numerics::default().set()?;
    let place = Place::new(Device::Cuda(0), ROTATED_BYTES);
    let copy = Copy::new(place, COPIED_BYTES)?;
    let mut clock = Clock::new(&copy)?;
    let mut report = Report::new(options, gpu);
    for model in Model::MEASURED {
        for part in Part::ALL {
            DeviceMemory::reset_peak(0)?;
            let Some(mut suite) = assembled(options, part, model, place, &copy)? else {
                continue;
            };
            suite.measure(&mut clock, options);
            let peak_bytes = DeviceMemory::read(0)?.allocated_peak;
            report.add(part, model, &suite, peak_bytes);
            drop(suite);
            DeviceMemory::release()?;
        }
    }
    Ok(report.finish())
}

/// Calls everything on small tensors of the CPU. Whether all of it went well.
fn try_all(options: &Options) -> Result<bool, Error> {
    tch::manual_seed(20_261);
    // So many that tensors of the CPU take turns, too.
    let place = Place::new(Device::Cpu, 1e5);
    let copy = Copy::new(place, 1 << 16)?;
    let mut outcomes = Outcomes::default();
    for part in Part::ALL {
        if let Some(mut suite) = assembled(options, part, Model::TINY, place, &copy)? {
            suite.call_each();
            outcomes.add(&suite);
        }
    }
    Ok(outcomes.finish(options))
}

/// Floors and ops, ready to be called; nothing where no op of the part is wanted.
fn assembled(
    options: &Options,
    part: Part,
    model: Model,
    place: Place,
    copy: &Copy,
) -> Result<Option<Suite>, Error> {
    let mut suite = Suite::new(options.filter.clone());
    floors::add_all(&mut suite, model, place, copy);
    ops::add_all(&mut suite, part, model, place)?;
    let has_ops = suite.rows.iter().any(|row| !row.is_floor);
    Ok(has_ops.then_some(suite))
}
