//! The step loop: from a config and a rank's place among the others to a trained model.
//!
//! ```text
//! open     run directory, log, newest sound checkpoint or initial values, dataset  (once)
//! begin    window edge of the data, optimizer reset, buffers, action list         (per stage)
//! step     batch ─▶ actions ─▶ control ─▶ update or skip ─▶ record                (per step)
//! between  go back, replica check, validate, stage a save, stop
//! ```
//!
//! All ranks run this loop in step. What they must agree on is decided from reduced values: inside
//! a step by its control reduction (`control`), at the start and between steps by
//! `Ranks::together`, which also makes a failure of one rank an error of all.
//!
//! # What keeps a run from being lost
//!
//! | what happens | what is done | where |
//! |---|---|---|
//! | a save is due | staged by the loop, written by a thread, made a checkpoint by the leader's | `save`, `saver` |
//! | a checkpoint is damaged | all ranks pass over it together | `open`, `restore` |
//! | a step that must not be applied | skipped, or the run goes back | `bad_steps` |
//! | a request to stop | the step under way ends, the state is saved | `stops` |
//! | … and the step takes too long | it is given up, and the state before it saved without a collective | `abandon` |
//! | a rank dies or hangs | the watchdog ends the run and names it; the launcher starts it again | `watch` |

mod abandon;
mod bad_steps;
mod choices;
mod conclude;
mod control;
mod device;
mod error;
mod feed;
mod figures;
mod folder;
mod memory;
mod open;
mod origin;
mod plan;
mod progress;
mod ranks;
mod record;
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
pub use plan::{RunPlan, dtype_of_this_machine, set_threads};
pub use trainer::{Options, Outcome, train};
pub use watch::Watch;
