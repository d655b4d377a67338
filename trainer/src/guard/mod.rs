//! What keeps a run from being lost while it goes on.
//!
//! [`Spikes`] sees a step whose loss or gradient norm stands out of the steps before it, and
//! [`BadSteps`] says what to do about a step that must not be applied. Both are pure: every rank
//! hands them the same reduced figures and comes to the same decision. The [`watchdog`] notices
//! ranks that die, hang or lag, ends the run with the reason, and spreads requests to stop.

mod bad_steps;
mod spikes;
pub mod watchdog;

pub use bad_steps::{BadStep, BadSteps, BadStepsState, Cause, Decision};
pub use spikes::{Figure, Spike, SpikeState, Spikes};
