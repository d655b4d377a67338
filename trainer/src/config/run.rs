//! `[run]`, `[validation]`, `[checkpoint]` and `[guard]`: how a run is carried out.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

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
    /// Steps of which every rank writes a trace; `None` writes none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace_steps: Option<TraceSteps>,
}

/// A stretch of steps that are traced, ends included; `[first, last]` in TOML.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "[u64; 2]", into = "[u64; 2]")]
pub struct TraceSteps {
    /// First step, counted from 1 over the whole run.
    pub first: u64,
    /// Last step, not before the first.
    pub last: u64,
}

impl TraceSteps {
    /// Whether a step, counted from 1, is traced.
    pub fn contains(self, step: u64) -> bool {
        (self.first..=self.last).contains(&step)
    }
}

impl From<[u64; 2]> for TraceSteps {
    fn from([first, last]: [u64; 2]) -> Self {
        Self { first, last }
    }
}

impl From<TraceSteps> for [u64; 2] {
    fn from(steps: TraceSteps) -> Self {
        [steps.first, steps.last]
    }
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

/// `[guard]`: what is watched while the run goes on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuardConfig {
    /// Interval in steps at which replicas are compared; 0 turns it off (see
    /// [`GuardConfig::checks_replicas_after`]).
    pub replica_check_steps: u64,
}

impl GuardConfig {
    /// Whether replicas are compared at all: at the interval, and before every save.
    pub fn checks_replicas(&self) -> bool {
        self.replica_check_steps > 0
    }

    /// Whether the interval asks for a comparison after a step, counted from 1.
    pub fn checks_replicas_after(&self, step: u64) -> bool {
        self.replica_check_steps > 0 && step.is_multiple_of(self.replica_check_steps)
    }
}
