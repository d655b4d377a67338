//! The `oxitron` command: reads the command line and hands over to one file per command.
//!
//! Exit codes: 0 done; 2 a command line or configuration that is refused before any data is
//! opened; 75 stopped on request after a complete save, start again to go on; 1 everything else.
//! `main` returns the code. Where it cannot, because a thread is stuck, the watchdog ends a rank
//! that is lost, and a second signal ends any command at once.

mod convert;
mod data;
mod doctor;
mod exit;
mod generate;
mod inspect;
mod launch;
mod plan;
mod progress;
mod ranks;
mod report;
mod train;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Pre-trains language models on many nodes, fine-tunes them on one device, and converts them to
/// and from the Hugging Face format.
#[derive(Debug, Parser)]
#[command(name = "oxitron", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Train(train::TrainArgs),
    Launch(launch::LaunchArgs),
    /// Make token shards from text, and look at them
    #[command(subcommand)]
    Data(data::DataCommand),
    Plan(plan::PlanArgs),
    Convert(convert::Args),
    Inspect(inspect::Args),
    Generate(generate::GenerateArgs),
    Report(report::Args),
    Doctor(doctor::DoctorArgs),
}

fn main() -> ExitCode {
    let done = |()| ExitCode::SUCCESS;
    let result = match Cli::parse().command {
        Command::Train(args) => train::run(&args),
        Command::Launch(args) => launch::run(&args),
        Command::Data(command) => data::run(command).map(done),
        Command::Plan(args) => plan::run(&args).map(done),
        Command::Convert(args) => convert::run(args).map(done),
        Command::Inspect(args) => inspect::run(args).map(done),
        Command::Generate(args) => generate::run(&args).map(done),
        Command::Report(args) => report::run(&args).map(done),
        Command::Doctor(args) => doctor::run(&args),
    };
    result.unwrap_or_else(|error| {
        eprintln!("oxitron: {}", exit::describe(&error));
        exit::code_of(&error)
    })
}
