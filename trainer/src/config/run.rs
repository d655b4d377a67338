//! `[run]`, `[validation]` and `[checkpoint]`: how a run is carried out.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::time_span::TimeSpan;

/// `[run]`: what the run is called, where it lies, where it runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunConfig {
    /// Name of the run.
    pub name: String,
    /// Run directory (absolute path).
    pub dir: PathBuf,
    /// Seed of the initial weights and of the data order.
    pub seed: u64,
    /// Where to compute.
    pub device: Device,
    /// Whether nothing may be chosen by measurement.
    pub deterministic: bool,
    /// Compute threads per rank; `None` leaves it to the launcher.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
    /// What a device does at most, in 10¹² bf16 operations per second; `None` goes by its name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peak_tflops: Option<f64>,
    /// Steps of which every rank writes a trace; `None` writes none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace_steps: Option<TraceSteps>,
    /// Time since the start of the attempt after which the run stops with a save; `None` is no
    /// limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub time_limit: Option<TimeSpan>,
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
    /// NVIDIA GPUs, one for each rank.
    Cuda,
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
    /// Whether the end of the last stage is saved.
    pub at_end: bool,
    /// Newest checkpoints kept, at least 1.
    pub keep: usize,
    /// Checkpoints whose step is a multiple of this are kept for good; a multiple of `every_steps`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_every: Option<u64>,
    /// Interval in steps of saves in between, each of which goes as soon as a newer checkpoint is
    /// there; less than `every_steps`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ephemeral_every_steps: Option<u64>,
    /// Checkpoints are written while training goes on.
    #[serde(rename = "async")]
    pub asynchronous: bool,
    /// What a periodic save does while the one before is still being written.
    pub when_busy: WhenBusy,
    /// Where checkpoints lie (absolute path).
    pub dir: PathBuf,
}

/// What a periodic save does while the one before is still being written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WhenBusy {
    /// It waits for it.
    Wait,
    /// It is left out.
    Skip,
}
