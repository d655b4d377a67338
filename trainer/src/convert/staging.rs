//! Output folders that appear only when they are complete.

use std::fs;
use std::path::{Path, PathBuf};

use super::Error;
use crate::checkpoint::Error as CheckpointError;
use crate::checkpoint::disk::{create_folder, sync_folder};

/// A folder under a temporary name beside its destination. Dropping it removes it.
pub(super) struct StagedFolder {
    partial: PathBuf,
    out: PathBuf,
    published: bool,
}

impl StagedFolder {
    /// Starts a folder that will become `out`, which must not exist or be an empty folder.
    pub(super) fn create(out: &Path) -> Result<Self, Error> {
        let exists = || Error::OutputExists {
            path: out.to_owned(),
        };
        if out.is_dir() {
            let mut entries = fs::read_dir(out).map_err(CheckpointError::io("list", out))?;
            if entries.next().is_some() {
                return Err(exists());
            }
        } else if out.symlink_metadata().is_ok() {
            return Err(exists());
        }
        let Some(name) = out.file_name() else {
            return Err(exists());
        };
        let parent = match out.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        create_folder(parent)?;
        let mut partial_name = std::ffi::OsString::from(".");
        partial_name.push(name);
        partial_name.push(format!(".partial-{}", std::process::id()));
        let partial = parent.join(partial_name);
        if partial.exists() {
            // Left by a process of the same id that was killed.
            fs::remove_dir_all(&partial).map_err(CheckpointError::io("delete", &partial))?;
        }
        fs::create_dir(&partial).map_err(CheckpointError::io("create", &partial))?;
        Ok(Self {
            partial,
            out: out.to_owned(),
            published: false,
        })
    }

    /// The folder to write into.
    pub(super) fn path(&self) -> &Path {
        &self.partial
    }

    /// Gives the folder its name, durably.
    pub(super) fn publish(mut self) -> Result<(), Error> {
        sync_folder(&self.partial)?;
        fs::rename(&self.partial, &self.out)
            .map_err(CheckpointError::io("rename a folder to", &self.out))?;
        self.published = true;
        if let Some(parent) = self.partial.parent() {
            sync_folder(parent)?;
        }
        Ok(())
    }
}

impl Drop for StagedFolder {
    fn drop(&mut self) {
        if !self.published {
            // Nothing to report to: the error that ended the writing is on its way already.
            let _ = fs::remove_dir_all(&self.partial);
        }
    }
}
