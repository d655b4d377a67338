//! The step against PyTorch, and against itself on other meshes.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod parity;
mod ranks;
mod resharding;
mod runner;
