//! How far a run has come: all of its state that is not a tensor.

use oxitron_data::{Cursor, SkipRanges};

use super::RunError;
use crate::checkpoint::{ManifestMeta, ScheduleState, SkippedRange, StageMark};
use crate::config::GuardConfig;

/// How far a run has come.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Progress {
    /// Optimizer steps taken, skipped ones included.
    pub(super) step: u64,
    /// Positions trained on.
    pub(super) tokens: u64,
    /// Samples drawn, those left out included: the index of the next one.
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
    /// Samples that are left out because the run went back to before them.
    pub(super) left_out: SkipRanges,
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
            left_out: SkipRanges::default(),
        }
    }

    /// As a checkpoint recorded it.
    pub(super) fn from_manifest(
        run: &ManifestMeta,
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
            stage: run.stages_done(),
            step_in_stage: run.schedule.step_in_stage,
            adam_step: run.schedule.adam_step,
            cursor,
            last_stage: run.stage.clone(),
            skipped: run.skipped.clone(),
            left_out: SkipRanges::new(run.left_out.iter().map(|&[first, end]| first..end)),
        })
    }

    /// All samples that are left out: those and the configured ones.
    pub(super) fn left_out_with(&self, guard: &GuardConfig) -> SkipRanges {
        let configured = guard.skip_samples.iter().map(|&range| range.into());
        SkipRanges::new(self.left_out.ranges().iter().cloned().chain(configured))
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
        let left_out = self.left_out.ranges().iter();
        meta.left_out = left_out.map(|range| [range.start, range.end]).collect();
        meta.cursor = serde_json::to_value(&self.cursor).map_err(|source| RunError::Io {
            path: "manifest.json".into(),
            action: "describe the data cursor",
            source: source.into(),
        })?;
        Ok(())
    }
}
