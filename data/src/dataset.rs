//! A dataset: sources of token shards under a lock, opened for training.

use crate::cache::RowGroupCache;
use crate::changed;
use crate::cursor::{Cursor, SourceCursor};
use crate::error::{Error, Result};
use crate::lock::Lock;
use crate::open;
use crate::order::{Document, EpochPlan, Group, Source, WindowIndex};
use crate::sample::{self, Sample, SampleIndex};
use crate::shard::Shard;
use crate::stream::Stream;
use crate::validation::ValidationSamples;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A weighted part of the mixture.
#[derive(Debug, Clone, PartialEq)]
pub struct SourceSpec {
    /// Name; with the seed it keys the order of the source.
    pub name: String,
    /// Shards, folders of shards (`*.parquet` directly inside), or glob patterns of either.
    pub paths: Vec<PathBuf>,
    /// Share of tokens; the default of [`Dataset::weights`].
    pub weight: f64,
    /// Passes over the source after which it is used up; `None` for no limit.
    pub max_epochs: Option<f64>,
}

/// What to open and how to order it.
#[derive(Debug, Clone, PartialEq)]
pub struct DatasetSpec {
    /// Parts of the mixture, with different names.
    pub sources: Vec<SourceSpec>,
    /// Seed of the order.
    pub seed: u64,
    /// Least training tokens of a window (a few times the longest `seq_len`, well below the tokens
    /// of the shortest stage: what is left of a window is dropped when a stage ends).
    pub window_tokens: u64,
    /// Share of the documents kept for validation, 0 to below 1.
    pub validation_fraction: f64,
    /// Ids that the model knows: every id must be below.
    pub vocab_size: usize,
    /// The `dataset.lock`; built if it is not there.
    pub lock: PathBuf,
}

/// Figures of one source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceSummary {
    /// Its name.
    pub name: String,
    /// Shards.
    pub files: usize,
    /// Row groups.
    pub row_groups: usize,
    /// Documents and tokens of one training epoch.
    pub documents: u64,
    /// Training tokens of one epoch.
    pub tokens: u64,
    /// Documents kept for validation.
    pub validation_documents: u64,
}

/// An opened dataset. Cheap to clone; clones share the cache of decoded row groups.
#[derive(Debug, Clone)]
pub struct Dataset {
    pub(crate) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub spec: DatasetSpec,
    pub lock: Lock,
    pub fingerprint: String,
    /// In the order of the spec.
    pub sources: Vec<Source>,
    pub shards: Vec<Arc<Shard>>,
    /// Files that the lock does not know yet.
    pub pending: Vec<PathBuf>,
    pub cache: RowGroupCache,
}

impl Dataset {
    /// Opens the shards and checks them against the lock, or builds the lock if there is none.
    /// Files that the lock does not know stay out until [`Dataset::admit_new_files`].
    ///
    /// # Errors
    /// No files, files that are no shards, shards of different tokenizers, a vocabulary larger
    /// than the model's, files that differ from the lock, or a source without training documents.
    pub fn open(spec: &DatasetSpec) -> Result<Dataset> {
        open::open(spec, None)
    }

    /// Opens the dataset as it was when its fingerprint was `fingerprint`: with the files that had
    /// been admitted by then. For resuming a run whose lock has grown since.
    ///
    /// # Errors
    /// As [`Dataset::open`], and when the lock never had this fingerprint.
    pub fn open_at(spec: &DatasetSpec, fingerprint: &str) -> Result<Dataset> {
        open::open(spec, Some(fingerprint))
    }

    /// Opens the data as they are, although they may not be those that a run was trained on: what
    /// [`Dataset::open_at`] (or, without a fingerprint, [`Dataset::open`]) refuses because of the
    /// lock is returned as a list of differences. Where the files differ from the lock, a new one
    /// is written, and the old one is kept beside it with `.replaced-1` (`-2`, …) after its name.
    ///
    /// A [`Cursor`] of the data as they were has to be [fitted](Cursor::fitted) then.
    ///
    /// # Errors
    /// What [`Dataset::open`] refuses besides, and a lock that cannot be replaced.
    pub fn open_changed(
        spec: &DatasetSpec,
        fingerprint: Option<&str>,
    ) -> Result<(Dataset, Vec<String>)> {
        changed::open_changed(spec, fingerprint)
    }

    /// The dataset with all files in it that exist now; the lock is extended by those that it did
    /// not know. They come after the earlier ones in every epoch, so a [`Cursor`] keeps its
    /// meaning. To be called where a stage begins.
    ///
    /// # Errors
    /// As [`Dataset::open`], and a lock that cannot be written.
    pub fn admit_new_files(&self) -> Result<Dataset> {
        open::admit(&self.inner.spec)
    }

    /// Files found on opening that the lock does not know.
    pub fn new_files(&self) -> &[PathBuf] {
        &self.inner.pending
    }

    /// Hash of everything but the seed that the data order depends on. It does not depend on where
    /// the files lie.
    pub fn fingerprint(&self) -> &str {
        &self.inner.fingerprint
    }

    /// Id that ends every document.
    pub fn eos_id(&self) -> u32 {
        self.inner.lock.eos_id
    }

    /// Hash of the tokenizer that wrote the shards (see [`crate::tokenizer::TextTokenizer::hash`]).
    pub fn tokenizer_hash(&self) -> &str {
        &self.inner.lock.tokenizer
    }

    /// The lock file.
    pub fn lock_path(&self) -> &Path {
        &self.inner.spec.lock
    }

    /// The sources' names, in the order of the spec.
    pub fn source_names(&self) -> Vec<&str> {
        self.inner
            .sources
            .iter()
            .map(|source| source.name.as_str())
            .collect()
    }

    /// The sources' weights as the spec has them.
    pub fn weights(&self) -> Vec<f64> {
        self.inner
            .spec
            .sources
            .iter()
            .map(|source| source.weight)
            .collect()
    }

    /// Figures per source.
    pub fn summary(&self) -> Vec<SourceSummary> {
        let summarise = |source: &Source| {
            let groups = || source.generations.iter().flatten();
            let mut shards: Vec<u32> = groups().map(|group| group.shard).collect();
            shards.dedup();
            SourceSummary {
                name: source.name.clone(),
                files: shards.len(),
                row_groups: groups().count(),
                documents: source.documents(),
                tokens: source.tokens(),
                validation_documents: groups().map(|g| g.validation_documents).sum(),
            }
        };
        self.inner.sources.iter().map(summarise).collect()
    }

    /// The beginning of all sources.
    pub fn start(&self) -> Cursor {
        let names = self.source_names();
        Cursor {
            sources: names.into_iter().map(SourceCursor::start).collect(),
        }
    }

    /// Samples of `seq_len` tokens from `cursor` on, mixed by `weights` (one per source, shares of
    /// tokens in any unit; a source of weight 0 stands still).
    ///
    /// # Errors
    /// Weights that are no shares, a cursor of another dataset, a source with weight but without
    /// documents, [`Error::SequenceTooLong`].
    pub fn stream(&self, cursor: &Cursor, seq_len: usize, weights: &[f64]) -> Result<Stream> {
        Stream::new(self, cursor, seq_len, weights)
    }

    /// The validation set, packed into samples of `seq_len` tokens, in an order that depends on
    /// neither seed nor training.
    pub fn validation(&self, seq_len: usize) -> ValidationSamples {
        ValidationSamples::new(self, seq_len)
    }

    /// Reads the tokens of a sample. May be called from several threads.
    ///
    /// # Errors
    /// Shards that are damaged or hold ids past the vocabulary, with the place.
    pub fn read(&self, index: &SampleIndex) -> Result<Sample> {
        sample::read(
            index,
            &self.inner.shards,
            &self.inner.cache,
            self.inner.spec.vocab_size,
        )
    }

    pub(crate) fn source_number(&self, name: &str) -> Option<usize> {
        self.inner
            .sources
            .iter()
            .position(|source| source.name == name)
    }

    pub(crate) fn max_epochs(&self, source: usize) -> f64 {
        self.inner.sources[source]
            .max_epochs
            .unwrap_or(f64::INFINITY)
    }

    pub(crate) fn epoch_tokens(&self, source: usize) -> u64 {
        self.inner.sources[source].tokens()
    }

    pub(crate) fn groups(&self, source: usize) -> &[Vec<Group>] {
        &self.inner.sources[source].generations
    }

    pub(crate) fn check_not_empty(&self, number: usize) -> Result<()> {
        let source = &self.inner.sources[number];
        if source.tokens() > 0 {
            return Ok(());
        }
        let detail = if source.generations.iter().all(Vec::is_empty) {
            "its files are newer than the dataset.lock and enter at the next stage".to_string()
        } else {
            format!(
                "all its documents fell to validation; lower validation.fraction ({})",
                self.inner.spec.validation_fraction
            )
        };
        Err(Error::EmptySource {
            source_name: source.name.clone(),
            detail,
        })
    }

    pub(crate) fn plan(&self, source: usize, epoch: u64) -> Arc<EpochPlan> {
        let spec = &self.inner.spec;
        Arc::new(self.inner.sources[source].plan(spec.seed, epoch, spec.window_tokens))
    }

    pub(crate) fn window(
        &self,
        source: usize,
        epoch: u64,
        number: u64,
    ) -> Result<Arc<WindowIndex>> {
        let plan = self.plan(source, epoch);
        let source = &self.inner.sources[source];
        let window = plan.windows.get(number as usize).ok_or_else(|| {
            let windows = plan.windows.len();
            Error::Cursor(format!(
                "window {number} of {windows} of source \"{}\"",
                source.name
            ))
        })?;
        let spec = &self.inner.spec;
        let shards = &self.inner.shards;
        let fraction = spec.validation_fraction;
        source
            .index(spec.seed, epoch, number, window, shards, fraction)
            .map(Arc::new)
    }

    pub(crate) fn validation_documents(&self, group: &Group) -> Result<Vec<Document>> {
        group.read(
            &self.inner.shards,
            self.inner.spec.validation_fraction,
            true,
        )
    }
}
