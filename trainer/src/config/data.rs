//! `[data]`: token shards and how they are mixed.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Token shards and how they are mixed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DataConfig {
    /// The `tokenizer.json` that made the shards (absolute path).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<PathBuf>,
    /// Record of the files and their index (absolute path).
    pub lock: PathBuf,
    /// Documents are shuffled within windows of this many tokens, at least the longest `seq_len`.
    pub window_tokens: u64,
    /// How documents become samples.
    pub packing: Packing,
    /// The parts of the mixture, at least one, with different names.
    #[serde(rename = "source")]
    pub sources: Vec<SourceConfig>,
}

/// How documents become samples.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Packing {
    /// One after the other; what does not fit goes on in the next sample.
    Concat,
}

/// `[[data.source]]`: one part of the mixture.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SourceConfig {
    /// Name of the source; the order of its documents depends on it.
    pub name: String,
    /// A Parquet file, a folder of them, or a pattern (absolute path).
    pub path: PathBuf,
    /// Share of tokens, relative to the other sources.
    pub weight: f64,
    /// How often its documents may be used; `None` is no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_epochs: Option<f64>,
}
