//! `[run]`, `[parallel]`, `[validation]` and `[checkpoint]`: how a run is carried out.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::model::Dtype;

/// `[run]`: what the run is called, where it lies, where it runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunConfig {
    /// Name of the run.
    pub name: String,
    /// Run directory (absolute path).
    pub dir: PathBuf,
    /// Seed of the initial weights and of the data order.
    pub seed: u64,
    /// Where to compute.
    pub device: Device,
    /// Compute threads per rank; `None` leaves it to the launcher.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
}

/// Where to compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// The best that is there.
    Auto,
    /// The processor.
    Cpu,
}

/// `[parallel]`: how a step is spread over ranks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParallelConfig {
    /// What is sharded; 1 is optimizer state and master weights.
    pub zero_stage: u8,
    /// Ranks that together hold one copy of the sharded state.
    pub shard_size: ShardSize,
    /// Number format of gradients on the wire.
    pub grad_reduce_dtype: Dtype,
    /// Whether to communicate while computing.
    pub overlap: bool,
    /// What backward computes again.
    pub recompute: Recompute,
}

/// Ranks that together hold one copy of the sharded state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ShardSize {
    /// All ranks.
    World,
}

/// What backward computes again instead of keeping it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// Nothing.
    None,
    /// A whole block from its input.
    Full,
}

/// `[validation]`: documents held back, and when to use them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ValidationConfig {
    /// Share of documents held back, at least 0 and less than 1; 0 turns validation off.
    pub fraction: f64,
    /// Interval in steps; it also happens at the end of each stage.
    pub every_steps: u64,
    /// The most global batches that one validation reads.
    pub batches: usize,
}

/// `[checkpoint]`: when the state is saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointConfig {
    /// Interval in steps; the end of each stage is saved too.
    pub every_steps: u64,
    /// Newest checkpoints kept, at least 1.
    pub keep: usize,
    /// Where checkpoints lie (absolute path).
    pub dir: PathBuf,
}
