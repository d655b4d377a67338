//! The gate before a step's control reduction.
//!
//! No rank may update its weights before the control reduction of the step is complete, and that
//! cannot complete before every rank has submitted its part. So whoever closes this gate on all
//! ranks, and knows the least that any of them has let through, knows where the run stands.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A position in the run: a step, and how often the run has begun to count anew (at its start and
/// whenever it went back to an older state). Later positions compare greater.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Mark {
    /// How often [`Pulse::begin`](super::Pulse::begin) was called.
    pub beginnings: u32,
    /// The step.
    pub step: u64,
}

/// The step must not go on: it is being abandoned on all ranks. See
/// [`Pulse::wait_for_abandon`](super::Pulse::wait_for_abandon).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the step is abandoned on request; the state before it is saved")]
pub struct Abandoned;

/// What a rank has let through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Gate {
    submitted: Mark,
    frozen: bool,
}

impl Gate {
    /// Counts from the state after `step`.
    pub(super) fn begin(&mut self, step: u64) -> Result<(), Abandoned> {
        if self.frozen {
            return Err(Abandoned);
        }
        self.submitted = Mark {
            beginnings: self.submitted.beginnings + 1,
            step,
        };
        Ok(())
    }

    /// Lets the control reduction of `step` through, unless the gate is closed.
    pub(super) fn submit(&mut self, step: u64) -> Result<(), Abandoned> {
        if step <= self.submitted.step {
            return Ok(());
        }
        if self.frozen {
            return Err(Abandoned);
        }
        self.submitted.step = step;
        Ok(())
    }

    /// Closes the gate and says what it has let through.
    pub(super) fn freeze(&mut self) -> Mark {
        self.frozen = true;
        self.submitted
    }

    pub(super) fn submitted(&self) -> Mark {
        self.submitted
    }
}
