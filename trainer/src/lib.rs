//! The trainer: from a typed config to a trained, checkpointed model.

pub mod checkpoint;
pub mod comm;
pub mod config;
pub mod convert;
pub mod metrics;
