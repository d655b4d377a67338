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
    /// Steps taken in that stage.
    pub(super) steps_of_last_stage: u64,
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
            steps_of_last_stage: 0,
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
            steps_of_last_stage: run.schedule.steps_of_last_stage,
            skipped: run.skipped.clone(),
            left_out: SkipRanges::new(run.left_out.iter().map(|&[first, end]| first..end)),
        })
    }

    /// Under stages of so many `steps`, which may differ from those of the checkpoint: the last stage
    /// goes on if it has become longer and nothing came after it, and is done if it has become
    /// shorter.
    pub(super) fn fitted(mut self, steps: &[u64]) -> Self {
        if let Some(last) = &self.last_stage
            && (self.stage, self.step_in_stage) == (last.index + 1, 0)
            && let Some(&longer) = steps.get(last.index)
            && (1..longer).contains(&self.steps_of_last_stage)
        {
            self.stage = last.index;
            self.step_in_stage = self.steps_of_last_stage;
        }
        if let Some(&shorter) = steps.get(self.stage)
            && self.step_in_stage >= shorter
        {
            self.stage += 1;
            self.step_in_stage = 0;
        }
        self
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
            steps_of_last_stage: self.steps_of_last_stage,
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

#[cfg(test)]
mod tests {
    use super::*;

    fn start() -> Progress {
        Progress::start(Cursor {
            sources: Vec::new(),
        })
    }

    /// Steps taken in the stage of the last step, the stage of the next, and steps taken in that.
    fn progress(last: (usize, u64), stage: usize, step_in_stage: u64) -> Progress {
        Progress {
            stage,
            step_in_stage,
            last_stage: Some(StageMark {
                index: last.0,
                ..StageMark::default()
            }),
            steps_of_last_stage: last.1,
            ..start()
        }
    }

    #[test]
    fn a_stage_that_became_longer_or_shorter_goes_on_or_is_done() {
        let at = |progress: Progress, steps: &[u64]| {
            let fitted = progress.fitted(steps);
            (fitted.stage, fitted.step_in_stage)
        };
        let in_the_middle = || progress((0, 3), 0, 3);
        assert_eq!(at(in_the_middle(), &[8, 5]), (0, 3));
        assert_eq!(at(in_the_middle(), &[4, 5]), (0, 3));
        assert_eq!(at(in_the_middle(), &[3, 5]), (1, 0));
        assert_eq!(at(in_the_middle(), &[2]), (1, 0));
        let switching = || progress((0, 8), 1, 0);
        assert_eq!(at(switching(), &[8, 5]), (1, 0));
        assert_eq!(at(switching(), &[12, 5]), (0, 8));
        let finished = || progress((1, 5), 2, 0);
        assert_eq!(at(finished(), &[8, 5]), (2, 0));
        assert_eq!(at(finished(), &[9, 5]), (2, 0));
        assert_eq!(at(finished(), &[8, 6]), (1, 5));
        assert_eq!(at(finished(), &[8, 4]), (2, 0));
        assert_eq!(at(finished(), &[8, 5, 1]), (2, 0));
        // Of a checkpoint from before this was recorded.
        assert_eq!(at(progress((0, 0), 1, 0), &[9]), (1, 0));
        assert_eq!(at(start(), &[9]), (0, 0));
    }
}
