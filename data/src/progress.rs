//! Progress of long jobs: a bar on a terminal, plain lines otherwise.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Time between two plain lines.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Progress of one job, in bytes. Shared by the job's threads.
#[derive(Debug)]
pub struct Progress {
    label: String,
    bar: ProgressBar,
    started: Instant,
    last_line: Option<Mutex<Instant>>,
}

impl Progress {
    /// Begins a job of `total_bytes` and announces it as `label`.
    pub fn new(label: &str, total_bytes: u64) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = ProgressBar::with_draw_target(
            Some(total_bytes),
            if terminal {
                ProgressDrawTarget::stderr()
            } else {
                ProgressDrawTarget::hidden()
            },
        );
        if let Ok(style) = ProgressStyle::with_template(
            "{msg} [{wide_bar}] {bytes}/{total_bytes} {bytes_per_sec} ETA {eta}",
        ) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_message(label.to_string());
        if !terminal {
            eprintln!("{label}: {:.1} MB to do", total_bytes as f64 / 1e6);
        }
        let last_line = (!terminal).then(|| Mutex::new(Instant::now()));
        Self {
            label: label.to_string(),
            bar,
            started: Instant::now(),
            last_line,
        }
    }

    /// A job nobody watches (tests, libraries).
    pub fn silent() -> Self {
        Self {
            label: String::new(),
            bar: ProgressBar::hidden(),
            started: Instant::now(),
            last_line: None,
        }
    }

    /// `bytes` more are done.
    pub fn add(&self, bytes: u64) {
        self.bar.inc(bytes);
        let Some(last) = &self.last_line else { return };
        let Ok(mut last) = last.lock() else { return };
        if last.elapsed() >= LINE_EVERY {
            *last = Instant::now();
            let (done, total) = (self.bar.position(), self.bar.length().unwrap_or(0));
            let rate = done as f64 / self.seconds().max(1e-9);
            eprintln!(
                "{}: {:.1} of {:.1} MB ({:.0}%), {:.1} MB/s, {:.0} s left",
                self.label,
                done as f64 / 1e6,
                total as f64 / 1e6,
                100.0 * done as f64 / total.max(1) as f64,
                rate / 1e6,
                total.saturating_sub(done) as f64 / rate.max(1.0),
            );
        }
    }

    /// Replaces the words before the bar; on no terminal, prints them.
    pub fn phase(&self, words: &str) {
        self.bar.set_message(words.to_string());
        if self.last_line.is_some() {
            eprintln!("{words}");
        }
    }

    /// Seconds since the job began.
    pub fn seconds(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    /// Takes the bar away; the caller prints the closing line.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_without_a_terminal() {
        let progress = Progress::silent();
        progress.add(3);
        progress.add(4);
        assert_eq!(progress.bar.position(), 7);
        progress.finish();
    }
}
