//! How far a run has come: all of its state that is not a tensor.

use oxitron_data::Cursor;

use super::RunError;
use crate::checkpoint::{ManifestMeta, ScheduleState, SkippedRange, StageMark};

/// How far a run has come.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Progress {
    /// Optimizer steps taken, skipped ones included.
    pub(super) step: u64,
    /// Positions trained on.
    pub(super) tokens: u64,
    /// Samples trained on.
    pub(super) samples: u64,
    /// Index of the stage that the next step belongs to; the number of stages at the end.
    pub(super) stage: usize,
    /// Steps taken in that stage.
    pub(super) step_in_stage: u64,
    /// Updates applied since the moments were last zero.
    pub(super) adam_step: u64,
    /// Where the data goes on.
    pub(super) cursor: Cursor,
    /// The stage of the last step.
    pub(super) last_stage: Option<StageMark>,
    /// Samples whose step was skipped.
    pub(super) skipped: Vec<SkippedRange>,
}

impl Progress {
    /// Before the first step.
    pub(super) fn start(cursor: Cursor) -> Self {
        Self {
            step: 0,
            tokens: 0,
            samples: 0,
            stage: 0,
            step_in_stage: 0,
            adam_step: 0,
            cursor,
            last_stage: None,
            skipped: Vec::new(),
        }
    }

    /// As a checkpoint of a run of `stages` stages recorded it.
    pub(super) fn from_manifest(
        run: &ManifestMeta,
        stages: usize,
        path: &std::path::Path,
    ) -> Result<Self, RunError> {
        let cursor = serde_json::from_value(run.cursor.clone()).map_err(|source| RunError::Io {
            path: path.to_owned(),
            action: "read the data cursor of the checkpoint",
            source: source.into(),
        })?;
        Ok(Self {
            step: run.step,
            tokens: run.tokens,
            samples: run.samples,
            stage: run.next_stage.unwrap_or(stages),
            step_in_stage: run.schedule.step_in_stage,
            adam_step: run.schedule.adam_step,
            cursor,
            last_stage: run.stage.clone(),
            skipped: run.skipped.clone(),
        })
    }

    /// Writes itself into `meta`.
    pub(super) fn record(&self, stages: usize, meta: &mut ManifestMeta) -> Result<(), RunError> {
        meta.step = self.step;
        meta.tokens = self.tokens;
        meta.samples = self.samples;
        meta.stage = self.last_stage.clone();
        meta.next_stage = (self.stage < stages).then_some(self.stage);
        meta.schedule = ScheduleState {
            step_in_stage: self.step_in_stage,
            adam_step: self.adam_step,
        };
        meta.skipped = self.skipped.clone();
        meta.cursor = serde_json::to_value(&self.cursor).map_err(|source| RunError::Io {
            path: "manifest.json".into(),
            action: "describe the data cursor",
            source: source.into(),
        })?;
        Ok(())
    }
}
