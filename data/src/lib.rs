//! Token data: from text to Parquet shards, and from shards to packed samples in a fixed order.
//!
//! # The way of a document
//!
//! ```text
//! corpus ─▶ tokenizer ─▶ shard          text, once: `oxitron data tokenize`
//! shard ─▶ lock ─▶ order ─▶ stream ─▶ assign ─▶ sample      lengths first, tokens last
//! ```
//!
//! [`corpus`] finds and reads text, [`tokenizer`] learns and applies byte-level BPE, [`tokenize`]
//! joins them and writes [`shard`]s. A [`Dataset`] opens shards under a `dataset.lock`; a
//! [`Stream`] turns a [`Cursor`] into batches of [`SampleIndex`], which name pieces of documents;
//! [`assign`] deals a batch to ranks; [`Dataset::read`] fetches the tokens of one sample, and a
//! [`Loader`] does all of this ahead of the training step.
//!
//! # Invariants
//!
//! * **Order is a pure function** of (lock, seed, cursor). It does not depend on the number of
//!   ranks, on the micro-batch, on restarts, nor on how many threads wrote the shards.
//! * **A source's order does not depend on `seq_len`.** Row groups are permuted and grouped in
//!   windows, documents permuted inside a window; packing never crosses a window's edge, so the
//!   place (epoch, window, offset) means the same for every sample length, and it can be sought.
//! * **An epoch reads every training document exactly once**, and a stage that begins at the next
//!   window edge ([`Cursor::next_stage`]) repeats nothing of its predecessor within an epoch.
//! * **What is left out moves nothing.** Samples of [`SkipRanges`] are drawn and dropped: every
//!   other sample is the one that it would have been, and batches are filled up with those that
//!   follow.
//! * **Validation documents** are chosen by a hash of their id and never train.
//! * **What is read is checked**: digests per row group, ids against the vocabulary.
//!
//! # What it refuses
//!
//! Files that changed under a lock, shards of two tokenizers in one dataset, ids past the
//! vocabulary, damaged or foreign Parquet, a `seq_len` that no window can fill, and more samples
//! than `max_epochs` allow: each an [`Error`] that names the place and the remedy.
//!
//! This crate knows neither torch nor ranks. Threads: tokenising and lock building use rayon; the
//! [`Loader`] owns one thread.

mod assign;
mod atomic;
mod cache;
mod changed;
pub mod corpus;
mod cursor;
mod dataset;
mod error;
mod inspect;
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
mod skip;
mod split;
mod stream;
mod tokenize;
pub mod tokenizer;
mod validation;
mod verify;

#[cfg(test)]
mod tests;

pub use assign::{Assignment, assign};
pub use cursor::{Cursor, Dropped, SourceCursor};
pub use dataset::{Dataset, DatasetSpec, SourceSpec, SourceSummary};
pub use error::{Error, Result, io_remedy};
pub use inspect::{FileFigures, Inspection, inspect};
pub use loader::{Loader, LoaderOptions, Next, RankBatch};
pub use open::resolve;
pub use permutation::Permutation;
pub use progress::Progress;
pub use sample::{BatchIndex, NO_TARGET, Piece, Sample, SampleIndex};
pub use skip::SkipRanges;
pub use split::is_validation;
pub use stream::Stream;
pub use tokenize::{TokenizeOptions, TokenizeReport, tokenize};
pub use validation::ValidationSamples;
pub use verify::{Verification, verify};
