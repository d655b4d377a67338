//! What can go wrong between ranks, said so that a person can act on it.

use std::sync::Arc;

/// An error of the communication layer.
///
/// It is `Clone` because a failed lane hands the same cause to every ticket that was queued on it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The arguments of an operation do not fit it. Nothing was sent; the lane is unharmed.
    #[error("{operation} on {lane}: {reason}")]
    InvalidArgument {
        /// The lane, with its ranks.
        lane: String,
        /// The operation, for instance `reduce-scatter`.
        operation: &'static str,
        /// What was expected, what was found.
        reason: String,
    },
    /// The ranks of a lane are not a set of distinct ranks of this world that contains this rank.
    #[error("cannot create a lane over ranks {ranks:?} on rank {rank} of {world}: {reason}")]
    InvalidLane {
        /// The ranks asked for.
        ranks: Vec<usize>,
        /// The rank that asked.
        rank: usize,
        /// The number of ranks of the run.
        world: usize,
        /// Which rule they break.
        reason: &'static str,
    },
    /// An operation failed on its way. The lane is poisoned from here on.
    #[error("{operation} on {lane} failed with rank {peer}: {reason}")]
    Failed {
        /// The lane, with its ranks.
        lane: String,
        /// The operation, for instance `all-gather`.
        operation: &'static str,
        /// The rank at the other end (numbered in the world, not in the lane).
        peer: usize,
        /// What the transport said.
        reason: String,
    },
    /// NCCL, or the GPU under it, failed. The lane's communicator is given up.
    #[error("{operation} on {lane} failed: {reason}")]
    Gpu {
        /// The lane, with its ranks.
        lane: String,
        /// The operation, for instance `all-gather`.
        operation: &'static str,
        /// What NCCL or the driver said.
        reason: String,
    },
    /// An operation was not run because an earlier one on the same lane failed.
    #[error("{operation} on {lane} was not run, because an earlier operation failed: {cause}")]
    Poisoned {
        /// The lane, with its ranks.
        lane: String,
        /// The operation that was queued.
        operation: &'static str,
        /// What happened to the earlier one.
        cause: Arc<Error>,
    },
    /// An operation was not run because one that it comes after (`Lane::after`) failed. The lane is
    /// poisoned from here on.
    #[error("{operation} on {lane} was not run, because what it comes after failed: {cause}")]
    Dependency {
        /// The lane, with its ranks.
        lane: String,
        /// The operation that was queued.
        operation: &'static str,
        /// What happened to the one that it comes after.
        cause: Arc<Error>,
    },
    /// The step was given up while this rank waited (`Monitor::interrupt`).
    #[error("{operation} on {lane} was given up, because the step is")]
    Interrupted {
        /// The lane, with its ranks.
        lane: String,
        /// The operation that was waited for.
        operation: &'static str,
    },
    /// The communication thread has ended, so nothing can be sent any more.
    #[error("the communication thread of rank {rank} has ended: {reason}")]
    Closed {
        /// This rank.
        rank: usize,
        /// Why it ended.
        reason: String,
    },
    /// The ranks could not be brought together.
    #[error("cannot start communication: {0}")]
    Start(String),
}

impl Error {
    /// Whether nothing failed but the patience of whoever called `Monitor::interrupt`.
    #[must_use]
    pub fn is_interrupted(&self) -> bool {
        matches!(self, Self::Interrupted { .. })
    }
}

/// A result of the communication layer.
pub type Result<T, E = Error> = std::result::Result<T, E>;
