//! Which checkpoints of a run may go, and how they go.

use std::path::{Path, PathBuf};

use super::catalogue::{Scrutiny, inspect, list};
use super::disk::{self, sync_folder, sync_parent};
use super::manifest::{MANIFEST, Purpose};
use super::{Checkpoint, Error};

/// How many checkpoints of a run stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// So many of the newest [`Purpose::Regular`] and [`Purpose::StageEnd`] ones stay.
    pub keep: usize,
    /// Those whose step is a multiple of this stay for good, whatever they were saved for.
    pub keep_every: Option<u64>,
}

impl Retention {
    /// Whether a checkpoint stays for good.
    fn is_for_good(&self, checkpoint: &Checkpoint) -> bool {
        let meta = checkpoint.meta();
        meta.purpose == Purpose::StageEnd
            || self
                .keep_every
                .is_some_and(|every| meta.step.is_multiple_of(every))
    }
}

/// Whether checkpoints of a purpose count towards [`Retention::keep`]. The others are there to go on
/// from, and have done their part as soon as there is a newer one.
fn rotates(purpose: Purpose) -> bool {
    match purpose {
        Purpose::Regular | Purpose::StageEnd => true,
        Purpose::Ephemeral | Purpose::Stop => false,
    }
}

/// Deletes the valid checkpoints in `dir` that the policy does not keep, and returns what was
/// deleted. The newest valid one always stays. Folders that are not valid, at the depth of
/// `scrutiny`, are not counted, and are not touched where a valid one would have stayed: a damaged
/// checkpoint is evidence, an unfinished one is the business of
/// [`remove_stale`](super::remove_stale).
///
/// # Errors
/// A folder that cannot be listed or deleted.
pub fn retain(dir: &Path, policy: &Retention, scrutiny: Scrutiny) -> Result<Vec<PathBuf>, Error> {
    let mut has_newer = false;
    let mut kept = 0;
    let mut deleted = Vec::new();
    for (step, dir) in list(dir)? {
        let Ok(checkpoint) = inspect(step, &dir, Scrutiny::Structure) else {
            continue;
        };
        let rotates = rotates(checkpoint.meta().purpose);
        let stays =
            !has_newer || policy.is_for_good(&checkpoint) || (rotates && kept < policy.keep);
        if !stays {
            delete(&dir)?;
            deleted.push(dir);
            continue;
        }
        // What goes need not be sound, only what stays in its stead.
        if scrutiny == Scrutiny::Payload && checkpoint.verify(&mut |_, _| {}).is_err() {
            continue;
        }
        has_newer = true;
        kept += usize::from(rotates);
    }
    Ok(deleted)
}

/// Takes a run back: deletes everything in `dir` that is named like a checkpoint of a step after
/// `after_step`, valid or not, and returns what was deleted. The run then goes on from the newest
/// valid checkpoint of `after_step` or before.
///
/// The newest goes first, each with its manifest first. Wherever this is cut short, what is left is
/// a beginning of the abandoned branch: a state that the run has been in, from which it can go on
/// and come to the same decision again. A damaged checkpoint goes as well: were its damage a passing
/// error of the file system, it would come back as the newest.
///
/// Whoever also changes the checkpoint that the run goes back to (with [`amend`](super::amend()), to
/// tell it which samples to skip) does so first. Only the process that owns the run directory may
/// call this, and only while no save is under way.
///
/// # Errors
/// There is no valid checkpoint to go back to (nothing is deleted then); a folder that cannot be
/// listed or deleted.
pub fn retire(dir: &Path, after_step: u64) -> Result<Vec<PathBuf>, Error> {
    let (abandoned, before): (Vec<_>, Vec<_>) = list(dir)?
        .into_iter()
        .partition(|(step, _)| *step > after_step);
    let is_valid = |(step, dir): &(u64, PathBuf)| inspect(*step, dir, Scrutiny::Structure).is_ok();
    if !before.iter().any(is_valid) {
        return Err(Error::NotACheckpoint {
            dir: dir.to_owned(),
            reason: format!(
                "it has no valid checkpoint of step {after_step} or before to go back to; nothing \
                 was deleted"
            ),
        });
    }
    let mut deleted = Vec::new();
    // Newest first, as listed.
    for (_, dir) in abandoned {
        delete(&dir)?;
        deleted.push(dir);
    }
    Ok(deleted)
}

/// Takes a checkpoint whose payload is damaged out of the run: its folder gets the name
/// `damaged-step-…` and stays as evidence. Under its own name it would look valid to whoever does not
/// read its payload, and newer than the checkpoints that the run goes on to write.
///
/// # Errors
/// A folder that cannot be renamed.
pub fn set_aside(dir: &Path) -> Result<PathBuf, Error> {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    let free = |number: usize| {
        let suffix = if number == 0 {
            String::new()
        } else {
            format!("-{number}")
        };
        dir.with_file_name(format!("damaged-{name}{suffix}"))
    };
    let mut number = 0;
    while free(number).exists() {
        number += 1;
    }
    let aside = free(number);
    disk::rename(dir, &aside)?;
    sync_parent(&aside)?;
    Ok(aside)
}

/// Deletes a checkpoint. The manifest goes first, durably: a deletion cut short leaves a folder that
/// is no checkpoint, never a checkpoint that lacks files.
///
/// # Errors
/// A file or folder that cannot be deleted.
pub fn delete(dir: &Path) -> Result<(), Error> {
    match disk::remove_file(&dir.join(MANIFEST)) {
        Ok(()) => sync_folder(dir)?,
        Err(error) if error.is_not_found() => {}
        Err(error) => return Err(error),
    }
    disk::remove_tree(dir)?;
    sync_parent(dir)
}
