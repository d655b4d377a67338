//! How far a run has come: what decides whether a restart was worth its while.

use std::path::{Path, PathBuf};

use oxitron_trainer::checkpoint::{Scrutiny, folder_name, newest_valid};
use oxitron_trainer::metrics::StepFollower;

use crate::ranks::Progress;

/// How far a run has come, over all attempts.
pub(super) struct Reach {
    checkpoints: PathBuf,
    /// Step of the checkpoint that the next attempt goes on from.
    newest: Option<u64>,
    /// The latest step that ever had a checkpoint.
    saved: Option<u64>,
    /// The latest step that was ever taken.
    stepped: u64,
    follower: StepFollower,
}

impl Reach {
    /// Looks at a run for the first time.
    pub(super) fn new(run_dir: &Path, checkpoints: &Path) -> Self {
        let mut reach = Self {
            checkpoints: checkpoints.to_owned(),
            newest: None,
            saved: None,
            stepped: 0,
            follower: StepFollower::new(run_dir),
        };
        reach.look();
        reach
    }

    /// What is new since the last look. What cannot be read is no progress; whoever trains will say
    /// what is wrong with it.
    pub(super) fn look(&mut self) -> Progress {
        let (saved, stepped) = (self.saved, self.stepped);
        if let Ok(newest) = newest_valid(&self.checkpoints, Scrutiny::Structure) {
            self.newest = newest.checkpoint.map(|checkpoint| checkpoint.meta().step);
            self.saved = self.saved.max(self.newest);
        }
        let records = self.follower.poll().unwrap_or_default();
        let latest = records.iter().map(|record| record.step).max();
        self.stepped = self.stepped.max(latest.unwrap_or(0));
        Progress {
            saved: self.saved > saved,
            stepped: self.stepped > stepped,
        }
    }

    /// Where the next attempt begins, in words.
    pub(super) fn from(&self) -> String {
        let from = self.newest.map(folder_name);
        from.unwrap_or_else(|| "the beginning".to_owned())
    }
}
