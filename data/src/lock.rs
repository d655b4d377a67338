//! `dataset.lock`: which files make up a dataset, and how many documents and tokens each of their
//! row groups holds on either side of the validation split.
//!
//! The lock is what data order is a function of. It is built once, which reads lengths and ids of
//! every document, and stays small because it counts per row group (some 30 bytes each, so about
//! 15 MB for 10^12 tokens); the documents of a window are counted from the shards when the window
//! is reached. Files enter in **generations**: all that exist when the lock is built are the first,
//! files admitted later (at a new context stage) the next. An epoch runs through the generations
//! one after the other, so that admitting files never moves what came before.

use crate::error::{Error, Result};
use crate::shard::{Shard, ShardHeader};
use crate::{atomic, mix, split};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Version of the lock's format.
const LOCK_VERSION: u32 = 1;

/// The contents of a `dataset.lock`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Lock {
    format_version: u32,
    /// Least tokens of a window.
    pub window_tokens: u64,
    /// Share of the documents kept for validation.
    pub validation_fraction: f64,
    /// Hash of the tokenizer of all shards.
    pub tokenizer: String,
    /// Id that ends every document.
    pub eos_id: u32,
    /// Number of generations of files.
    pub generations: u32,
    pub sources: Vec<LockSource>,
    /// [`Lock::fingerprint`] of all generations; guards the file against edits.
    fingerprint: String,
}

/// A source and its files, in the order in which they count.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LockSource {
    pub name: String,
    pub files: Vec<LockFile>,
}

/// A shard as it was when it entered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LockFile {
    /// Relative to the lock's folder where the file lies below it.
    pub path: PathBuf,
    /// Generation in which it entered, from 0.
    pub generation: u32,
    pub size_bytes: u64,
    pub checksum: String,
    pub footer_checksum: String,
    /// Per row group: documents, tokens, and how many of each are validation's.
    pub documents: Vec<u64>,
    pub tokens: Vec<u64>,
    pub validation_documents: Vec<u64>,
    pub validation_tokens: Vec<u64>,
}

impl Lock {
    /// An empty lock for shards with this header.
    pub fn new(window_tokens: u64, validation_fraction: f64, header: &ShardHeader) -> Self {
        Self {
            format_version: LOCK_VERSION,
            window_tokens,
            validation_fraction,
            tokenizer: header.tokenizer.clone(),
            eos_id: header.eos_id,
            generations: 0,
            sources: Vec::new(),
            fingerprint: String::new(),
        }
    }

    /// Reads and checks a lock.
    pub fn load(path: &Path) -> Result<Self> {
        let failed = |problem: String| Error::Lock {
            lock: path.to_path_buf(),
            problem,
        };
        let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
        let lock: Lock = serde_json::from_slice(&bytes)
            .map_err(|e| failed(format!("not a readable lock ({e})")))?;
        if lock.format_version != LOCK_VERSION {
            let found = lock.format_version;
            return Err(failed(format!(
                "format version {found}, expected {LOCK_VERSION}"
            )));
        }
        if lock.fingerprint != lock.fingerprint(lock.generations) {
            return Err(failed(
                "it was edited or damaged: its own checksum differs".to_string(),
            ));
        }
        let whole = lock.sources.iter().flat_map(|s| &s.files).all(|file| {
            let groups = file.documents.len();
            [
                &file.tokens,
                &file.validation_documents,
                &file.validation_tokens,
            ]
            .iter()
            .all(|column| column.len() == groups)
        });
        if whole {
            Ok(lock)
        } else {
            Err(failed("its columns differ in length".to_string()))
        }
    }

    /// Writes the lock, whole or not at all.
    pub fn save(&mut self, path: &Path) -> Result<()> {
        self.fingerprint = self.fingerprint(self.generations);
        let text = serde_json::to_vec(self).map_err(|e| Error::Lock {
            lock: path.to_path_buf(),
            problem: e.to_string(),
        })?;
        atomic::write(path, &text)
    }

    /// What the data order depends on, hashed: contents and counts of the first `generations`
    /// generations, never paths, so that a dataset may move.
    pub fn fingerprint(&self, generations: u32) -> String {
        let mut text = format!(
            "oxitron lock {LOCK_VERSION}\n{} {:016x} {} {}\n",
            self.window_tokens,
            self.validation_fraction.to_bits(),
            self.tokenizer,
            self.eos_id
        );
        for source in &self.sources {
            let files = source
                .files
                .iter()
                .filter(|file| file.generation < generations);
            for file in files {
                text.push_str(&format!(
                    "{:?} {} {} {} {:?} {:?} {:?} {:?}\n",
                    source.name,
                    file.generation,
                    file.size_bytes,
                    file.footer_checksum,
                    file.documents,
                    file.tokens,
                    file.validation_documents,
                    file.validation_tokens
                ));
            }
        }
        mix::content_hash(text.as_bytes())
    }

    /// Where the files lie.
    pub fn paths(&self, lock_path: &Path) -> Vec<PathBuf> {
        let folder = atomic::parent(lock_path);
        let files = self.sources.iter().flat_map(|source| &source.files);
        files.map(|file| folder.join(&file.path)).collect()
    }

    /// What the lock says, in words.
    pub fn describe(&self, lock_path: &Path) -> String {
        let mut text = format!(
            "{}: fingerprint {}, {} generations of files, windows of at least {} tokens, {} of the \
             documents kept for validation\n",
            lock_path.display(),
            self.fingerprint,
            self.generations,
            self.window_tokens,
            self.validation_fraction
        );
        for source in &self.sources {
            let sum = |column: fn(&LockFile) -> &Vec<u64>| -> u64 {
                source.files.iter().flat_map(column).sum()
            };
            text.push_str(&format!(
                "source \"{}\": {} files, {} documents, {} tokens; of these for validation {} \
                 documents, {} tokens\n",
                source.name,
                source.files.len(),
                sum(|file| &file.documents),
                sum(|file| &file.tokens),
                sum(|file| &file.validation_documents),
                sum(|file| &file.validation_tokens)
            ));
        }
        text
    }

    /// Adds files as one new generation: per source name, its shards in order.
    pub fn admit(&mut self, lock_path: &Path, new: &[(String, Vec<&Shard>)]) -> Result<()> {
        let generation = self.generations;
        for (name, shards) in new {
            let files = shards
                .par_iter()
                .map(|shard| count(lock_path, shard, generation, self.validation_fraction))
                .collect::<Result<Vec<_>>>()?;
            match self.sources.iter_mut().find(|source| source.name == *name) {
                Some(source) => source.files.extend(files),
                None => self.sources.push(LockSource {
                    name: name.clone(),
                    files,
                }),
            }
        }
        self.generations += 1;
        Ok(())
    }
}

impl LockFile {
    /// How `shard` differs from the file that was locked; empty if it does not.
    pub fn differences(&self, shard: &Shard) -> Vec<String> {
        let mut found = Vec::new();
        let mut compare = |what: &str, locked: String, now: String| {
            if locked != now {
                found.push(format!("{what} {locked} → {now}"));
            }
        };
        let sum = |column: &[u64]| column.iter().sum::<u64>().to_string();
        compare(
            "bytes",
            self.size_bytes.to_string(),
            shard.size_bytes().to_string(),
        );
        compare(
            "documents",
            sum(&self.documents),
            shard.documents().to_string(),
        );
        compare("tokens", sum(&self.tokens), shard.tokens().to_string());
        compare(
            "checksum",
            self.checksum.clone(),
            shard.checksum().to_string(),
        );
        if found.is_empty() && self.footer_checksum != shard.footer_checksum() {
            // Same documents, but rows may lie in other row groups: that is another order.
            found.push("same contents, laid out in other row groups".to_string());
        }
        found
    }
}

/// Counts a shard's documents and tokens per row group and side of the split.
fn count(lock_path: &Path, shard: &Shard, generation: u32, fraction: f64) -> Result<LockFile> {
    let mut file = LockFile {
        path: stored_path(lock_path, shard.path())?,
        generation,
        size_bytes: shard.size_bytes(),
        checksum: shard.checksum().to_string(),
        footer_checksum: shard.footer_checksum().to_string(),
        documents: shard.row_groups().iter().map(|g| g.documents).collect(),
        tokens: shard.row_groups().iter().map(|g| g.tokens).collect(),
        validation_documents: Vec::new(),
        validation_tokens: Vec::new(),
    };
    for group in 0..shard.row_groups().len() {
        let (mut documents, mut tokens) = (0, 0);
        let index = shard.read_index(group, true)?;
        for (id, &length) in index.ids.iter().flatten().zip(&index.lengths) {
            if split::is_validation(id, fraction) {
                documents += 1;
                tokens += u64::from(length);
            }
        }
        file.validation_documents.push(documents);
        file.validation_tokens.push(tokens);
    }
    Ok(file)
}

/// The absolute path of a shard, or its path below the lock's folder.
fn stored_path(lock_path: &Path, shard: &Path) -> Result<PathBuf> {
    let shard = std::fs::canonicalize(shard).map_err(Error::io("resolve", shard))?;
    let folder = atomic::parent(lock_path);
    let below = std::fs::canonicalize(&folder)
        .ok()
        .and_then(|folder| shard.strip_prefix(folder).map(Path::to_path_buf).ok());
    Ok(below.unwrap_or(shard))
}
