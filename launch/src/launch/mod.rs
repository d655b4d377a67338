//! `oxitron launch`: one command that trains on several ranks.
//!
//! It checks the config, starts `oxitron train` once per rank through [`ranks`](crate::ranks), shows
//! progress, explains a failure, and starts the ranks again where that is asked for ([`attempts`]).
//! Ranks write their own logs; rank 0 also speaks on standard output, which comes through here line
//! by line. The bar is drawn from the run's metrics.

mod attempts;
mod crew;
mod display;
mod explain;
mod reach;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use oxitron_trainer::config::{Config, ShardSize};
use oxitron_trainer::run::RunPlan;

use crate::exit::{STOPPED, USAGE};
use crate::ranks::{Ending, Hosts, How, Job, PROBE_LIMIT};
use attempts::Attempts;
use display::Display;

/// Trains on several ranks: starts `oxitron train` once per rank through Open MPI's mpirun.
///
/// The first Ctrl-C (or SIGTERM, or SIGUSR1) asks the ranks to save and stop, the second kills them.
#[derive(Debug, clap::Args)]
pub struct LaunchArgs {
    /// The config of the run (TOML)
    config: PathBuf,

    /// Number of ranks; may exceed the number of cores
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    ranks: u32,

    /// Host file of Open MPI, one `HOST slots=N` per line; without it all ranks run here
    #[arg(long, value_name = "FILE")]
    hosts: Option<PathBuf>,

    /// Start the ranks again after a failure, at most K times without a new checkpoint in between
    #[arg(long, value_name = "K", default_value_t = 0)]
    max_restarts: u32,

    /// When machines of the host file are gone, go on with fewer ranks, but at least M
    #[arg(
        long,
        value_name = "M",
        requires = "hosts",
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    min_ranks: Option<u32>,

    /// Override a config value, for instance `--set stage.0.steps=10`; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,

    /// Go on although the configuration differs from the run's in what changes the result
    #[arg(long)]
    allow_config_change: bool,

    /// Go on although the token data differ from those that the run was trained on
    #[arg(long)]
    allow_data_change: bool,

    /// Resume without reading the checkpoint over first to compare all checksums
    #[arg(long)]
    no_verify: bool,
}

/// Runs the command to its exit code.
///
/// # Errors
/// The ranks cannot be started on this machine. A config or host file that is refused, and ranks
/// that die, are reported here and answered by an exit code.
pub fn run(args: &LaunchArgs) -> Result<ExitCode> {
    let (job, config) = match prepare(args) {
        Ok(prepared) => prepared,
        Err(error) => {
            eprintln!("oxitron: {error:#}");
            return Ok(ExitCode::from(USAGE));
        }
    };
    let accepts = |ranks: usize, hosts: &Hosts| accepts(&config, ranks, hosts);
    let attempts = Attempts {
        job,
        max_restarts: args.max_restarts,
        min_ranks: args.min_ranks.map(|ranks| ranks as usize),
        run_dir: &config.run.dir,
        checkpoints: &config.checkpoint.dir,
        accepts: &accepts,
        probe_limit: PROBE_LIMIT,
    };
    let mut display = Display::new(&config);
    let ending = attempts.run(&mut display)?;
    display.close();
    Ok(match ending {
        Ending::Done => ExitCode::SUCCESS,
        Ending::Stopped => {
            eprintln!("stopped on request after a complete save; the same command continues");
            ExitCode::from(STOPPED)
        }
        Ending::Killed => {
            eprintln!("killed on request; what came after the last checkpoint is lost");
            ExitCode::FAILURE
        }
        // It has been reported when it happened.
        Ending::Failed(failure) => match failure.how {
            How::Exit(code) if code == i32::from(USAGE) => ExitCode::from(USAGE),
            _ => ExitCode::FAILURE,
        },
    })
}

/// Checks everything that can be checked before a rank starts.
fn prepare(args: &LaunchArgs) -> Result<(Job, Config)> {
    if !cfg!(feature = "mpi") {
        anyhow::bail!(
            "this program was built without the cargo feature `mpi` and trains on one rank only: \
             `oxitron train {}`",
            args.config.display()
        );
    }
    let config = Config::load(&args.config, &args.sets)?;
    let hosts = args.hosts.as_deref().map(Hosts::read).transpose()?;
    let ranks = args.ranks as usize;
    match args.min_ranks {
        Some(min) if min > args.ranks => {
            anyhow::bail!(
                "--min-ranks {min} is more than --ranks {ranks}; it says how few ranks a restart may \
                 go on with"
            )
        }
        Some(_) if args.max_restarts == 0 => {
            anyhow::bail!("--min-ranks says what a restart may do; add --max-restarts K")
        }
        _ => {}
    }
    let per_node = hosts.as_ref().map_or(ranks, |hosts| hosts.busiest(ranks));
    RunPlan::new(&config, ranks, per_node)?;
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let path = args
        .config
        .canonicalize()
        .context("cannot resolve the path of the config")?;
    let mut arguments = vec!["train".into(), path.into_os_string()];
    for set in &args.sets {
        arguments.extend(["--set".into(), set.into()]);
    }
    let flags = [
        ("--allow-config-change", args.allow_config_change),
        ("--allow-data-change", args.allow_data_change),
        ("--no-verify", args.no_verify),
    ];
    let given = flags.into_iter().filter(|(_, given)| *given);
    arguments.extend(given.map(|(flag, _)| flag.into()));
    let threads = config.run.threads;
    Ok((
        Job {
            program,
            arguments,
            ranks,
            hosts,
            threads,
        },
        config,
    ))
}

/// Whether the config can run on this many ranks, on these machines.
fn accepts(config: &Config, ranks: usize, hosts: &Hosts) -> bool {
    // Shard groups by node need nodes that are alike.
    let by_node = config.parallel.shard_size == ShardSize::Node;
    (!by_node || hosts.even(ranks)) && RunPlan::new(config, ranks, hosts.busiest(ranks)).is_ok()
}
