//! Reading every byte of a dataset and holding it against what is written about it.

use crate::atomic;
use crate::error::{Error, Result};
use crate::lock::Lock;
use crate::open::resolve;
use crate::progress::Progress;
use crate::shard::Shard;
use rayon::prelude::*;
use std::path::{Path, PathBuf};

/// What [`verify`] found.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Verification {
    /// Shards that were read.
    pub files: usize,
    /// Documents in them.
    pub documents: u64,
    /// Tokens in them.
    pub tokens: u64,
    /// Everything that is wrong, each with its place.
    pub problems: Vec<String>,
}

/// Decodes every row group of the shards that `paths` name and checks digests, counts, the range of
/// ids and that documents end with the end-of-text id. A path that is a `dataset.lock` stands for
/// its files, which are also compared with it.
///
/// # Errors
/// Paths that name nothing. What is wrong with files is in the answer, so that one bad file does
/// not hide the others.
pub fn verify(paths: &[PathBuf], progress: &Progress) -> Result<Verification> {
    let mut found = Verification::default();
    let mut files = Vec::new();
    for path in paths {
        if path
            .extension()
            .is_some_and(|extension| extension == "lock")
        {
            files.extend(files_of_lock(path, &mut found.problems)?);
        } else {
            files.extend(resolve(std::slice::from_ref(path))?);
        }
    }
    files.sort();
    files.dedup();
    let mut shards = Vec::new();
    for file in &files {
        match Shard::open(file) {
            Ok(shard) => shards.push(shard),
            Err(error) => found.problems.push(error.to_string()),
        }
    }
    found.files = files.len();
    found.documents = shards.iter().map(Shard::documents).sum();
    found.tokens = shards.iter().map(Shard::tokens).sum();
    let row_groups: Vec<(&Shard, usize)> = shards
        .iter()
        .flat_map(|s| (0..s.row_groups().len()).map(move |g| (s, g)))
        .collect();
    let problems = row_groups.par_iter().flat_map_iter(|(shard, group)| {
        let problems = check(shard, *group);
        progress.add(shard.size_bytes() / shard.row_groups().len().max(1) as u64);
        problems
    });
    found.problems.extend(problems.collect::<Vec<String>>());
    Ok(found)
}

/// The files of a lock; differences go to `problems`.
fn files_of_lock(lock_path: &Path, problems: &mut Vec<String>) -> Result<Vec<PathBuf>> {
    let lock = Lock::load(lock_path)?;
    let mut files = Vec::new();
    for file in lock.sources.iter().flat_map(|source| &source.files) {
        let path = atomic::parent(lock_path).join(&file.path);
        let differences = match Shard::open(&path) {
            Ok(shard) => file.differences(&shard),
            // Opened again, and reported, with the other files.
            Err(_) => Vec::new(),
        };
        if !differences.is_empty() {
            problems.push(format!(
                "{} differs from {}: {}",
                path.display(),
                lock_path.display(),
                differences.join(", ")
            ));
        }
        files.push(path);
    }
    Ok(files)
}

/// Everything that is wrong with one row group.
fn check(shard: &Shard, group: usize) -> Vec<String> {
    let mut problems = Vec::new();
    if let Err(error) = shard.read_index(group, true) {
        problems.push(error.to_string());
    }
    match shard.read_tokens(group, shard.header().vocab_size) {
        Err(error) => problems.push(error.to_string()),
        Ok(tokens) => {
            let eos = shard.header().eos_id;
            let unended =
                (0..tokens.documents()).find(|&row| tokens.document(row).last() != Some(&eos));
            if let Some(row) = unended {
                let problem = format!("the document does not end with the end-of-text id {eos}");
                let path = shard.path().to_path_buf();
                problems.push(
                    Error::Row {
                        path,
                        row_group: group,
                        row,
                        problem,
                    }
                    .to_string(),
                );
            }
        }
    }
    problems
}
