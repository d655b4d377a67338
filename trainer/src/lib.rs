//! The trainer: from a typed configuration to a trained, checkpointed model.
//!
//! # Rooms
//!
//! Listed so that an arrow only points down; a room knows nothing of those above it.
//!
//! | room | owns |
//! |---|---|
//! | [`run`], [`generate`] | the step loop; sampling from a model |
//! | [`guard`] | what keeps a run from being lost: the watchdog |
//! | [`convert`] | Hugging Face folders in and out |
//! | [`guard`] | bad steps: seen, skipped, or undone |
//! | [`checkpoint`] | the mesh-free format: written by each rank, committed by its manifest |
//! | [`metrics`] | steps, events, TensorBoard, log lines |
//! | [`zero`] | weights, gradients and sharded optimizer state, and the collectives that move them |
//! | [`model`] | families as data; forward and backward without autograd |
//! | [`comm`] | lanes and tickets over threads, MPI or NCCL |
//! | [`plan`] | mesh, units, shard map, the step as a list of actions: pure |
//! | [`config`] | TOML to typed, validated structs: pure |
//!
//! To follow one step from top to bottom: `run/trainer.rs` (the loop over stages and steps) hands
//! a step's micro-batches to `run/step.rs`, which walks the actions that `plan/step.rs` emitted,
//! runs the layers of `model/decoder.rs` on the views that `zero/state.rs` lends, and agrees with
//! the other ranks in `run/control.rs`.
//!
//! # What holds everywhere
//!
//! - Every rank walks the same actions and decides from reduced values, so all decide alike.
//! - A result depends on the mesh by rounding alone: initial values, data order, loss and gradient
//!   norm are defined without it. The same mesh and choices give the same bits, resumed or not.
//! - A buffer under way in a collective has been moved away and cannot be read.
//! - Nothing here starts a process; that is the launcher's.
//!
//! # What it refuses
//!
//! Unknown or contradictory configuration, a stage that leaves a rank without samples, weights of
//! another model, a configuration that would change the result of a run under way, data that
//! differ from their lock, and damaged checkpoints, each with the place and the remedy.

// The conformance suite of `comm` is part of the tests here and of a program of its own.
#[cfg(test)]
extern crate self as oxitron_trainer;

pub mod checkpoint;
pub mod comm;
pub mod config;
pub mod convert;
pub mod faults;
pub mod generate;
pub mod guard;
pub mod machine;
pub mod metrics;
pub mod model;
pub mod plan;
pub mod run;
#[cfg(test)]
#[allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod testing;
pub mod zero;
