//! Opening a dataset: finding its files and holding them against the lock.

use crate::atomic;
use crate::cache::RowGroupCache;
use crate::changed;
use crate::dataset::{Dataset, DatasetSpec, Inner};
use crate::error::{Error, Result};
use crate::lock::{Lock, LockFile};
use crate::order::{Group, Source};
use crate::shard::Shard;
use rayon::prelude::*;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Least number of decoded tokens to keep, whatever the window (64 MB).
const LEAST_CACHE_TOKENS: usize = 1 << 24;

/// The shards of one source that exist now, in the order of their paths.
struct Found {
    name: String,
    shards: Vec<Arc<Shard>>,
}

/// [`Dataset::open`] and [`Dataset::open_at`].
pub(crate) fn open(spec: &DatasetSpec, fingerprint: Option<&str>) -> Result<Dataset> {
    let found = find(spec)?;
    let lock = if spec.lock.exists() {
        Lock::load(&spec.lock)?
    } else {
        let mut lock = new_lock(spec, &found)?;
        let all: Vec<(String, Vec<&Shard>)> = found
            .iter()
            .map(|source| {
                (
                    source.name.clone(),
                    source.shards.iter().map(Arc::as_ref).collect(),
                )
            })
            .collect();
        lock.admit(&spec.lock, &all)?;
        lock.save(&spec.lock)?;
        lock
    };
    let generations = match fingerprint {
        None => lock.generations,
        Some(wanted) => (1..=lock.generations)
            .find(|&generations| lock.fingerprint(generations) == wanted)
            .ok_or_else(|| Error::LockMismatch {
                lock: spec.lock.clone(),
                differences: foreign(spec, &lock, wanted, &found),
            })?,
    };
    assemble(spec, lock, generations, found)
}

/// [`Dataset::admit_new_files`].
pub(crate) fn admit(spec: &DatasetSpec) -> Result<Dataset> {
    let dataset = open(spec, None)?;
    if dataset.new_files().is_empty() {
        return Ok(dataset);
    }
    let found = find(spec)?;
    let new: Vec<(String, Vec<&Shard>)> = found
        .iter()
        .map(|source| {
            let is_new = |shard: &&Shard| dataset.new_files().iter().any(|p| p == shard.path());
            let shards = source
                .shards
                .iter()
                .map(Arc::as_ref)
                .filter(is_new)
                .collect();
            (source.name.clone(), shards)
        })
        .filter(|(_, shards): &(String, Vec<&Shard>)| !shards.is_empty())
        .collect();
    let mut lock = dataset.inner.lock.clone();
    lock.admit(&spec.lock, &new)?;
    lock.save(&spec.lock)?;
    open(spec, None)
}

/// Files, folders and patterns to the shards that they name, sorted, each once. A `dataset.lock`
/// stands for its files.
///
/// # Errors
/// A malformed pattern, a path that names no file, or an unreadable lock.
pub fn resolve(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut files = BTreeSet::new();
    for path in paths {
        let text = path.to_string_lossy();
        let named: Vec<PathBuf> = if path.exists() {
            vec![path.clone()]
        } else {
            let pattern = glob::glob(&text).map_err(|e| Error::Option {
                option: "path",
                problem: format!("\"{text}\" is not a valid pattern ({e})"),
            })?;
            pattern.filter_map(std::result::Result::ok).collect()
        };
        let mut found = Vec::new();
        for path in named {
            found.extend(expand(path)?);
        }
        if found.is_empty() {
            return Err(Error::EmptyCorpus(format!(
                "\"{text}\" names no Parquet shard; write shards with `oxitron data tokenize` or \
                 correct the path"
            )));
        }
        files.extend(found);
    }
    Ok(files.into_iter().collect())
}

/// A folder to the shards directly inside, a lock to its files, a file to itself.
fn expand(path: PathBuf) -> Result<Vec<PathBuf>> {
    let has_extension = |path: &Path, wanted: &str| path.extension().is_some_and(|e| e == wanted);
    if path.is_dir() {
        let entries = std::fs::read_dir(&path).map_err(Error::io("list", &path))?;
        let files = entries.map(|entry| Ok(entry.map_err(Error::io("list", &path))?.path()));
        let files = files.collect::<Result<Vec<_>>>()?;
        return Ok(files
            .into_iter()
            .filter(|file| has_extension(file, "parquet"))
            .collect());
    }
    if has_extension(&path, "lock") {
        return Ok(Lock::load(&path)?.paths(&path));
    }
    Ok(vec![path])
}

fn find(spec: &DatasetSpec) -> Result<Vec<Found>> {
    let option = |option, problem: String| Err(Error::Option { option, problem });
    if spec.sources.is_empty() {
        return option(
            "data.source",
            "there is none; add a [[data.source]]".to_string(),
        );
    }
    for (number, source) in spec.sources.iter().enumerate() {
        if spec.sources[..number]
            .iter()
            .any(|other| other.name == source.name)
        {
            return option("data.source", format!("two are named \"{}\"", source.name));
        }
    }
    if spec.window_tokens == 0 {
        return option("data.window_tokens", "must be at least 1".to_string());
    }
    if !(0.0..1.0).contains(&spec.validation_fraction) {
        let problem = format!("{} is not in 0 ≤ fraction < 1", spec.validation_fraction);
        return option("validation.fraction", problem);
    }
    let found = spec.sources.iter().map(|source| {
        let shards = resolve(&source.paths)?
            .par_iter()
            .map(|path| Shard::open(path).map(Arc::new))
            .collect::<Result<Vec<_>>>()?;
        Ok(Found {
            name: source.name.clone(),
            shards,
        })
    });
    let found = found.collect::<Result<Vec<_>>>()?;
    check_headers(spec, &found)?;
    Ok(found)
}

/// One tokenizer for all shards, and none whose ids the model does not know.
fn check_headers(spec: &DatasetSpec, found: &[Found]) -> Result<()> {
    let mut shards = found.iter().flat_map(|source| &source.shards);
    let Some(first) = shards.clone().next() else {
        return Ok(());
    };
    if let Some(shard) = shards.find(|shard| shard.header() != first.header()) {
        return Err(Error::TokenizerMismatch {
            path: shard.path().to_path_buf(),
            found: describe(shard),
            other: first.path().to_path_buf(),
            expected: describe(first),
        });
    }
    if first.header().vocab_size > spec.vocab_size {
        return Err(Error::VocabularyMismatch {
            path: first.path().to_path_buf(),
            file_vocab_size: first.header().vocab_size,
            vocab_size: spec.vocab_size,
        });
    }
    Ok(())
}

fn describe(shard: &Shard) -> String {
    let header = shard.header();
    format!(
        "{} ({} ids, eos {})",
        header.tokenizer, header.vocab_size, header.eos_id
    )
}

fn new_lock(spec: &DatasetSpec, found: &[Found]) -> Result<Lock> {
    let first = found
        .iter()
        .flat_map(|source| &source.shards)
        .next()
        .ok_or_else(|| {
            Error::EmptyCorpus("the sources name no shards; check data.source.path".to_string())
        })?;
    Ok(Lock::new(
        spec.window_tokens,
        spec.validation_fraction,
        first.header(),
    ))
}

/// What is known of the difference between the data and those of a run that the lock does not know.
fn foreign(spec: &DatasetSpec, lock: &Lock, wanted: &str, found: &[Found]) -> Vec<String> {
    let mut lines = vec![format!(
        "the run was trained on a dataset with fingerprint {wanted}; this one has {}",
        lock.fingerprint(lock.generations)
    )];
    let Some((path, before, generations)) = changed::lock_set_aside(&spec.lock, wanted) else {
        lines.push(
            "its lock is not there any more, so what differs cannot be told: put a copy of it in \
             this one's place to see it"
                .to_owned(),
        );
        return lines;
    };
    lines.push(format!("its lock was {}; since then:", path.display()));
    lines.extend(parameter_differences(spec, &before, found));
    for source in found {
        let mut unmatched: Vec<_> = source.shards.iter().cloned().map(Some).collect();
        let locked = before.sources.iter().filter(|s| s.name == source.name);
        for file in locked.flat_map(|source| &source.files) {
            let matched = take_match(&spec.lock, file, &mut unmatched);
            if file.generation < generations
                && let Err(difference) = matched
            {
                lines.push(format!("source \"{}\": {difference}", source.name));
            }
        }
        lines.extend(unmatched.into_iter().flatten().map(|shard| {
            let path = shard.path().display();
            format!("source \"{}\": {path} was added", source.name)
        }));
    }
    lines
}

/// Matches the files that exist with those of the lock and puts the dataset together.
fn assemble(
    spec: &DatasetSpec,
    lock: Lock,
    generations: u32,
    found: Vec<Found>,
) -> Result<Dataset> {
    let mut differences = parameter_differences(spec, &lock, &found);
    let mut sources: Vec<Source> = Vec::new();
    let mut shards: Vec<Arc<Shard>> = Vec::new();
    let mut pending = Vec::new();
    for (found, source_spec) in found.into_iter().zip(&spec.sources) {
        let mut source = Source {
            name: found.name.clone(),
            max_epochs: source_spec.max_epochs,
            generations: vec![Vec::new(); generations as usize],
        };
        let mut unmatched: Vec<Option<Arc<Shard>>> = found.shards.into_iter().map(Some).collect();
        let locked = lock.sources.iter().find(|s| s.name == found.name);
        for file in locked.iter().flat_map(|source| &source.files) {
            match take_match(&spec.lock, file, &mut unmatched) {
                Err(difference) => {
                    differences.push(format!("source \"{}\": {difference}", found.name));
                }
                Ok(shard) if file.generation < generations => {
                    let number = shards.len() as u32;
                    source.generations[file.generation as usize].extend(groups(number, file));
                    shards.push(shard);
                }
                Ok(_) => {}
            }
        }
        pending.extend(
            unmatched
                .into_iter()
                .flatten()
                .map(|shard| shard.path().to_path_buf()),
        );
        sources.push(source);
    }
    if !differences.is_empty() {
        return Err(Error::LockMismatch {
            lock: spec.lock.clone(),
            differences,
        });
    }
    // Two windows per source: the current one and, around its edge, the next.
    let largest_group = lock
        .sources
        .iter()
        .flat_map(|s| &s.files)
        .flat_map(|f| &f.tokens)
        .max();
    let window = spec.window_tokens as usize + largest_group.copied().unwrap_or(0) as usize;
    let cache = RowGroupCache::new((2 * window * sources.len()).max(LEAST_CACHE_TOKENS));
    let fingerprint = lock.fingerprint(generations);
    let spec = spec.clone();
    let inner = Inner {
        spec,
        lock,
        fingerprint,
        sources,
        shards,
        pending,
        cache,
    };
    let dataset = Dataset {
        inner: Arc::new(inner),
    };
    for (number, source) in dataset.inner.sources.iter().enumerate() {
        if source.generations.iter().any(|groups| !groups.is_empty()) {
            dataset.check_not_empty(number)?;
        }
    }
    Ok(dataset)
}

/// What the config says against what the lock was built with.
fn parameter_differences(spec: &DatasetSpec, lock: &Lock, found: &[Found]) -> Vec<String> {
    let mut differences = Vec::new();
    if lock.window_tokens != spec.window_tokens {
        differences.push(format!(
            "data.window_tokens {} → {}",
            lock.window_tokens, spec.window_tokens
        ));
    }
    if lock.validation_fraction != spec.validation_fraction {
        differences.push(format!(
            "validation.fraction {} → {}",
            lock.validation_fraction, spec.validation_fraction
        ));
    }
    let header = found
        .iter()
        .flat_map(|s| &s.shards)
        .next()
        .map(|shard| shard.header());
    if let Some(header) = header
        && (header.tokenizer != lock.tokenizer || header.eos_id != lock.eos_id)
    {
        differences.push(format!(
            "tokenizer {} → {}",
            lock.tokenizer, header.tokenizer
        ));
    }
    for source in &lock.sources {
        if !spec.sources.iter().any(|s| s.name == source.name) {
            differences.push(format!(
                "source \"{}\" is no longer in the config",
                source.name
            ));
        }
    }
    differences
}

/// The shard that is the locked `file`: the one at its path, or else one with the same contents
/// elsewhere. The difference in words if there is none.
fn take_match(
    lock_path: &Path,
    file: &LockFile,
    unmatched: &mut [Option<Arc<Shard>>],
) -> std::result::Result<Arc<Shard>, String> {
    let path = atomic::parent(lock_path).join(&file.path);
    let here = std::fs::canonicalize(&path).ok();
    let at_path =
        |shard: &Shard| here.is_some() && std::fs::canonicalize(shard.path()).ok() == here;
    let same = |shard: &Shard| file.differences(shard).is_empty();
    let slot = unmatched
        .iter()
        .position(|slot| slot.as_deref().is_some_and(at_path))
        .or_else(|| {
            unmatched
                .iter()
                .position(|slot| slot.as_deref().is_some_and(same))
        });
    let shard = slot.and_then(|slot| unmatched[slot].take());
    let Some(shard) = shard else {
        return Err(format!("{} is missing", file.path.display()));
    };
    let differences = file.differences(&shard);
    if differences.is_empty() {
        Ok(shard)
    } else {
        Err(format!(
            "{} changed: {}",
            file.path.display(),
            differences.join(", ")
        ))
    }
}

/// The row groups of a locked file, to train on.
fn groups(shard: u32, file: &LockFile) -> impl Iterator<Item = Group> + '_ {
    (0..file.documents.len()).map(move |group| Group {
        shard,
        row_group: group as u32,
        documents: file.documents[group].saturating_sub(file.validation_documents[group]),
        tokens: file.tokens[group].saturating_sub(file.validation_tokens[group]),
        validation_documents: file.validation_documents[group],
    })
}
