//! Files that appear whole or not at all.

use crate::error::{Error, Result};
use std::io::Write;
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

/// The folder that holds `path`; `.` for a bare file name.
pub(crate) fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    }
}

/// A temporary file beside `path`, for [`commit`] to put in its place. Dropped, it is deleted.
pub(crate) fn begin(path: &Path) -> Result<NamedTempFile> {
    let folder = parent(path);
    std::fs::create_dir_all(&folder).map_err(Error::io("create the folder", &folder))?;
    let mut builder = tempfile::Builder::new();
    builder.prefix(".writing-").suffix(".partial");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // The default of a temporary file, 0600, would hide data sets from other users; the
        // process's umask still applies.
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    builder
        .tempfile_in(&folder)
        .map_err(Error::io("create a file in", &folder))
}

/// Makes a file begun with [`begin`] durable under its real name.
pub(crate) fn commit(file: NamedTempFile, path: &Path) -> Result<()> {
    file.as_file()
        .sync_all()
        .map_err(Error::io("flush to disk", path))?;
    file.persist(path).map_err(|e| Error::Io {
        action: "rename into place",
        path: path.into(),
        reason: e.error,
    })?;
    sync_folder(&parent(path))
}

/// Writes `bytes` to `path` under a temporary name, flushes, and renames.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = begin(path)?;
    file.write_all(bytes).map_err(Error::io("write", path))?;
    commit(file, path)
}

/// Makes renames inside `folder` durable.
pub(crate) fn sync_folder(folder: &Path) -> Result<()> {
    std::fs::File::open(folder)
        .and_then(|f| f.sync_all())
        .map_err(Error::io("flush the folder", folder))
}
