//! The `oxitron` command.

mod report;

use std::process::ExitCode;

use clap::Parser;

#[derive(Parser)]
#[command(name = "oxitron", version, about)]
enum Command {
    Report(report::Args),
}

fn main() -> ExitCode {
    let Command::Report(args) = Command::parse();
    match report::run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
