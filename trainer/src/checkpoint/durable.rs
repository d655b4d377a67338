//! Files that are on disk when a function returns, and whose bytes have checksums.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::Xxh3;

use super::Error;
use super::disk::{self, NewFile, sync_folder};
use super::manifest::{FileEntry, FileKind, FormatLimits};
use super::seal::hex;

/// Writes a small file under a temporary name, makes it durable and renames it into place.
pub(crate) fn write_file(dir: &Path, name: &str, bytes: &[u8]) -> Result<(), Error> {
    let mut writer = DurableFile::create(dir, name)?;
    writer.write(bytes)?;
    writer.finish(FileKind::Attachment)?;
    sync_folder(dir)
}

/// A file that appears under its name only when it is complete, with a checksum per chunk.
///
/// Until [`DurableFile::finish`] the bytes lie under `.NAME.partial`; if the writer is dropped
/// before, that file is removed.
pub(crate) struct DurableFile {
    dir: PathBuf,
    name: String,
    partial: PathBuf,
    file: Option<NewFile>,
    bytes: u64,
    hasher: Xxh3,
    chunks: Vec<String>,
}

impl DurableFile {
    /// Starts a file `name` in the existing folder `dir`.
    pub(crate) fn create(dir: &Path, name: &str) -> Result<Self, Error> {
        let partial = dir.join(format!(".{name}.partial"));
        let file = NewFile::create(&partial).inspect_err(|_| {
            let _ = disk::remove_file(&partial);
        })?;
        Ok(Self {
            dir: dir.to_owned(),
            name: name.to_owned(),
            partial,
            file: Some(file),
            bytes: 0,
            hasher: Xxh3::new(),
            chunks: Vec::new(),
        })
    }

    /// Appends bytes.
    pub(crate) fn write(&mut self, mut bytes: &[u8]) -> Result<(), Error> {
        while !bytes.is_empty() {
            let filled = self.bytes % FormatLimits::CHUNK_BYTES;
            let room = (FormatLimits::CHUNK_BYTES - filled) as usize;
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            if let Some(file) = &mut self.file {
                file.write(now)?;
            }
            self.hasher.update(now);
            self.bytes += now.len() as u64;
            if self.bytes.is_multiple_of(FormatLimits::CHUNK_BYTES) {
                self.end_chunk();
            }
            bytes = later;
        }
        Ok(())
    }

    fn end_chunk(&mut self) {
        self.chunks.push(hex(self.hasher.digest128()));
        self.hasher.reset();
    }

    /// Makes the bytes durable, gives the file its name, and says what was written. The caller
    /// syncs the folder, once for all its files.
    pub(crate) fn finish(mut self, kind: FileKind) -> Result<FileEntry, Error> {
        if !self.bytes.is_multiple_of(FormatLimits::CHUNK_BYTES) {
            self.end_chunk();
        }
        if let Some(file) = &self.file {
            file.sync()?;
        }
        disk::rename(&self.partial, &self.dir.join(&self.name))?;
        self.file = None;
        Ok(FileEntry {
            name: self.name.clone(),
            kind,
            bytes: self.bytes,
            chunk_bytes: FormatLimits::CHUNK_BYTES,
            chunks: std::mem::take(&mut self.chunks),
        })
    }
}

impl Drop for DurableFile {
    fn drop(&mut self) {
        if self.file.take().is_some() {
            // Nothing to report to: the error that ended the writing is on its way already.
            let _ = disk::remove_file(&self.partial);
        }
    }
}

/// Reads a whole file of at most `limit` bytes. A larger one is an error before any is read.
pub(crate) fn read_small_file(path: &Path, limit: u64) -> Result<Vec<u8>, Error> {
    use io::Read;
    let file = File::open(path).map_err(Error::io("open", path))?;
    let too_large = || io::Error::other(format!("larger than the {limit} bytes allowed here"));
    let mut bytes = Vec::new();
    file.take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(Error::io("read", path))?;
    if bytes.len() as u64 > limit {
        return Err(Error::io("read", path)(too_large()));
    }
    Ok(bytes)
}
