//! Every piece of math of the trainer, one file per operation.
//!
//! # How an op looks
//!
//! An op is a file with `forward`, `backward` and `reference`: two kernels that write into tensors
//! they are given, and the same function as a composition of libtorch ops that autograd can
//! differentiate, which the tests hold the kernels against. There is no tape: the trainer calls
//! the pairs itself and so knows exactly what is saved, where memory goes and when a gradient is
//! complete.
//!
//! * **Dtypes.** `T` is the compute dtype, `R` that of the residual stream; each is fp32 or bf16.
//!   Arithmetic between loading and storing is fp32, sums of products included.
//! * **Outputs** are preallocated. Input gradients are written (`=`) or added to (`+=`) as each op
//!   says; weight gradients are fp32 and always added to, so micro-batches accumulate by
//!   themselves. A weight gradient that is not wanted is `None`.
//! * **Scratch** comes from a [`Workspace`]. Nothing else is allocated per call.
//! * **Arguments** are checked before anything is written: device, dtype, shape, layout, overlap
//!   of outputs. A device or dtype without a kernel answers [`Error::Unsupported`].
//! * **Determinism.** The same call gives the same bits, and so it does on any number of threads,
//!   because sums are taken in blocks whose size is fixed. Where a library multiplies
//!   ([`product::Engine::Libtorch`]), another number of threads may round differently.
//!
//! # Modules
//!
//! * A decoder block: [`rms_norm`], [`linear_rope`], [`attention`] (over a [`DocumentStarts`]),
//!   [`linear_add`], [`linear_glu`]; what they share: [`linear`], [`rope`]; between dtypes:
//!   [`cast`].
//! * Ends of the model: [`embedding`], [`linear_cross_entropy`].
//! * Updating it: [`norm`], [`decision`], [`adamw`]; starting it: [`philox`].
//! * The machine: [`Threads`], [`memory`] (bytes of libtorch's CPU tensors, counted by a small C++
//!   shim), [`probe`] (what this processor does fast), [`stacks`] (what its threads are doing).
//! * Underneath: [`simd`] compiles plain Rust loops once per instruction set and names vectors where
//!   that is not enough, [`microkernel`] multiplies small matrices and [`matmul`] large ones, [`sys`]
//!   runs loops on libtorch's own OpenMP threads, so that compute has one pool, and turns tensors into
//!   slices. [`product`] chooses who multiplies, and calls it.

pub mod adamw;
pub mod attention;
pub mod cast;
pub mod cuda;
pub mod decision;
mod documents;
pub mod embedding;
mod error;
pub mod fingerprint;
mod float;
pub mod linear;
pub mod linear_add;
pub mod linear_cross_entropy;
pub mod linear_glu;
pub mod linear_rope;
pub mod matmul;
pub mod memory;
pub mod microkernel;
pub mod norm;
pub mod philox;
pub mod probe;
pub mod product;
pub mod rms_norm;
pub mod rope;
mod shim;
pub mod simd;
pub mod stacks;
pub mod sys;
#[cfg(test)]
mod testing;
mod threads;
mod workspace;

pub use documents::DocumentStarts;
pub use error::Error;
pub use float::{Float, Operand, Scalar};
pub use probe::cpu_prefers_bf16;
pub use rope::RopeTable;
pub use threads::Threads;
pub use workspace::{Workspace, WorkspacePlan};
