//! What a person sees of a launch: rank 0's lines, and below them a bar.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::SystemTime;

use indicatif::{ProgressBar, ProgressStyle};
use oxitron_trainer::config::Config;
use oxitron_trainer::metrics::StepFollower;

use super::attempts::Watcher;
use super::explain::explain;
use crate::ranks::{Failure, Line, View};

/// Shows the run: rank 0's lines, and below them a bar when a person watches.
pub(super) struct Display {
    run_dir: PathBuf,
    bar: Option<ProgressBar>,
    follower: Option<StepFollower>,
}

impl Display {
    pub(super) fn new(config: &Config) -> Self {
        let mut follower = StepFollower::new(&config.run.dir);
        let bar = std::io::stderr().is_terminal().then(|| {
            let steps = config.stages.iter().map(|stage| stage.steps).sum();
            let bar = ProgressBar::new(steps);
            let template = "{prefix}[{bar:40}] step {pos}/{len}, {eta} left{msg}";
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
            run_dir: config.run.dir.clone(),
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

    pub(super) fn close(&self) {
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

impl Watcher for Display {
    fn failed(&mut self, failure: &Failure, begun: SystemTime) {
        self.aside(|| eprintln!("{}", explain(failure, &self.run_dir, begun)));
    }

    fn say(&mut self, words: &str) {
        self.aside(|| eprintln!("{words}"));
    }

    fn again(&mut self, attempt: u32) {
        match &self.bar {
            Some(bar) => {
                bar.set_prefix(format!("attempt {attempt} "));
                // The pause and the steps lost say nothing about the time of a step.
                bar.reset_eta();
            }
            None => eprintln!("attempt {attempt}"),
        }
    }
}
