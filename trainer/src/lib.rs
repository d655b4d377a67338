//! The trainer: from a typed config to a trained, checkpointed model.

pub mod checkpoint;
pub mod comm;
pub mod config;
pub mod convert;
pub mod generate;
pub mod metrics;
pub mod model;
pub mod plan;
pub mod run;
#[cfg(test)]
#[allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod testing;
pub mod zero;
