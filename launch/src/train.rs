//! `oxitron train`: this process is one rank of a run.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result};
use oxitron_trainer::comm::Comm;
use oxitron_trainer::config::Config;
use oxitron_trainer::faults;
use oxitron_trainer::metrics::logging;
use oxitron_trainer::run::{self, Options, Outcome, Watch};
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};

use crate::exit;

/// Train a model in this process: alone, or as one rank under mpirun or srun
///
/// On a run directory that already holds a checkpoint, training goes on from the newest valid one.
/// SIGTERM, SIGINT and SIGUSR1 end the run after the step under way, with a checkpoint and exit
/// code 75; a second one of these signals ends the process at once.
#[derive(Debug, clap::Args)]
pub struct TrainArgs {
    /// Configuration (TOML)
    pub config: PathBuf,
    /// Override one key, for example `--set stage.0.steps=100`; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub sets: Vec<String>,
    /// Go on although the configuration differs from the run's in what changes the result
    #[arg(long)]
    pub allow_config_change: bool,
    /// Go on although the token data differ from those that the run was trained on
    #[arg(long)]
    pub allow_data_change: bool,
    /// Resume without reading the checkpoint over first to compare all checksums
    #[arg(long)]
    pub no_verify: bool,
}

/// Runs the command.
///
/// # Errors
/// A refused configuration, and whatever keeps the run from starting or going on.
pub fn run(args: &TrainArgs) -> Result<ExitCode> {
    faults::setup()?;
    let config = Config::load(&args.config, &args.sets)?;
    // Before MPI, which takes its time to start: until then a signal kills.
    let stop = stop_on_signals().context("cannot install signal handlers")?;
    let comm = Comm::from_environment()?;
    let log = logging::init_rank(&config.run.dir, comm.rank());
    let options = Options {
        allow_config_change: args.allow_config_change,
        allow_data_change: args.allow_data_change,
        no_verify: args.no_verify,
        stop,
    };
    let mut watch = None;
    let outcome = log.map_err(anyhow::Error::from).and_then(|()| {
        let stop = Arc::clone(&options.stop);
        let watch = watch.insert(Watch::new(&config, &comm, Arc::new(end_process), stop)?);
        Ok(run::train(&config, &comm, watch, &options)?)
    });
    let left = match &outcome {
        Ok(Outcome::Finished | Outcome::Stopped) => comm.finish(),
        Ok(Outcome::Abandoned) => {
            comm.desert();
            Ok(())
        }
        Err(error) => {
            tracing::error!("{error}");
            // Leaves the other ranks, or brings them down when they do not leave as well: they
            // must not wait for this one for ever.
            drop(comm);
            Ok(())
        }
    };
    if let Some(watch) = watch {
        watch.leave();
    }
    let outcome = outcome?;
    left?;
    Ok(match outcome {
        Outcome::Finished => ExitCode::SUCCESS,
        Outcome::Stopped => ExitCode::from(exit::STOPPED),
        // The communication thread polls MPI to the last moment; what runs at an ordinary exit
        // would take MPI and torch away under it.
        Outcome::Abandoned => signal_hook::low_level::exit(exit::STOPPED.into()),
    })
}

/// Ends this process although some of its threads are stuck.
fn end_process(verdict: &str) {
    tracing::error!("the run is lost: {verdict}");
    // What runs at an ordinary exit may wait for a thread that is stuck.
    signal_hook::low_level::exit(1);
}

/// A flag that the first stop signal sets; the second ends the process.
fn stop_on_signals() -> std::io::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    // Others set `stop` as well. A scheduler signals all ranks, and a signal that comes after the
    // request of another rank is still the first one here.
    let signalled = Arc::new(AtomicBool::new(false));
    for signal in [SIGTERM, SIGINT, SIGUSR1] {
        // In this order: the handler that ends the process sees the flag of an earlier signal.
        signal_hook::flag::register_conditional_shutdown(signal, 1, Arc::clone(&signalled))?;
        signal_hook::flag::register(signal, Arc::clone(&signalled))?;
        signal_hook::flag::register(signal, Arc::clone(&stop))?;
    }
    Ok(stop)
}
