//! Data that are not those that a run was trained on: what differs, and going on all the same.
//!
//! A changed file, or one that is gone or has come in the middle, makes another order of everything.
//! A run is not resumed on it unless its user says so. Then a lock is built from the files as they
//! are, the old one stays beside it as `dataset.lock.replaced-1` (`-2`, …), and the run goes on at
//! the same numbers of epoch and window ([`Cursor::fitted`](crate::Cursor::fitted)): some documents
//! may come again and others never.

use crate::atomic;
use crate::dataset::{Dataset, DatasetSpec};
use crate::error::{Error, Result};
use crate::lock::Lock;
use crate::open;
use std::path::{Path, PathBuf};

/// [`Dataset::open_changed`].
pub(crate) fn open_changed(
    spec: &DatasetSpec,
    fingerprint: Option<&str>,
) -> Result<(Dataset, Vec<String>)> {
    let mut differences = match open::open(spec, fingerprint) {
        Ok(dataset) => return Ok((dataset, Vec::new())),
        Err(Error::LockMismatch { differences, .. }) => differences,
        Err(other) => return Err(other),
    };
    // The lock may fit the files all the same, when it is the run that knew another one.
    let dataset = match open::open(spec, None) {
        Err(Error::LockMismatch {
            differences: more, ..
        }) => {
            differences.extend(more);
            set_aside(&spec.lock)?;
            open::open(spec, None)?
        }
        other => other?,
    };
    let mut seen = std::collections::HashSet::new();
    differences.retain(|line| seen.insert(line.clone()));
    Ok((dataset, differences))
}

/// The lock of a dataset with this fingerprint among those that were set aside, and its number of
/// generations then.
pub(crate) fn lock_set_aside(lock: &Path, fingerprint: &str) -> Option<(PathBuf, Lock, u32)> {
    let paths = (1..).map(|number| name_aside(lock, number));
    paths.take_while(|path| path.exists()).find_map(|path| {
        let lock = Lock::load(&path).ok()?;
        let fits = |&generations: &u32| lock.fingerprint(generations) == fingerprint;
        let generations = (1..=lock.generations).find(fits)?;
        Some((path, lock, generations))
    })
}

/// Makes room for a lock, and keeps the one that is there.
fn set_aside(lock: &Path) -> Result<()> {
    let free = (1..).map(|number| name_aside(lock, number));
    // There is always a number that no file has.
    let Some(free) = free.into_iter().find(|path| !path.exists()) else {
        return Ok(());
    };
    std::fs::rename(lock, &free).map_err(Error::io("rename", lock))?;
    atomic::sync_folder(&atomic::parent(lock))
}

/// `dataset.lock.replaced-1`.
fn name_aside(lock: &Path, number: u32) -> PathBuf {
    let mut name = lock.as_os_str().to_owned();
    name.push(format!(".replaced-{number}"));
    PathBuf::from(name)
}
