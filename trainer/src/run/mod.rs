//! The step loop: from a config and a rank's place among the others to a trained model.
//!
//! ```text
//! open     run directory, log, dataset, newest checkpoint or initial values      (once)
//! begin    window edge of the data, optimizer reset, buffers, action list         (per stage)
//! step     batch ─▶ actions ─▶ control ─▶ update ─▶ record                        (per step)
//! between  replica check, validate, save, stop
//! ```
//!
//! All ranks run this loop in step. What they must agree on is decided from reduced values: inside
//! a step by its control reduction (`control`), at the start and between steps by
//! `Ranks::together`, which also makes a failure of one rank an error of all.

mod abandon;
mod bad_steps;
mod control;
mod error;
mod feed;
mod figures;
mod folder;
mod open;
mod origin;
mod plan;
mod progress;
mod ranks;
mod replicas;
mod restore;
mod save;
mod saver;
mod stage;
mod step;
mod stops;
mod trace;
mod trainer;
mod validate;
mod watch;

#[cfg(test)]
mod tests;

pub use error::RunError;
pub use figures::{StageFigures, check_memory};
pub use plan::{RunPlan, dtype_of_this_machine};
pub use trainer::{Options, Outcome, train};
pub use watch::Watch;
