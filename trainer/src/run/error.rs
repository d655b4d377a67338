//! What ends a run before its time.

use std::path::PathBuf;

use oxitron_data::io_remedy;

/// Why a run could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The configuration cannot run as it is. Found before any data is opened.
    #[error("{0}")]
    Plan(String),
    /// The configuration differs from the one the run was started with.
    #[error(
        "{}: the configuration differs from the one this run was started with in what changes the \
         result:\n{differences}\nTrain under another run.name or run.dir, or pass \
         --allow-config-change to go on all the same.",
        run_dir.display()
    )]
    ConfigChanged {
        /// The run directory.
        run_dir: PathBuf,
        /// One line per key: old and new value.
        differences: String,
    },
    /// The configuration.
    #[error(transparent)]
    Config(#[from] crate::config::ConfigError),
    /// Another process trains in the run directory.
    #[error(
        "{} is in use by another process; wait for it to end, or choose another run.dir",
        run_dir.display()
    )]
    Locked {
        /// The run directory.
        run_dir: PathBuf,
    },
    /// The run has checkpoints, and none of them is sound.
    #[error(
        "{}: no checkpoint of this run can be used, the newest because of: {reason}\nBring one \
         back, or move this folder away to begin the run anew.",
        dir.display()
    )]
    NoneUsable {
        /// The folder of the run's checkpoints.
        dir: PathBuf,
        /// What is wrong with the newest.
        reason: String,
    },
    /// The state with which the run ends could not be saved.
    #[error(
        "the state after step {step}, the last, could not be saved in {}: see the error above, or \
         in the log of another rank; make room there and start again: the run goes on from its \
         newest checkpoint",
        dir.display()
    )]
    LastSave {
        /// The step.
        step: u64,
        /// The folder of checkpoints.
        dir: PathBuf,
    },
    /// The step under way is given up on all ranks, because the run is to stop. Not an error of the
    /// run: what it ends with says how that went.
    #[error("the step under way is given up, because the run is to stop")]
    Abandoned,
    /// Ranks cannot watch over each other.
    #[error(transparent)]
    Watchdog(#[from] crate::guard::watchdog::WatchdogError),
    /// Bad steps of which the run does not get free by itself, nor if it is started again as it is.
    #[error("the run is given up: {0}")]
    BadSteps(String),
    /// A file or folder of the run.
    #[error("{}: cannot {action}: {source}{}", path.display(), io_remedy(source))]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was being done.
        action: &'static str,
        /// What the system answered.
        source: std::io::Error,
    },
    /// Ranks that should hold the same weights do not.
    #[error(
        "replica check after step {step}: {} other weights than the rest of the {world} ranks. \
         Look for the hosts in the logs and test their memory and processors; then start again \
         without them: the run goes on from its newest checkpoint, which passed this check. If it \
         fails on other hosts too, please report it.",
        named(ranks)
    )]
    ReplicasDiffer {
        /// After how many steps.
        step: u64,
        /// Those that differ from the others, or all that disagree where nobody can tell.
        ranks: Vec<usize>,
        /// Number of ranks.
        world: usize,
    },
    /// The token data hold something that training has no use for.
    #[error("{0}")]
    Unusable(String),
    /// What cannot happen.
    #[error("{0}; this is a defect of Oxitron: please report it together with the config")]
    Defect(&'static str),
    /// Another rank failed; its log says why.
    #[error("rank {rank} failed, see its log; this rank stops with it")]
    OtherRank {
        /// The first rank that failed.
        rank: usize,
        /// Its command line or configuration is at fault.
        usage: bool,
    },
    /// The model.
    #[error(transparent)]
    Model(#[from] crate::model::ModelError),
    /// Weights, gradients, optimizer state.
    #[error(transparent)]
    Zero(#[from] crate::zero::ZeroError),
    /// Communication between ranks.
    #[error(transparent)]
    Comm(#[from] crate::comm::Error),
    /// A kernel outside the model.
    #[error(transparent)]
    Kernel(#[from] oxitron_kernels::Error),
    /// libtorch.
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),
    /// Token data.
    #[error(transparent)]
    Data(#[from] oxitron_data::Error),
    /// A checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] crate::checkpoint::Error),
    /// A Hugging Face folder.
    #[error(transparent)]
    Convert(#[from] crate::convert::Error),
    /// Metrics and events.
    #[error(transparent)]
    Metrics(#[from] crate::metrics::MetricsError),
}

impl From<crate::guard::watchdog::Abandoned> for RunError {
    fn from(_: crate::guard::watchdog::Abandoned) -> Self {
        Self::Abandoned
    }
}

impl RunError {
    /// Whether it only says that the step under way is given up on all ranks.
    pub(super) fn is_given_up(&self) -> bool {
        match self {
            Self::Abandoned => true,
            Self::Comm(error) | Self::Zero(crate::zero::ZeroError::Comm(error)) => {
                error.is_interrupted()
            }
            _ => false,
        }
    }

    /// Whether the command line or the configuration is at fault, and no data was opened: the
    /// process then exits with code 2.
    pub fn is_usage(&self) -> bool {
        matches!(
            self,
            Self::Plan(_)
                | Self::Config(_)
                | Self::ConfigChanged { .. }
                | Self::OtherRank { usage: true, .. }
        )
    }

    /// For `map_err` on input and output.
    pub(super) fn io(
        path: impl Into<PathBuf>,
        action: &'static str,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io {
            path,
            action,
            source,
        }
    }
}

/// `rank 3 holds`, `ranks 1, 3 hold`.
fn named(ranks: &[usize]) -> String {
    let list: Vec<String> = ranks.iter().map(usize::to_string).collect();
    match ranks {
        [rank] => format!("rank {rank} holds"),
        _ => format!("ranks {} hold", list.join(", ")),
    }
}
