//! Token shards: one Parquet file, one row per document.
//!
//! | column | type | |
//! |---|---|---|
//! | `tokens` | list of uint32 | ids, the end-of-text id last |
//! | `n_tokens` | uint32 | length of `tokens`; lets an index be built without decoding them |
//! | `doc_id` | string | stable name of the document; decides the validation split |
//! | `loss_weight` | list of float16, optional | weight of predicting each token |
//! | `source` | string, optional | where the document came from, for people |
//! | `meta` | string, optional | anything else, for people |
//!
//! The file metadata carry `oxitron.format_version`, `oxitron.tokenizer` (hash of the
//! tokenizer.json), `oxitron.vocab_size`, `oxitron.eos_id`, `oxitron.documents`, `oxitron.tokens`,
//! `oxitron.checksum` (over the digests of all row groups) and `oxitron.row_groups`: per row group
//! its documents, tokens and two xxh3-64 digests, one over tokens, lengths and weights, one over
//! lengths and document ids. The digest of what is read is checked on every read, so bit rot is
//! found without reading the rest of the file.

mod format;
mod reader;
mod writer;

pub use format::{FORMAT_VERSION, RowGroupSummary, ShardHeader};
pub use reader::{RowGroupIndex, RowGroupTokens, Shard};
pub use writer::{DocumentRow, ShardSummary, ShardWriter};

#[cfg(test)]
mod tests;
