//! The states of a tensor that outlive a step.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Which state of a tensor is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StateKind {
    /// The fp32 master weights; for a frozen tensor its weights.
    Master,
    /// Adam's first moment.
    ExpAvg,
    /// Adam's second moment.
    ExpAvgSq,
}

impl StateKind {
    /// The name in a manifest: `master`, `exp_avg`, `exp_avg_sq`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Master => "master",
            Self::ExpAvg => "exp_avg",
            Self::ExpAvgSq => "exp_avg_sq",
        }
    }
}

impl fmt::Display for StateKind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}
