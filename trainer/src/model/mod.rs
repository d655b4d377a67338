//! The decoder: which parameters it has, which operations it runs, forwards and backwards.
//!
//! There is no autograd. A family is described by data: its [`Units`](crate::plan::Units) (which
//! tensors, in which units) and the [`Program`] of a block (which operations, over which slots).
//! [`Decoder`] walks the program forwards and, for the gradient, in reverse. That gives exact
//! control of what is kept, of what is recomputed, and of the moment at which a unit's gradient is
//! complete, which is when its reduction may start.
//!
//! Nothing here knows about ranks, sharding or collectives: weights and gradients come in as views
//! of the buffers that `zero` holds.

mod activations;
mod batch;
mod decoder;
mod footprint;
mod llama;
mod loss;
mod op;
mod program;
mod stopwatch;
#[cfg(test)]
mod tests;

pub use activations::Activations;
pub use batch::Batch;
pub use decoder::{Decoder, LayerGradients, LayerWeights, Objective};
pub use footprint::{ActivationBytes, activation_bytes};
pub use llama::{describe, tensor_names};
pub use loss::{Loss, LossSum};
pub use program::{Op, Program, Slot, SlotKind, SlotSpec};
pub use stopwatch::{OpSpan, Stopwatch};

use oxitron_kernels as kernels;

/// What can go wrong in the model.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A kernel refused its arguments or failed.
    #[error("{layer}: {source}")]
    Kernel {
        /// The layer that ran.
        layer: String,
        /// Why it failed.
        source: kernels::Error,
    },
    /// libtorch failed outside a kernel (allocation, views).
    #[error("{what}: {source}")]
    Torch {
        /// What was being done.
        what: &'static str,
        /// libtorch's message.
        source: tch::TchError,
    },
    /// The configuration describes a model that cannot be built.
    #[error("{0}")]
    Description(String),
    /// A batch does not fit the buffers that were planned for it.
    #[error("a batch of {found} tokens was given to buffers of {expected} tokens")]
    BatchShape {
        /// Tokens the buffers hold.
        expected: usize,
        /// Tokens of the batch.
        found: usize,
    },
}

/// Adds to a libtorch error what was being done.
pub(crate) trait TorchContext<T> {
    /// Names the action that failed.
    fn during(self, what: &'static str) -> Result<T, ModelError>;
}

impl<T> TorchContext<T> for Result<T, tch::TchError> {
    fn during(self, what: &'static str) -> Result<T, ModelError> {
        self.map_err(|source| ModelError::Torch { what, source })
    }
}
