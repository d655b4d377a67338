//! The checkpoints of a run: which there are, and which is the newest.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::manifest::MANIFEST;
use super::{Checkpoint, Error};

/// How hard to look at a checkpoint before calling it valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scrutiny {
    /// The manifest, and that all files are there with their sizes. Damage inside a file shows when
    /// it is read.
    Structure,
    /// Every byte of every file as well.
    Payload,
}

/// What [`newest_valid`] found.
#[derive(Debug)]
pub struct Newest {
    /// The newest checkpoint that can be used, if there is one.
    pub checkpoint: Option<Checkpoint>,
    /// Newer folders that cannot be used, newest first.
    pub rejected: Vec<Rejected>,
}

/// A folder that is named like a checkpoint and is none.
#[derive(Debug)]
pub struct Rejected {
    /// The folder.
    pub dir: PathBuf,
    /// Why it cannot be used.
    pub reason: Error,
}

/// The folder name of the checkpoint after `step` steps: `step-00000500`.
pub fn folder_name(step: u64) -> String {
    format!("step-{step:08}")
}

/// The folders in `dir` that are named like checkpoints, with their step, newest first. A `dir`
/// that does not exist has none.
pub(super) fn list(dir: &Path) -> Result<Vec<(u64, PathBuf)>, Error> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io("list", dir)(error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(Error::io("list", dir))?;
        let name = entry.file_name();
        let step = name
            .to_str()
            .and_then(|name| name.strip_prefix("step-")?.parse().ok());
        if let Some(step) = step
            && name.to_str() == Some(&folder_name(step))
            && entry.path().is_dir()
        {
            found.push((step, entry.path()));
        }
    }
    found.sort_unstable_by_key(|(step, _)| std::cmp::Reverse(*step));
    Ok(found)
}

/// Opens a checkpoint of step `step` and looks at it as hard as asked.
pub(super) fn inspect(step: u64, dir: &Path, scrutiny: Scrutiny) -> Result<Checkpoint, Error> {
    let checkpoint = Checkpoint::open(dir)?;
    let stated = checkpoint.meta().step;
    if stated != step {
        let detail = format!("the manifest is of step {stated}; the folder was renamed");
        return Err(Error::ManifestInvalid {
            path: dir.join(MANIFEST),
            detail,
        });
    }
    if scrutiny == Scrutiny::Payload {
        checkpoint.verify(&mut |_, _| {})?;
    }
    Ok(checkpoint)
}

/// Finds the newest valid checkpoint in the folder `dir` of a run's checkpoints.
///
/// # Errors
/// The folder cannot be listed. A checkpoint that cannot be used is not an error here: it is in
/// [`Newest::rejected`], and the caller tells the user.
pub fn newest_valid(dir: &Path, scrutiny: Scrutiny) -> Result<Newest, Error> {
    newest_valid_before(dir, u64::MAX, scrutiny)
}

/// The same among the checkpoints of steps before `before`: for a run that goes back, or that has
/// found a newer one damaged.
///
/// # Errors
/// As [`newest_valid`].
pub fn newest_valid_before(dir: &Path, before: u64, scrutiny: Scrutiny) -> Result<Newest, Error> {
    let mut newest = Newest {
        checkpoint: None,
        rejected: Vec::new(),
    };
    let earlier = list(dir)?.into_iter().filter(|(step, _)| *step < before);
    for (step, dir) in earlier {
        match inspect(step, &dir, scrutiny) {
            Ok(checkpoint) => {
                newest.checkpoint = Some(checkpoint);
                break;
            }
            Err(reason) => newest.rejected.push(Rejected { dir, reason }),
        }
    }
    Ok(newest)
}

/// Opens what a user may mean by a checkpoint: its folder, a run directory, or a run's folder of
/// checkpoints; of the latter two the newest valid one.
///
/// # Errors
/// There is none, with the reason of each folder that was rejected.
pub fn find(path: &Path) -> Result<Checkpoint, Error> {
    if path.join(MANIFEST).is_file() || !path.is_dir() {
        return Checkpoint::open(path);
    }
    let inner = path.join("checkpoints");
    let dir = if inner.is_dir() {
        inner
    } else {
        path.to_owned()
    };
    let newest = newest_valid(&dir, Scrutiny::Structure)?;
    newest.checkpoint.ok_or_else(|| {
        let reasons: Vec<String> = newest
            .rejected
            .iter()
            .map(|rejected| rejected.reason.to_string())
            .collect();
        let reason = if reasons.is_empty() {
            "it has no manifest.json, and there is no checkpoint `step-…` in it".to_owned()
        } else {
            format!(
                "none of the checkpoints in it can be used: {}",
                reasons.join("; ")
            )
        };
        Error::NotACheckpoint {
            dir: path.to_owned(),
            reason,
        }
    })
}
