//! The one error type of this crate.
//!
//! Every message names the place, what was expected, what was found and what to do about it.

use std::path::{Path, PathBuf};

/// What can go wrong between text on disk and a packed sample.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("cannot {action} {}: {reason}{}", path.display(), io_remedy(reason))]
    Io {
        /// What was tried, in words ("read", "create the folder", …).
        action: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// The operating system's answer. Part of the message, hence not a `source`.
        reason: std::io::Error,
    },

    /// An option holds a value that cannot work.
    #[error("{option}: {problem}")]
    Option {
        /// The option or key as the user knows it.
        option: &'static str,
        /// What is wrong and what would be right.
        problem: String,
    },

    /// The inputs hold no document at all.
    #[error("no documents found: {0}")]
    EmptyCorpus(String),

    /// A record of an input file cannot be used.
    #[error("{}, {place}: {problem}", path.display())]
    Record {
        /// The input file.
        path: PathBuf,
        /// Line or row, as a reader of the file counts them.
        place: String,
        /// What is wrong and what to do.
        problem: String,
    },

    /// Reading or writing Parquet failed.
    #[error(
        "{}{place}: not readable as Parquet, cut short or damaged ({detail}); \
         restore the file or make it anew", path.display()
    )]
    Parquet {
        /// The file.
        path: PathBuf,
        /// ", row group 3" or empty.
        place: String,
        /// What the Parquet library says.
        detail: String,
    },

    /// A file is Parquet but not a token shard.
    #[error(
        "{} is not a token shard: {what}: expected {expected}, found {found}; \
         write shards with `oxitron data tokenize`", path.display()
    )]
    Schema {
        /// The file.
        path: PathBuf,
        /// Column or metadata key.
        what: String,
        /// What a token shard has there.
        expected: String,
        /// What this file has there.
        found: String,
    },

    /// A row group's contents differ from the digest written with them.
    #[error(
        "{}, row group {row_group}: the {what} differ from the checksum stored with them; \
         restore the file or tokenise its source again", path.display()
    )]
    Corrupt {
        /// The shard.
        path: PathBuf,
        /// Row group, from 0.
        row_group: usize,
        /// "tokens" or "document ids".
        what: &'static str,
    },

    /// A row of a shard breaks the format.
    #[error("{}, row group {row_group}, row {row}: {problem}", path.display())]
    Row {
        /// The shard.
        path: PathBuf,
        /// Row group, from 0.
        row_group: usize,
        /// Row inside the row group, from 0.
        row: usize,
        /// What is wrong and what to do.
        problem: String,
    },

    /// A token id that the model has no embedding for.
    #[error(
        "{}, row group {row_group}, row {row}: token {position} has id {id}, but the vocabulary \
         ends at {}; use the tokenizer the model was configured for, or raise model.vocab_size",
        path.display(), vocab_size - 1
    )]
    TokenOutOfRange {
        /// The shard.
        path: PathBuf,
        /// Row group, from 0.
        row_group: usize,
        /// Row inside the row group, from 0.
        row: usize,
        /// Position in the document, from 0.
        position: usize,
        /// The offending id.
        id: u32,
        /// Number of ids that are allowed.
        vocab_size: usize,
    },

    /// The shards were written for a larger vocabulary than the model's.
    #[error(
        "{}: written for a vocabulary of {file_vocab_size} ids, the model has {vocab_size}; \
         set model.vocab_size to at least {file_vocab_size} or tokenise with the model's tokenizer",
        path.display()
    )]
    VocabularyMismatch {
        /// The shard.
        path: PathBuf,
        /// Ids its tokenizer may emit.
        file_vocab_size: usize,
        /// Ids the model knows.
        vocab_size: usize,
    },

    /// Two shards of one dataset come from different tokenizers.
    #[error(
        "{} was written with tokenizer {found}, {} with {expected}; tokenise both with one",
        path.display(), other.display()
    )]
    TokenizerMismatch {
        /// The shard that differs.
        path: PathBuf,
        /// Its tokenizer hash.
        found: String,
        /// A shard seen before.
        other: PathBuf,
        /// That shard's tokenizer hash.
        expected: String,
    },

    /// A tokenizer cannot be read, trained or used.
    #[error("tokenizer {}: {problem}", path.display())]
    Tokenizer {
        /// tokenizer.json or the folder that should hold it.
        path: PathBuf,
        /// What is wrong and what to do.
        problem: String,
    },

    /// The data on disk are not the data that `dataset.lock` describes.
    #[error(
        "the data differ from {}:\n{}\nrestore the files; or pass --allow-data-change to go on with \
         the data as they are, in another order: the lock is built anew then, and the old one kept \
         beside it",
        lock.display(), differences.join("\n")
    )]
    LockMismatch {
        /// The lock file.
        lock: PathBuf,
        /// One line per difference.
        differences: Vec<String>,
    },

    /// The lock file itself cannot be used.
    #[error(
        "{}: {problem}; delete it to build it again from the shards \
         (runs that used it cannot be resumed if the shards changed)", lock.display()
    )]
    Lock {
        /// The lock file.
        lock: PathBuf,
        /// What is wrong.
        problem: String,
    },

    /// A source has no documents to train on.
    #[error("data source \"{source_name}\" has no training documents: {detail}")]
    EmptySource {
        /// The source's name in the config.
        source_name: String,
        /// Why, and what to do.
        detail: String,
    },

    /// No window of a source can fill one sample.
    #[error(
        "seq_len {seq_len} is longer than the data allow: the largest window of source \
         \"{source_name}\" holds {window_tokens} training tokens; use a seq_len of at most \
         {window_tokens}, a larger data.window_tokens, or more data"
    )]
    SequenceTooLong {
        /// Requested sample length in tokens.
        seq_len: usize,
        /// The source's name.
        source_name: String,
        /// Training tokens of its largest window.
        window_tokens: u64,
    },

    /// Every source reached its `max_epochs`.
    #[error(
        "the data are used up: {wanted} samples of {seq_len} tokens wanted, {available} left \
         within max_epochs; train for fewer tokens, add data or raise max_epochs"
    )]
    Exhausted {
        /// Samples asked for.
        wanted: usize,
        /// Samples that could still be made.
        available: usize,
        /// Sample length in tokens.
        seq_len: usize,
    },

    /// A cursor names a place that this dataset does not have.
    #[error(
        "the cursor does not fit the dataset: {0}; resume with the dataset.lock of the run that \
         wrote it"
    )]
    Cursor(String),

    /// A background thread of this crate ended without a result.
    #[error("the {0} thread ended unexpectedly; see the messages above")]
    Thread(&'static str),
}

/// What a user can do about the common answers of the operating system, to follow them in a
/// message.
pub fn io_remedy(answer: &std::io::Error) -> &'static str {
    use std::io::ErrorKind;
    match answer.kind() {
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
            "; check the owner and permissions of the folder, or choose another one"
        }
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            "; free space on this file system, or choose a folder on another one"
        }
        ErrorKind::NotFound => "; check the path",
        ErrorKind::NotADirectory | ErrorKind::AlreadyExists => "; a part of this path is a file",
        _ => "",
    }
}

/// This crate's result.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// A closure for `map_err` that names what was tried on which path.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
        move |reason| Error::Io {
            action,
            path: path.to_path_buf(),
            reason,
        }
    }
}
