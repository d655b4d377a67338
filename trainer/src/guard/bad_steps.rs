//! What is done about a step that must not be applied.
//!
//! | the step | `spike_policy` | decision |
//! |---|---|---|
//! | is not finite | any | skip |
//! | is a spike | `off` | apply |
//! | | `skip` | skip |
//! | | `rollback` | roll back; skip where there is no checkpoint |
//!
//! More skips in a row than `guard.max_skipped_steps` mean that skipping does not help. With
//! `rollback` the run then goes back, too, if it can; otherwise it is given up. More rollbacks
//! than `guard.max_rollbacks` end it in any case.
//!
//! A rollback leaves out everything since the checkpoint, the bad step included, as PaLM did
//! (Chowdhery et al. 2022, arXiv 2204.02311, §5.1): a spike comes from data and weights together,
//! so the same weights must not meet the same data again.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::spikes::Spike;
use crate::config::{GuardConfig, SpikePolicy};

/// Decides about bad steps, and counts them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadSteps {
    policy: SpikePolicy,
    max_skipped_steps: u64,
    max_rollbacks: u64,
    state: BadStepsState,
}

/// The counts: what a checkpoint keeps of [`BadSteps`].
///
/// A rollback must not bring back the counts of the checkpoint that it goes back to, or it could go
/// back for ever.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BadStepsState {
    /// Steps skipped since the last one that was applied.
    pub skipped_in_a_row: u64,
    /// Index of the first sample of those; nothing where there are none.
    pub first_skipped_sample: Option<u64>,
    /// Rollbacks of the run.
    pub rollbacks: u64,
}

/// A step that must not be applied.
#[derive(Clone, Debug, PartialEq)]
pub struct BadStep {
    /// Number of the step, counted from 1.
    pub step: u64,
    /// Indices in the run of its samples.
    pub samples: Range<u64>,
    /// Mean loss over the valid targets.
    pub loss: f64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// What is wrong with it.
    pub cause: Cause,
    /// Where the data stood, in samples, when the checkpoint was taken that the run can go back to;
    /// `None` where there is no such checkpoint.
    pub checkpoint_sample: Option<u64>,
}

/// What is wrong with a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Cause {
    /// No update can be made of it, for this reason.
    Unusable(&'static str),
    /// It stands out of the steps before it.
    Spike(Spike),
}

/// What to do about a bad step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Apply its update all the same: spikes are not looked at.
    Apply,
    /// Leave weights and moments alone and go on.
    Skip,
    /// Go back to the checkpoint, and leave out these samples from there on.
    Rollback {
        /// Indices in the run.
        leave_out: Range<u64>,
    },
    /// End the run, with this message.
    GiveUp(String),
}

impl BadSteps {
    /// With nothing counted yet.
    pub fn new(config: &GuardConfig) -> Self {
        Self {
            policy: config.spike_policy,
            max_skipped_steps: config.max_skipped_steps,
            max_rollbacks: config.max_rollbacks,
            state: BadStepsState::default(),
        }
    }

    /// Whether spikes have to be looked for.
    pub fn watches_spikes(&self) -> bool {
        self.policy != SpikePolicy::Off
    }

    /// A step was applied.
    pub fn applied(&mut self) {
        self.state.skipped_in_a_row = 0;
        self.state.first_skipped_sample = None;
    }

    /// What to do about a bad step; counts it.
    pub fn decide(&mut self, bad: &BadStep) -> Decision {
        match (bad.cause, self.policy) {
            (Cause::Spike(_), SpikePolicy::Off) => Decision::Apply,
            (Cause::Spike(_), SpikePolicy::Rollback) if bad.checkpoint_sample.is_some() => {
                self.go_back(bad)
            }
            _ => self.skip(bad),
        }
    }

    /// The counts, for a checkpoint.
    pub fn state(&self) -> BadStepsState {
        self.state
    }

    /// Takes over the counts of a checkpoint, when a run is resumed.
    pub fn restore(&mut self, state: BadStepsState) {
        self.state = state;
    }

    fn skip(&mut self, bad: &BadStep) -> Decision {
        self.state.skipped_in_a_row += 1;
        let first = *self
            .state
            .first_skipped_sample
            .get_or_insert(bad.samples.start);
        if self.state.skipped_in_a_row <= self.max_skipped_steps {
            return Decision::Skip;
        }
        if self.policy == SpikePolicy::Rollback && bad.checkpoint_sample.is_some() {
            return self.go_back(bad);
        }
        let (skipped, most) = (self.state.skipped_in_a_row, self.max_skipped_steps);
        let end = bad.samples.end;
        Decision::GiveUp(format!(
            "{bad}. This is step number {skipped} in a row that must be skipped, and \
             guard.max_skipped_steps is {most}. If the data are bad, leave them out and resume: \
             `--set 'guard.skip_samples=[[{first}, {end}]]'` beside the ranges that are there. If \
             the training diverges, resume from an older checkpoint (move the newer ones away) or \
             with a lower learning rate (--allow-config-change)."
        ))
    }

    fn go_back(&mut self, bad: &BadStep) -> Decision {
        let start = bad.checkpoint_sample.unwrap_or(bad.samples.start);
        let leave_out = start.min(bad.samples.start)..bad.samples.end;
        if self.state.rollbacks < self.max_rollbacks {
            self.state.rollbacks += 1;
            self.applied();
            return Decision::Rollback { leave_out };
        }
        let Range { start, end } = leave_out;
        let often = match self.state.rollbacks {
            1 => "once".to_owned(),
            many => format!("{many} times"),
        };
        Decision::GiveUp(format!(
            "{bad}. The run has gone back to a checkpoint {often}, and \
             guard.max_rollbacks is {}. Look at what the events say about the steps before: where \
             spikes come ever again, a lower learning rate or stronger clipping helps more than \
             leaving data out (--allow-config-change). To go on as before, raise \
             guard.max_rollbacks, or leave this stretch out by hand: \
             `--set 'guard.skip_samples=[[{start}, {end}]]'` beside the ranges that are there.",
            self.max_rollbacks
        ))
    }
}

impl std::fmt::Display for BadStep {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            step,
            samples,
            loss,
            grad_norm,
            ..
        } = self;
        write!(
            f,
            "step {step} (samples {} to {}, loss {loss:.4}, gradient norm {grad_norm:.4}): ",
            samples.start,
            samples.end.saturating_sub(1)
        )?;
        match &self.cause {
            Cause::Unusable(reason) => f.write_str(reason),
            Cause::Spike(spike) => write!(f, "{spike}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guard::Figure;
    use proptest::prelude::*;

    fn bad_steps(policy: SpikePolicy, max_skipped_steps: u64, max_rollbacks: u64) -> BadSteps {
        BadSteps {
            policy,
            max_skipped_steps,
            max_rollbacks,
            state: BadStepsState::default(),
        }
    }

    const SPIKE: Cause = Cause::Spike(Spike {
        figure: Figure::Loss,
        value: 9.5,
        mean: 2.25,
        z: 31.25,
        steps: 128,
    });

    const UNUSABLE: Cause = Cause::Unusable("the loss is not finite");

    /// Steps of 8 samples.
    fn bad(step: u64, cause: Cause, checkpoint_sample: Option<u64>) -> BadStep {
        BadStep {
            step,
            samples: 8 * (step - 1)..8 * step,
            loss: 9.5,
            grad_norm: 1.5,
            cause,
            checkpoint_sample,
        }
    }

    #[test]
    fn the_policy_decides_about_spikes_and_not_about_the_rest() {
        use SpikePolicy::{Off, Rollback, Skip};
        for (policy, checkpoint, expected) in [
            (Off, Some(0), Decision::Apply),
            (Skip, Some(0), Decision::Skip),
            (Rollback, None, Decision::Skip),
            (Rollback, Some(16), Decision::Rollback { leave_out: 16..80 }),
        ] {
            let mut steps = bad_steps(policy, 10, 5);
            assert_eq!(steps.decide(&bad(10, SPIKE, checkpoint)), expected);
            assert_eq!(steps.watches_spikes(), policy != Off);
            let mut steps = bad_steps(policy, 10, 5);
            let decision = steps.decide(&bad(10, UNUSABLE, checkpoint));
            assert_eq!(decision, Decision::Skip);
        }
    }

    #[test]
    fn too_many_skips_in_a_row_give_up_with_the_stretch() {
        let mut steps = bad_steps(SpikePolicy::Skip, 2, 5);
        assert_eq!(steps.decide(&bad(5, SPIKE, None)), Decision::Skip);
        steps.applied();
        assert_eq!(steps.decide(&bad(7, SPIKE, None)), Decision::Skip);
        assert_eq!(steps.decide(&bad(8, UNUSABLE, None)), Decision::Skip);
        let Decision::GiveUp(message) = steps.decide(&bad(9, SPIKE, None)) else {
            unreachable!("the third in a row is one too many")
        };
        assert_eq!(
            message,
            "step 9 (samples 64 to 71, loss 9.5000, gradient norm 1.5000): the loss 9.5000 is 31.2 \
             standard deviations above 2.2500, the mean of 128 accepted steps. This is step number \
             3 in a row that must be skipped, and guard.max_skipped_steps is 2. If the data are \
             bad, leave them out and resume: `--set 'guard.skip_samples=[[48, 72]]'` beside the \
             ranges that are there. If the training diverges, resume from an older checkpoint \
             (move the newer ones away) or with a lower learning rate (--allow-config-change)."
        );
        let mut none = bad_steps(SpikePolicy::Off, 0, 0);
        let decision = none.decide(&bad(1, UNUSABLE, Some(0)));
        assert!(matches!(decision, Decision::GiveUp(_)), "{decision:?}");
    }

    #[test]
    fn skips_that_do_not_help_become_a_rollback_where_that_is_the_policy() {
        let mut steps = bad_steps(SpikePolicy::Rollback, 1, 1);
        assert_eq!(steps.decide(&bad(5, UNUSABLE, Some(16))), Decision::Skip);
        let back = Decision::Rollback { leave_out: 16..48 };
        assert_eq!(steps.decide(&bad(6, UNUSABLE, Some(16))), back);
        assert_eq!(steps.state().skipped_in_a_row, 0);
        assert_eq!(steps.state().rollbacks, 1);
        assert_eq!(steps.decide(&bad(7, UNUSABLE, Some(16))), Decision::Skip);
        let Decision::GiveUp(message) = steps.decide(&bad(8, SPIKE, Some(16))) else {
            unreachable!("a second rollback is one too many")
        };
        assert!(message.contains("gone back to a checkpoint once"));
        assert!(
            message.contains("guard.skip_samples=[[16, 64]]"),
            "{message}"
        );
    }

    #[test]
    fn counts_come_back() {
        let mut steps = bad_steps(SpikePolicy::Skip, 2, 5);
        steps.decide(&bad(5, SPIKE, None));
        let stored = serde_json::to_string(&steps.state()).unwrap_or_default();
        let mut resumed = bad_steps(SpikePolicy::Skip, 2, 5);
        if let Ok(state) = serde_json::from_str(&stored) {
            resumed.restore(state);
        }
        assert_eq!(resumed, steps);
    }

    proptest! {
        /// Whatever happens, a run neither skips nor goes back for ever.
        #[test]
        fn limits_hold(
            policy in prop::sample::select(vec![
                SpikePolicy::Off, SpikePolicy::Skip, SpikePolicy::Rollback,
            ]),
            (max_skipped, max_rollbacks) in (0u64..5, 0u64..5),
            events in prop::collection::vec((0u8..3, any::<bool>()), 1..200),
        ) {
            let mut steps = bad_steps(policy, max_skipped, max_rollbacks);
            let (mut in_a_row, mut rollbacks) = (0, 0);
            for (number, (event, checkpoint)) in events.into_iter().enumerate() {
                let cause = match event {
                    0 => {
                        steps.applied();
                        in_a_row = 0;
                        continue;
                    }
                    1 => SPIKE,
                    _ => UNUSABLE,
                };
                let bad = bad(number as u64 + 1, cause, checkpoint.then_some(0));
                match steps.decide(&bad) {
                    Decision::Apply => {
                        prop_assert!(policy == SpikePolicy::Off && cause == SPIKE);
                    }
                    Decision::Skip => in_a_row += 1,
                    Decision::Rollback { leave_out } => {
                        prop_assert_eq!(leave_out, 0..bad.samples.end);
                        prop_assert!(policy == SpikePolicy::Rollback && checkpoint);
                        rollbacks += 1;
                        in_a_row = 0;
                    }
                    Decision::GiveUp(message) => {
                        prop_assert!(in_a_row == max_skipped || rollbacks == max_rollbacks);
                        prop_assert!(message.contains("guard.skip_samples=[["));
                        break;
                    }
                }
                prop_assert!(in_a_row <= max_skipped && rollbacks <= max_rollbacks);
                prop_assert_eq!(steps.state().skipped_in_a_row, in_a_row);
                prop_assert_eq!(steps.state().rollbacks, rollbacks);
            }
        }
    }
}
