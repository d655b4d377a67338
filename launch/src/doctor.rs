//! `oxitron doctor`: what this machine offers to a run, and what is missing for GPUs.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, ValueEnum};
use oxitron_trainer::machine::{Fact, Machine};

/// Say what this machine offers to a run, and what is missing for GPUs
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Fail (exit code 1) unless runs can compute on this device
    #[arg(long, value_enum, default_value_t = Device::Cpu)]
    device: Device,
}

/// Where a run is to compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Device {
    /// The processor
    Cpu,
    /// NVIDIA GPUs
    Cuda,
}

/// Runs the command.
pub fn run(args: &DoctorArgs) -> Result<ExitCode> {
    let machine = Machine::examine();
    println!("oxitron {}", env!("CARGO_PKG_VERSION"));
    let facts = || machine.general.iter().chain(&machine.gpu);
    let width = facts().map(|fact| fact.name.len()).max().unwrap_or(0);
    for Fact { name, found } in facts() {
        match found {
            Ok(found) => println!("  ok       {name:width$}  {found}"),
            Err(missing) => {
                // What is missing is named already.
                let problem = missing.split_once(" is missing: ");
                let problem = problem.map_or(missing.as_str(), |(_, problem)| problem);
                println!("  missing  {name:width$}  {problem}");
            }
        }
    }
    match machine.why_no_gpu() {
        None => println!("Runs can compute on the processor and on GPUs."),
        Some(_) => println!("Runs can compute on the processor. For GPUs, see what is missing."),
    }
    let wanted = args.device == Device::Cpu || machine.why_no_gpu().is_none();
    Ok(if wanted {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
