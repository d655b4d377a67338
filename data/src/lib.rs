//! Token data: from text to Parquet shards, and from shards to packed samples in a fixed order.

mod atomic;
mod error;
mod mix;
mod permutation;
mod progress;
pub mod shard;

pub use error::{Error, Result};
pub use permutation::Permutation;
pub use progress::Progress;
