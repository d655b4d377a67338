//! Sharded state: units, their slices, and the collectives that keep ranks in step.
//!
//! What a rank holds whole and what as slices is the plan's to say
//! ([`Layout`](crate::plan::Layout)). In every mode fp32 master weights and the two moments (fp32 or
//! bf16, which nothing outside sees: state comes and goes as fp32) exist
//! once in a shard group (ZeRO-1), an equal slice of every unit on each rank; gradients (ZeRO-2)
//! and weights (ZeRO-3) may be held as such slices too, and then a unit is whole only while a layer
//! computes with it. A step reduces each unit's gradient so that its slice arrives summed at the
//! owner, sums that slice over the replicas, updates it, and gathers the new weights.
//!
//! Master weights and moments lie where the model computes or, beside a GPU, in host memory, from
//! which they pass through the device when they are updated.
//!
//! A buffer knows what is under way on it: its contents are reached through
//! functions that wait first.

mod buffer;
mod clock;
mod fingerprint;
mod offload;
mod pool;
mod staging;
mod state;
mod state_kind;
mod transfer;
mod unit;

pub use clock::{CommClock, CommSpan};
pub use fingerprint::Fingerprints;
pub use staging::{StagedPiece, Staging};
pub use state::{Groups, StateForm, Zero};
pub use state_kind::StateKind;
pub use transfer::InitialValues;

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
    /// The plan computes with a unit that it does not hold: a defect of the plan.
    #[error("the plan uses a buffer that it does not hold; please report this with the config")]
    NotHeld,
    /// The state of a tensor could not be read.
    #[error("tensor {tensor}: {problem}")]
    Read {
        /// Canonical name.
        tensor: String,
        /// Why.
        problem: String,
    },
}
