//! Every change that a checkpoint makes on disk, one function each.
//!
//! Reading is elsewhere. What changes a file or folder is here and nowhere else, for two reasons:
//! the points at which a test lets it fail or kills the process ([`crate::faults`]) are complete,
//! and the tests of this module can record all changes of a save and look at every state in which a
//! power cut may leave the disk (`tests/crash_states.rs`).
//!
//! The functions do what their names say and nothing more. Which of them in which order make a save
//! durable is the business of [`super::durable`], [`super::save`] and [`super::catalogue`].

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::Error;
#[cfg(test)]
use super::tests::trace::{self, Change};
use crate::faults;

/// Whether a write is made in two halves, so that a fault fits in between.
const IN_HALVES: bool = cfg!(any(test, feature = "faults"));

/// The names of the points before and after an operation.
macro_rules! around {
    ($operation:literal) => {
        [
            concat!("disk::", $operation, "::before"),
            concat!("disk::", $operation, "::after"),
        ]
    };
}

/// A point at which an operation can fail.
#[inline]
fn point(name: &str) -> io::Result<()> {
    #[cfg(test)]
    trace::visit(name)?;
    faults::fail_at(name)
}

/// Makes a change between its two points.
#[inline]
fn change<T>(
    [before, after]: [&str; 2],
    operation: impl FnOnce() -> io::Result<T>,
    #[cfg(test)] done: Change,
) -> io::Result<T> {
    point(before)?;
    let value = operation()?;
    #[cfg(test)]
    trace::record(done);
    point(after)?;
    Ok(value)
}

/// A new file. Nothing of it is durable before [`NewFile::sync`], and its name not before
/// [`sync_folder`].
#[derive(Debug)]
pub(crate) struct NewFile {
    path: PathBuf,
    file: File,
}

impl NewFile {
    /// Creates the file, or empties it.
    pub(crate) fn create(path: &Path) -> Result<Self, Error> {
        let file = change(
            around!("create_file"),
            || File::create(path),
            #[cfg(test)]
            Change::CreateFile(path.to_owned()),
        )
        .map_err(Error::io("create", path))?;
        Ok(Self {
            path: path.to_owned(),
            file,
        })
    }

    /// Appends bytes.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.write_halves(bytes)
            .map_err(Error::io("write", &self.path))
    }

    fn write_halves(&mut self, bytes: &[u8]) -> io::Result<()> {
        let [before, after] = around!("write");
        point(before)?;
        let middle = if IN_HALVES {
            bytes.len() / 2
        } else {
            bytes.len()
        };
        for (number, half) in [&bytes[..middle], &bytes[middle..]].into_iter().enumerate() {
            if number == 1 && IN_HALVES {
                point("disk::write::within")?;
            }
            self.file.write_all(half)?;
            #[cfg(test)]
            trace::record(Change::Write(self.path.clone(), half.to_vec()));
        }
        point(after)
    }

    /// Makes the bytes durable.
    pub(crate) fn sync(&self) -> Result<(), Error> {
        change(
            around!("sync_file"),
            || self.file.sync_all(),
            #[cfg(test)]
            Change::SyncFile(self.path.clone()),
        )
        .map_err(Error::io("sync", &self.path))
    }
}

/// Gives a file another name in its folder, in place of whatever had that name.
pub(crate) fn rename(from: &Path, to: &Path) -> Result<(), Error> {
    change(
        around!("rename"),
        || fs::rename(from, to),
        #[cfg(test)]
        Change::Rename(from.to_owned(), to.to_owned()),
    )
    .map_err(Error::io("rename a file to", to))
}

/// Removes a file.
pub(crate) fn remove_file(path: &Path) -> Result<(), Error> {
    change(
        around!("remove_file"),
        || fs::remove_file(path),
        #[cfg(test)]
        Change::RemoveFile(path.to_owned()),
    )
    .map_err(Error::io("delete", path))
}

/// Removes an empty folder.
pub(crate) fn remove_folder(dir: &Path) -> Result<(), Error> {
    change(
        around!("remove_folder"),
        || fs::remove_dir(dir),
        #[cfg(test)]
        Change::RemoveFolder(dir.to_owned()),
    )
    .map_err(Error::io("delete", dir))
}

/// Removes a folder and what is in it. A link is removed and not followed.
pub(crate) fn remove_tree(dir: &Path) -> Result<(), Error> {
    for entry in fs::read_dir(dir).map_err(Error::io("list", dir))? {
        let entry = entry.map_err(Error::io("list", dir))?;
        let path = entry.path();
        let kind = entry.file_type().map_err(Error::io("find", &path))?;
        if kind.is_dir() {
            remove_tree(&path)?;
        } else {
            remove_file(&path)?;
        }
    }
    remove_folder(dir)
}

/// Makes the entries of a folder durable: names that were created, renamed or removed in it.
pub(crate) fn sync_folder(dir: &Path) -> Result<(), Error> {
    change(
        around!("sync_folder"),
        || File::open(dir)?.sync_all(),
        #[cfg(test)]
        Change::SyncFolder(dir.to_owned()),
    )
    .map_err(Error::io("sync", dir))
}

/// As [`sync_folder`] for the folder that `path` lies in.
pub(crate) fn sync_parent(path: &Path) -> Result<(), Error> {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => sync_folder(Path::new(".")),
        Some(parent) => sync_folder(parent),
        None => Ok(()),
    }
}

/// Creates a folder with its parents and makes each new one durable. One that is there already is
/// left as it is, also when another process creates it at this moment.
pub(crate) fn create_folder(dir: &Path) -> Result<(), Error> {
    create_missing(dir).map_err(|error| match error {
        // The folder that was asked for, not the parent that is in the way.
        Error::Io { action, cause, .. } => Error::io(action, dir)(cause),
        other => other,
    })
}

fn create_missing(dir: &Path) -> Result<(), Error> {
    if dir.as_os_str().is_empty() || dir.is_dir() {
        return Ok(());
    }
    if let Some(parent) = dir.parent() {
        create_missing(parent)?;
    }
    let created = change(
        around!("create_folder"),
        || fs::create_dir(dir),
        #[cfg(test)]
        Change::CreateFolder(dir.to_owned()),
    );
    match created {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && dir.is_dir() => {}
        other => other.map_err(Error::io("create", dir))?,
    }
    sync_parent(dir)
}
