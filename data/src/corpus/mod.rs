//! Text on disk: files, source trees, JSONL and Parquet, read as a stream of documents.
//!
//! The stream's order depends on names and contents alone, not on the file system or the order of
//! the arguments. A document's id is taken from a field where one is named; otherwise it is a hash
//! of the text, so that it survives renaming and copies of a text share one id (and with it one
//! side of the validation split).

mod documents;
mod jsonl;
mod parquet;
mod scan;
mod share;

pub use documents::{Document, Documents, ReadCounts};
pub use scan::{Corpus, CorpusFile, ScanCounts};

use std::path::PathBuf;

/// How the inputs are to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// By extension: `.jsonl` and `.ndjson`, `.parquet`, everything else is text.
    #[default]
    Auto,
    /// Every file is one document.
    Text,
    /// One JSON object per line.
    Jsonl,
    /// One row per document.
    Parquet,
}

/// Which files make up a corpus and how they are read.
#[derive(Debug, Clone, PartialEq)]
pub struct CorpusOptions {
    /// Files and folders. A folder is a tree: read recursively, without hidden names and without
    /// following links.
    pub inputs: Vec<PathBuf>,
    /// How to read them.
    pub format: Format,
    /// JSONL field or Parquet column that holds the text.
    pub text_field: String,
    /// JSONL field or Parquet column that holds a unique id, if there is one.
    pub id_field: Option<String>,
    /// Files of a tree are taken only with one of these extensions; empty takes every file that
    /// `format` can be (all, for text).
    pub extensions: Vec<String>,
    /// Larger text files are left out.
    pub max_file_bytes: Option<u64>,
    /// Share of the corpus, by bytes, that one tree may have; the files to keep of a larger tree
    /// are chosen by a hash of their names.
    pub max_tree_share: Option<f64>,
}

impl CorpusOptions {
    /// Everything in `inputs`, recognised by extension, text in the field `text`.
    pub fn new(inputs: Vec<PathBuf>) -> Self {
        Self {
            inputs,
            format: Format::Auto,
            text_field: "text".to_string(),
            id_field: None,
            extensions: Vec::new(),
            max_file_bytes: None,
            max_tree_share: None,
        }
    }
}

#[cfg(test)]
mod tests;
