//! `oxitron report RUN_DIR`: what a run did, on the terminal and as a page.
//!
//! The terminal gets the stage table. `RUN_DIR/report.html` gets the same table under the curves
//! (loss, validation loss, learning rate, tokens per second, gradient norm), every event and the
//! resolved config. The page is one file that asks nobody for anything: it can be mailed, kept
//! beside a paper, or opened on a machine without a network.
//!
//! The curves are SVG paths written here, in [`chart`], and not by a plotting crate. Such a crate
//! computes text positions and colours for one size and one theme; here the paths stretch with
//! their box while labels are HTML, so that type keeps its size from a phone to a wide screen, and
//! colours are CSS variables that follow the reader's light or dark scheme. What is left to write
//! by hand, ticks and path strings, is less than the glue a crate would need.
//!
//! Names, paths, reasons and config are text that others wrote: all of it goes through
//! [`html::escape`], and a content security policy forbids the page to load anything.

mod chart;
mod curve;
mod events;
mod figures;
mod html;
mod page;
mod scale;
#[cfg(test)]
mod tests;

use std::fs::Permissions;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use oxitron_trainer::metrics::{History, stage_summaries, stage_table};

/// Name of the page inside the run directory.
const REPORT_FILE: &str = "report.html";

/// Prints the table of a run's stages and writes its curves to RUN_DIR/report.html.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The run directory: the folder that holds metrics.jsonl
    run_dir: PathBuf,
}

/// Runs the command.
///
/// # Errors
/// A folder that is no run directory, a run without a single step, damaged lines, a page that
/// cannot be written.
pub fn run(args: &Args) -> Result<()> {
    report(
        &args.run_dir,
        &mut io::stdout().lock(),
        &mut io::stderr().lock(),
    )
}

fn report(run_dir: &Path, out: &mut impl Write, warnings: &mut impl Write) -> Result<()> {
    let history = History::read(run_dir)?;
    for warning in &history.warnings {
        writeln!(warnings, "warning: {warning}")?;
    }
    if history.steps.is_empty() {
        bail!(
            "{}: the run has not finished a step yet, so there is nothing to report; \
             try again once its log shows `step 1`",
            run_dir.display()
        );
    }
    let config = match std::fs::read(run_dir.join("config.toml")) {
        Ok(bytes) => Some(String::from_utf8_lossy(&bytes).into_owned()),
        Err(error) => {
            writeln!(
                warnings,
                "warning: the report shows no config: config.toml: {error}"
            )?;
            None
        }
    };
    let stages = stage_summaries(&history);
    let page = page::page(&run_name(run_dir), &history, &stages, config.as_deref());
    let path = run_dir.join(REPORT_FILE);
    write_whole(&path, page.as_bytes())
        .with_context(|| format!("{}: cannot write the report", path.display()))?;
    writeln!(
        out,
        "{}\n\ncurves: {}",
        stage_table(&stages),
        path.display()
    )?;
    Ok(())
}

/// The last part of the path, also for `.` and `runs/demo/`.
fn run_name(run_dir: &Path) -> String {
    let whole = run_dir
        .canonicalize()
        .unwrap_or_else(|_| run_dir.to_owned());
    whole
        .file_name()
        .unwrap_or(whole.as_os_str())
        .to_string_lossy()
        .into_owned()
}

/// Writes a file so that its name never stands for half of it.
fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    // A temporary file is private by default; a report is made to be shown (within the umask).
    let mut file = tempfile::Builder::new()
        .prefix(".report-")
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(folder)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    Ok(())
}
