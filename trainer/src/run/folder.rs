//! The run directory.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use super::RunError;

/// A run directory held by this process.
///
/// The lock lives as long as the value; the system releases it when the process dies, however it
/// dies, so a run that was killed can be resumed at once.
#[derive(Debug)]
pub(super) struct RunFolder {
    path: PathBuf,
    _lock: File,
}

impl RunFolder {
    /// Makes the directory where needed and locks it.
    pub(super) fn lock(path: &Path) -> Result<Self, RunError> {
        fs::create_dir_all(path).map_err(RunError::io(path, "create the run directory"))?;
        let lock_path = path.join("lock");
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&lock_path)
            .map_err(RunError::io(&lock_path, "create the lock file"))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self {
                path: path.to_owned(),
                _lock: lock,
            }),
            Err(TryLockError::WouldBlock) => Err(RunError::Locked {
                run_dir: path.to_owned(),
            }),
            Err(TryLockError::Error(source)) => Err(RunError::Io {
                path: lock_path,
                action: "lock",
                source,
            }),
        }
    }

    /// Replaces `config.toml` by the resolved configuration of this attempt.
    pub(super) fn write_config(&self, text: &str) -> Result<(), RunError> {
        let path = self.path.join("config.toml");
        let write = || {
            let mut file = tempfile::NamedTempFile::new_in(&self.path)?;
            std::io::Write::write_all(&mut file, text.as_bytes())?;
            file.as_file().sync_all()?;
            file.persist(&path)?;
            Ok(())
        };
        write().map_err(|source| RunError::Io {
            path: path.clone(),
            action: "write",
            source,
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_run_directory_is_held_once() {
        let folder = tempfile::tempdir().unwrap();
        let held = RunFolder::lock(folder.path()).unwrap();
        let error = RunFolder::lock(folder.path()).unwrap_err();
        assert!(matches!(error, RunError::Locked { .. }), "{error}");
        drop(held);
        RunFolder::lock(folder.path()).unwrap();
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        let error = RunFolder::lock(&file.join("run")).unwrap_err().to_string();
        assert!(
            error.contains("file/run: cannot create the run directory"),
            "{error}"
        );
    }
}
