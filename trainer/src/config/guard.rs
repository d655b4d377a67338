//! `[guard]`: what is watched while the run goes on.

use serde::{Deserialize, Serialize};

use super::time_span::TimeSpan;

/// `[guard]`: bad steps, samples left out, deaths and hangs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GuardConfig {
    /// Interval in steps at which replicas are compared; 0 turns it off (see
    /// [`GuardConfig::checks_replicas_after`]).
    pub replica_check_steps: u64,
    /// Samples that are left out from now on; may overlap.
    pub skip_samples: Vec<SampleRange>,
    /// What follows a step whose loss or gradient norm stands out.
    pub spike_policy: SpikePolicy,
    /// Steps that a step is compared with, at least 16.
    pub spike_window: usize,
    /// Standard deviations above the mean from which on a step stands out.
    pub spike_zscore: f64,
    /// The most steps in a row that may be skipped; one more ends the run.
    pub max_skipped_steps: u64,
    /// The most times that the run may go back to a checkpoint by itself; one more ends it.
    pub max_rollbacks: u64,
    /// The longest time from the start of a rank to its first step.
    pub start_timeout: TimeSpan,
    /// The longest time in which a rank makes no progress.
    pub hang_timeout: TimeSpan,
    /// The longest time without a sign of life of a rank.
    pub lease: TimeSpan,
    /// How long the step under way may go on after a request to stop, before it is given up.
    pub stop_grace: TimeSpan,
    /// Interface or address over which ranks watch each other; `None` leaves it to the system.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub watch_interface: Option<String>,
}

/// Samples of the run by index, counted from 0 over all stages; `[first, end]` in TOML.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "[u64; 2]", into = "[u64; 2]")]
pub struct SampleRange {
    /// Index of the first sample.
    pub first: u64,
    /// Index after the last, greater than `first`.
    pub end: u64,
}

/// What follows a step whose loss or gradient norm stands out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SpikePolicy {
    /// Nothing; it is not even looked for.
    Off,
    /// Its update is not applied.
    Skip,
    /// The run goes back to its last checkpoint and leaves the samples since then out.
    Rollback,
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

impl From<[u64; 2]> for SampleRange {
    fn from([first, end]: [u64; 2]) -> Self {
        Self { first, end }
    }
}

impl From<SampleRange> for [u64; 2] {
    fn from(range: SampleRange) -> Self {
        [range.first, range.end]
    }
}

impl From<SampleRange> for std::ops::Range<u64> {
    fn from(range: SampleRange) -> Self {
        range.first..range.end
    }
}
