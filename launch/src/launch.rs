//! `oxitron launch`: one command that trains on several ranks.
//!
//! It checks the config, starts `oxitron train` once per rank through [`ranks`](crate::ranks), shows
//! progress, and explains a failure. Ranks write their own logs; rank 0 also speaks on standard
//! output, which comes through here line by line. The bar is drawn from the run's metrics.

use std::fs::File;
use std::io::{IsTerminal, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::SystemTime;

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use oxitron_trainer::config::Config;
use oxitron_trainer::metrics::StepFollower;
use oxitron_trainer::metrics::logging::log_file;

use crate::exit::{STOPPED, USAGE};
use crate::ranks::{Ending, Failure, Hosts, How, Job, Line, View, supervise};

/// Lines of a rank's log that a failure report shows, and the bytes at its end they are taken from.
const REPORTED_LINES: usize = 15;
const REPORTED_BYTES: u64 = 16 << 10;

/// Trains on several ranks: starts `oxitron train` once per rank through Open MPI's mpirun.
///
/// The first Ctrl-C (or SIGTERM) asks the ranks to save and stop, the second kills them.
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

    /// Override a config value, for instance `--set stage.0.steps=10`; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,

    /// Go on although the configuration differs from the run's in what changes the result
    #[arg(long)]
    allow_config_change: bool,
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
    let begun = SystemTime::now();
    let mut display = Display::new(&config);
    let ending = supervise(&job, &mut display)?;
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
        Ending::Failed(failure) => {
            eprintln!("{}", explain(&failure, &config.run.dir, begun));
            match failure.how {
                How::Exit(code) if code == i32::from(USAGE) => ExitCode::from(USAGE),
                _ => ExitCode::FAILURE,
            }
        }
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
    let per_node = hosts.as_ref().map_or(ranks, |hosts| hosts.busiest(ranks));
    oxitron_trainer::run::RunPlan::new(&config, ranks, per_node)?;
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let path = args
        .config
        .canonicalize()
        .context("cannot resolve the path of the config")?;
    let mut arguments = vec!["train".into(), path.into_os_string()];
    for set in &args.sets {
        arguments.extend(["--set".into(), set.into()]);
    }
    if args.allow_config_change {
        arguments.push("--allow-config-change".into());
    }
    let threads = config.run.threads;
    Ok((
        Job {
            program,
            arguments,
            ranks: args.ranks as usize,
            hosts,
            threads,
        },
        config,
    ))
}

/// Shows the run: rank 0's lines, and below them a bar when a person watches.
struct Display {
    bar: Option<ProgressBar>,
    follower: Option<StepFollower>,
}

impl Display {
    fn new(config: &Config) -> Self {
        let mut follower = StepFollower::new(&config.run.dir);
        let bar = std::io::stderr().is_terminal().then(|| {
            let steps = config.stages.iter().map(|stage| stage.steps).sum();
            let bar = ProgressBar::new(steps);
            let template = "[{bar:40}] step {pos}/{len}, {eta} left{msg}";
            // The template is a constant; if it were wrong, the plain bar would do.
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style.progress_chars("=> "));
            }
            bar
        });
        // Steps of earlier attempts are no progress of this one.
        let earlier = follower
            .poll()
            .ok()
            .and_then(|records| Some(records.last()?.step));
        if let (Some(bar), Some(step)) = (&bar, earlier) {
            bar.set_position(step);
            bar.reset_eta();
        }
        Self {
            bar,
            follower: Some(follower),
        }
    }

    /// Runs `print` where it does not tear the bar.
    fn aside(&self, print: impl FnOnce()) {
        match &self.bar {
            Some(bar) => bar.suspend(print),
            None => print(),
        }
    }

    fn close(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

impl View for Display {
    fn line(&mut self, line: &Line) {
        self.aside(|| match line {
            Line {
                rank: Some(0),
                error: false,
                text,
            } => println!("{text}"),
            Line {
                rank: Some(rank),
                text,
                ..
            } => eprintln!("rank {rank}: {text}"),
            Line {
                rank: None, text, ..
            } => eprintln!("{text}"),
        });
    }

    fn tick(&mut self) {
        let (Some(bar), Some(follower)) = (&self.bar, &mut self.follower) else {
            return;
        };
        match follower.poll() {
            Ok(records) => {
                if let Some(record) = records.last() {
                    bar.set_position(record.step);
                    bar.set_message(format!(", {}, loss {:.4}", record.stage, record.loss));
                }
            }
            Err(error) => {
                bar.suspend(|| eprintln!("warning: no more progress is shown: {error}"));
                self.follower = None;
            }
        }
    }

    fn stopping(&mut self) {
        self.aside(|| eprintln!("asked the ranks to save and stop; once more kills them"));
    }
}

/// The report of a failure: who, how, and the last lines of the log and of standard error.
fn explain(failure: &Failure, run_dir: &Path, begun: SystemTime) -> String {
    let mut report = match failure.rank {
        Some(rank) => format!(
            "error: rank {rank} {}; the other ranks were ended",
            failure.how
        ),
        None => format!("error: a rank {}; mpirun did not say which", failure.how),
    };
    let mut section = |title: String, lines: &[String]| {
        if !lines.is_empty() {
            report.push_str(&format!("\n{title}\n  {}", lines.join("\n  ")));
        }
    };
    if let Some(rank) = failure.rank {
        let log = run_dir.join(log_file(rank));
        section(
            format!("its last log lines ({}):", log.display()),
            &last_lines(&log, begun),
        );
        section(
            "its last lines on standard error:".to_owned(),
            &failure.words,
        );
    } else {
        section(
            "the last lines of mpirun and of the ranks:".to_owned(),
            &failure.words,
        );
        let logs = run_dir.join(log_file(0)).with_file_name("");
        section(
            "the logs of all ranks lie in".to_owned(),
            &[logs.display().to_string()],
        );
    }
    report
}

/// The last lines of a log that was written to since `begun`; an older one says nothing about this
/// failure.
fn last_lines(log: &Path, begun: SystemTime) -> Vec<String> {
    let read = || -> std::io::Result<Vec<String>> {
        let mut file = File::open(log)?;
        let metadata = file.metadata()?;
        if metadata.modified()? < begun {
            return Ok(Vec::new());
        }
        let start = metadata.len().saturating_sub(REPORTED_BYTES);
        file.seek(SeekFrom::Start(start))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        let text = String::from_utf8_lossy(&bytes);
        // The first line may have been cut by the seek.
        let lines: Vec<&str> = text.lines().skip(usize::from(start > 0)).collect();
        let shown = lines.len().saturating_sub(REPORTED_LINES);
        Ok(lines[shown..]
            .iter()
            .map(|line| (*line).to_owned())
            .collect())
    };
    // A log that cannot be read is no reason to hide the failure itself.
    read().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::time::Duration;

    use super::*;

    #[test]
    fn a_failure_shows_the_end_of_the_log_of_the_rank_that_died() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join(log_file(1));
        std::fs::create_dir_all(log.parent().unwrap()).unwrap();
        let lines: String = (0..2000)
            .map(|line| format!("step {line} of many\n"))
            .collect();
        std::fs::write(&log, lines).unwrap();
        let words = vec!["thread panicked".to_owned()];
        let failure = Failure {
            rank: Some(1),
            how: How::Exit(101),
            words,
        };
        let before = SystemTime::now() - Duration::from_secs(5);
        let report = explain(&failure, folder.path(), before);
        assert!(
            report.starts_with("error: rank 1 exited with code 101;"),
            "{report}"
        );
        assert!(report.contains("rank-0001.log") && report.contains("\n  step 1999 of many\n"));
        assert!(report.contains("\n  step 1985 of many\n") && !report.contains("step 1984"));
        assert!(
            report.ends_with("standard error:\n  thread panicked"),
            "{report}"
        );
        // The log of an earlier attempt is left out.
        let later = SystemTime::now() + Duration::from_secs(5);
        assert!(!explain(&failure, folder.path(), later).contains("step"));
    }
}
