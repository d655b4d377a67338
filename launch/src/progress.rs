//! Progress of a long job: a bar with the time left on a terminal, a plain line now and then
//! elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// How often a plain line is printed.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// What one step of a job's progress is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Bytes, shown as MiB and GiB.
    Bytes,
    /// Model weights, shown as they are.
    Weights,
}

/// Progress of one job, on standard error.
pub struct Progress {
    label: &'static str,
    bar: Option<ProgressBar>,
    last_line: Instant,
}

impl Progress {
    /// Starts to show a job. `label` says what is being done, as "verify".
    pub fn new(label: &'static str, unit: Unit) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let template = match unit {
                Unit::Bytes => "{msg} [{bar:40}] {bytes}/{total_bytes} {bytes_per_sec}, {eta} left",
                Unit::Weights => "{msg} [{bar:40}] {human_pos}/{human_len} weights, {eta} left",
            };
            let bar = ProgressBar::new(0).with_message(label);
            // The template is a constant; if it were wrong, the plain bar would do.
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style.progress_chars("=> "));
            }
            bar
        });
        Self {
            label,
            bar,
            last_line: Instant::now(),
        }
    }

    /// Shows that `done` of `total` units are done.
    pub fn update(&mut self, done: u64, total: u64) {
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
            if done == total {
                bar.finish_and_clear();
            }
        } else if self.last_line.elapsed() >= LINE_EVERY && total > 0 {
            self.last_line = Instant::now();
            eprintln!("{}: {:.0}%", self.label, 100.0 * done as f64 / total as f64);
        }
    }
}
