//! Sharded optimizer state: units, their slices, and the collectives that keep ranks in step.
//!
//! Every rank holds all weights in the compute dtype and all gradients in fp32. What is sharded
//! (ZeRO-1) is the optimizer's: fp32 master weights and the two moments exist once in a shard
//! group, an equal slice of every unit on each rank. A step reduces each unit's gradient so that
//! its slice arrives summed at the owner, updates the slice, and gathers the new weights.
//!
//! A buffer under way in a collective has been moved out of its [`Slot`]: it cannot be read before
//! it is awaited, and the type says so.

mod slot;
mod state;
mod state_kind;
mod transfer;
mod unit;

pub use slot::{CommClock, Slot};
pub use state::Zero;
pub use state_kind::StateKind;
pub use transfer::{InitialValues, Staged};

/// What can go wrong with sharded state.
#[derive(Debug, thiserror::Error)]
pub enum ZeroError {
    /// A collective failed.
    #[error(transparent)]
    Comm(#[from] crate::comm::Error),
    /// A kernel refused its arguments or failed.
    #[error("unit {unit}: {source}")]
    Kernel {
        /// The unit.
        unit: String,
        /// Why.
        source: oxitron_kernels::Error,
    },
    /// libtorch failed (allocation, views, copies).
    #[error("unit {unit}: {source}")]
    Torch {
        /// The unit.
        unit: String,
        /// libtorch's message.
        source: tch::TchError,
    },
    /// A collective of the unit failed earlier and took its buffer along.
    #[error("the buffer of a unit was lost in an earlier failure")]
    Lost,
    /// The state of a tensor could not be read.
    #[error("tensor {tensor}: {problem}")]
    Read {
        /// Canonical name.
        tensor: String,
        /// Why.
        problem: String,
    },
}
