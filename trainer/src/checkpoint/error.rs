//! Why a checkpoint could not be written or read.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use oxitron_data::io_remedy;

use super::StateKind;

/// An error of this module. Each message names the file or tensor, what was expected, what was
/// found, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An operation on a file or folder failed.
    #[error("cannot {action} {}: {cause}{}", .path.display(), io_remedy(.cause))]
    Io {
        /// What was tried, as an infinitive ("write", "rename to").
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system answered. It is part of the message and therefore not a `source`, which
        /// would be printed again.
        cause: io::Error,
    },
    /// The folder holds no manifest.
    #[error("{} is not a checkpoint: {reason}", .dir.display())]
    NotACheckpoint {
        /// The folder.
        dir: PathBuf,
        /// What is missing, and what to do.
        reason: String,
    },
    /// The manifest's bytes do not match the checksum at its end.
    #[error(
        "{}: the manifest is damaged: {detail}; use another checkpoint of the run, this one cannot \
         be trusted",
        .path.display()
    )]
    ManifestDamaged {
        /// The manifest.
        path: PathBuf,
        /// Expected and found checksum, or the part of the seal that is missing.
        detail: String,
    },
    /// The manifest is intact but does not describe a checkpoint.
    #[error("{}: {detail}", .path.display())]
    ManifestInvalid {
        /// The manifest, or the done file of a rank.
        path: PathBuf,
        /// Which entry, what was expected, what was found.
        detail: String,
    },
    /// The manifest was written by a version of the format that this build does not know.
    #[error(
        "{}: checkpoint format version {found}, this build reads {} to {known}; use the build \
         that wrote it",
        .path.display(), super::FormatLimits::OLDEST
    )]
    Version {
        /// The manifest.
        path: PathBuf,
        /// The version it states.
        found: u32,
        /// The newest version this build reads.
        known: u32,
    },
    /// A payload file has another size than the manifest says.
    #[error(
        "{}: {expected} bytes expected, {found} found; the file was cut short or replaced: use \
         another checkpoint of the run or copy this file again",
        .path.display()
    )]
    FileSize {
        /// The file.
        path: PathBuf,
        /// Bytes the manifest states.
        expected: u64,
        /// Bytes on disk.
        found: u64,
    },
    /// A chunk of a payload file does not match its checksum.
    #[error(
        "{}: bytes {start}..{end} have checksum {found}, {expected} was written; the file is \
         damaged: use another checkpoint of the run or copy this file again",
        .path.display()
    )]
    Chunk {
        /// The file.
        path: PathBuf,
        /// First byte of the chunk.
        start: u64,
        /// One past its last byte.
        end: u64,
        /// Checksum in the manifest.
        expected: String,
        /// Checksum of the bytes read.
        found: String,
    },
    /// The checkpoint has no such tensor or no such state of it.
    #[error(
        "{}: no {state} state of tensor `{tensor}`; {remedy}",
        .dir.display()
    )]
    NoSuchTensor {
        /// The checkpoint.
        dir: PathBuf,
        /// The tensor.
        tensor: String,
        /// The state asked for.
        state: StateKind,
        /// What to do.
        remedy: String,
    },
    /// The checkpoint belongs to another model.
    #[error(
        "{} holds another model: {detail}; check [model] against `oxitron inspect`",
        .dir.display()
    )]
    OtherModel {
        /// The checkpoint.
        dir: PathBuf,
        /// The first differences: tensor, expected and found.
        detail: String,
    },
    /// A caller asked for something that does not fit the tensor.
    #[error("tensor `{tensor}`: {detail}")]
    Request {
        /// The tensor.
        tensor: String,
        /// What was asked for, and what fits.
        detail: String,
    },
    /// A save id or another argument of a save is not usable.
    #[error("cannot save into {}: {detail}", .dir.display())]
    Save {
        /// The folder of the save.
        dir: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// Not every rank finished its part in time. Nothing was committed.
    #[error(
        "{}: after {waited:?} of waiting, the parts of rank(s) {missing:?} of save `{save_id}` are \
         missing; nothing was committed. Look into the logs of these ranks",
        .dir.display()
    )]
    CommitTimeout {
        /// The folder of the save.
        dir: PathBuf,
        /// The save.
        save_id: String,
        /// Ranks without a done file of this save.
        missing: Vec<usize>,
        /// How long was waited.
        waited: Duration,
    },
    /// A save was given up because somebody asked for it. Nothing was committed.
    #[error("{}: save `{save_id}` was given up; nothing was committed", .dir.display())]
    Cancelled {
        /// The folder of the save.
        dir: PathBuf,
        /// The save.
        save_id: String,
    },
}

impl Error {
    /// Whether a file or folder was not there.
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Self::Io { cause, .. } if cause.kind() == io::ErrorKind::NotFound)
    }

    /// Makes a mapping for `map_err` on an operation on `path`.
    pub(crate) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |cause| Self::Io {
            action,
            path,
            cause,
        }
    }
}
