//! What saves leave behind that did not become checkpoints, and how it goes.

use std::fs;
use std::path::{Path, PathBuf};

use super::catalogue::list;
use super::disk::{self, sync_parent};
use super::manifest::{MANIFEST, Manifest};
use super::retention::delete;
use super::{Checkpoint, Error};

/// Removes what a save that failed has left in the folder `dir`, and the folder if nothing else is
/// in it. The rank that commits calls it, after its commit has failed or in place of it.
///
/// Other ranks may still be writing their parts: their next step fails, because the file they write
/// or the folder is gone, which is an error of a save that has failed anyway. A part that one of them
/// completes later stays until the next commit into the folder or [`remove_stale`]. Files of other
/// saves, files that a manifest lists, and folders whose manifest cannot be read are left alone.
/// Whatever cannot be removed stays and wastes space, nothing worse.
pub fn discard(dir: &Path, save_id: &str) {
    let keep = match Checkpoint::read_manifest(dir) {
        Ok(manifest) => manifest.files,
        Err(Error::NotACheckpoint { .. }) => Vec::new(),
        Err(_) => return,
    };
    remove_where(dir, |name| {
        is_of_save(name, save_id) && !keep.iter().any(|file| file.name == name)
    });
    // Fails while anything is in it, also what another rank has created this moment.
    if disk::remove_folder(dir).is_ok() {
        let _ = sync_parent(dir);
    }
}

/// Removes the files of saves that the manifest does not list: those of the checkpoint that it has
/// replaced, done files, and what unfinished saves have left. For after a commit.
pub(super) fn remove_unlisted(dir: &Path, manifest: &Manifest) {
    remove_where(dir, |name| {
        let of_a_save =
            name.starts_with("part-") || (name.starts_with('.') && name.ends_with(".partial"));
        of_a_save && !manifest.files.iter().any(|file| file.name == name)
    });
}

/// Deletes folders in `dir` that are named like checkpoints and have no manifest: saves that did
/// not finish, deletions that did not. `in_progress` is the folder of a save that is going on. Only
/// one process may call this, and only while it owns the run directory.
///
/// # Errors
/// A folder that cannot be listed or deleted.
pub fn remove_stale(dir: &Path, in_progress: Option<&Path>) -> Result<Vec<PathBuf>, Error> {
    let mut deleted = Vec::new();
    for (_, dir) in list(dir)? {
        // Anything else than a clear "not there" leaves the folder alone.
        let absent = matches!(dir.join(MANIFEST).try_exists(), Ok(false));
        if absent && Some(dir.as_path()) != in_progress {
            delete(&dir)?;
            deleted.push(dir);
        }
    }
    Ok(deleted)
}

/// Whether a file is a part, a done file, or the beginning of one, of this save.
fn is_of_save(name: &str, save_id: &str) -> bool {
    let name = name.strip_prefix('.').unwrap_or(name);
    let mut words = name.split('.');
    words.next().is_some_and(|word| word.starts_with("part-")) && words.next() == Some(save_id)
}

/// Removes files by name. One that stays behind is a waste of space and nothing worse, so it is
/// reported and not an error.
fn remove_where(dir: &Path, goes: impl Fn(&str) -> bool) {
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    for entry in entries.flatten() {
        if entry.file_name().to_str().is_some_and(&goes)
            && let Err(error) = disk::remove_file(&entry.path())
            && !error.is_not_found()
        {
            tracing::warn!("a leftover stays: {error}");
        }
    }
}
