//! Token data: from text to Parquet shards, and from shards to packed samples in a fixed order.

mod assign;
mod atomic;
mod cache;
mod cursor;
mod dataset;
mod error;
mod loader;
mod lock;
mod mix;
mod mixture;
mod open;
mod order;
mod permutation;
mod progress;
mod sample;
pub mod shard;
mod split;
mod stream;
mod validation;

pub use assign::{Assignment, assign};
pub use cursor::{Cursor, Dropped, SourceCursor};
pub use dataset::{Dataset, DatasetSpec, SourceSpec, SourceSummary};
pub use error::{Error, Result};
pub use loader::{Loader, LoaderOptions, RankBatch};
pub use open::resolve;
pub use permutation::Permutation;
pub use progress::Progress;
pub use sample::{BatchIndex, NO_TARGET, Piece, Sample, SampleIndex};
pub use split::is_validation;
pub use stream::Stream;
pub use validation::ValidationSamples;
