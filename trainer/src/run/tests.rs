//! The step against PyTorch, and against itself on other meshes and in another precision.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod ahead;
mod parity;
mod precision;
mod ranks;
mod ranks_on_gpus;
mod repetition;
mod resharding;
mod runner;
mod samples;
