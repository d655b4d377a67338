//! Opening a checkpoint: what its manifest says, checked.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use super::durable::read_small_file;
use super::manifest::{
    FileEntry, FileKind, FormatLimits, MANIFEST, Manifest, ManifestMeta, StateKind, TensorEntry,
};
use super::read::LoadedChunk;
use super::seal::{Broken, decode};
use super::{Error, validate};

/// An open checkpoint. Its manifest has been checked, its payload is checked as it is read.
///
/// Can be shared between threads; reads then take turns.
#[derive(Debug)]
pub struct Checkpoint {
    pub(super) dir: PathBuf,
    pub(super) manifest: Manifest,
    /// Position of each tensor in the manifest.
    by_name: HashMap<String, usize>,
    /// Whether chunks are compared with their checksums.
    pub(super) verifies: bool,
    pub(super) bytes_read: AtomicU64,
    pub(super) chunk: Mutex<LoadedChunk>,
}

impl Checkpoint {
    /// Opens the checkpoint in the folder `dir`: reads the manifest, checks its checksum and all it
    /// says, and compares the sizes of the files.
    ///
    /// # Errors
    /// A folder without a manifest, a manifest that is damaged, inconsistent or of another version,
    /// a missing file or one of another size.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, Error> {
        let dir = dir.as_ref();
        let manifest = Self::read_manifest(dir)?;
        for file in &manifest.files {
            let path = dir.join(&file.name);
            let found = fs::metadata(&path).map_err(Error::io("find", &path))?.len();
            if found != file.bytes {
                return Err(Error::FileSize {
                    path,
                    expected: file.bytes,
                    found,
                });
            }
        }
        let by_name = manifest
            .tensors
            .iter()
            .enumerate()
            .map(|(index, tensor)| (tensor.name.clone(), index))
            .collect();
        Ok(Self {
            dir: dir.to_owned(),
            manifest,
            by_name,
            verifies: true,
            bytes_read: AtomicU64::new(0),
            chunk: Mutex::default(),
        })
    }

    /// This checkpoint, read without comparing checksums: faster on slow machines, and damage inside
    /// the files then goes unnoticed. The manifest and the sizes have been checked all the same.
    pub fn without_verification(mut self) -> Self {
        self.verifies = false;
        self
    }

    /// Bytes read from the files so far, the manifest not included.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Ordering::Relaxed)
    }

    /// Reads the manifest in the folder `dir` and checks what can be checked without the files.
    pub(super) fn read_manifest(dir: &Path) -> Result<Manifest, Error> {
        let path = dir.join(MANIFEST);
        if !path.is_file() {
            let reason = if dir.is_dir() {
                "it has no manifest.json: the save did not finish, or this is another folder; the \
                 run goes on from an older checkpoint"
            } else {
                "there is no such folder; check the path"
            };
            return Err(Error::NotACheckpoint {
                dir: dir.to_owned(),
                reason: reason.to_owned(),
            });
        }
        let bytes = read_small_file(&path, FormatLimits::MAX_MANIFEST_BYTES)?;
        let manifest = decode(&bytes).map_err(|broken| match broken {
            Broken::Damaged(detail) => Error::ManifestDamaged {
                path: path.clone(),
                detail,
            },
            Broken::Invalid(detail) => Error::ManifestInvalid {
                path: path.clone(),
                detail,
            },
            Broken::Version(found) => Error::Version {
                path: path.clone(),
                found,
                known: FormatLimits::VERSION,
            },
        })?;
        drop(bytes);
        validate::check(&manifest).map_err(|detail| Error::ManifestInvalid {
            path: path.clone(),
            detail,
        })?;
        Ok(manifest)
    }

    /// The manifest alone.
    pub(super) fn into_manifest(self) -> Manifest {
        self.manifest
    }

    /// The checkpoint folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The state of the run.
    pub fn meta(&self) -> &ManifestMeta {
        &self.manifest.run
    }

    /// The save that wrote this checkpoint.
    pub fn save_id(&self) -> &str {
        &self.manifest.save_id
    }

    /// All tensors, in the order of the manifest.
    pub fn tensors(&self) -> &[TensorEntry] {
        &self.manifest.tensors
    }

    /// All files but the manifest.
    pub fn files(&self) -> &[FileEntry] {
        &self.manifest.files
    }

    /// The files that are carried along, as the tokenizer is.
    pub fn attachments(&self) -> impl Iterator<Item = &FileEntry> {
        self.manifest
            .files
            .iter()
            .filter(|file| file.kind == FileKind::Attachment)
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<&TensorEntry> {
        self.by_name
            .get(name)
            .map(|index| &self.manifest.tensors[*index])
    }

    /// Checks that this checkpoint holds `states` of exactly the tensors `expected` (name, shape).
    ///
    /// # Errors
    /// [`Error::OtherModel`] with the first differences.
    pub fn check_model<'a>(
        &self,
        expected: impl IntoIterator<Item = (&'a str, &'a [usize])>,
        states: &[StateKind],
    ) -> Result<(), Error> {
        let mut differences = Vec::new();
        let mut known = 0;
        for (name, shape) in expected {
            let Some(tensor) = self.tensor(name) else {
                differences.push(format!("tensor `{name}` of shape {shape:?} is missing"));
                continue;
            };
            known += 1;
            if tensor.shape != shape {
                differences.push(format!(
                    "tensor `{name}`: shape {shape:?} expected, {:?} found",
                    tensor.shape
                ));
            }
            for state in states {
                if !tensor.states.iter().any(|entry| entry.state == *state) {
                    differences.push(format!("tensor `{name}` has no {state} state"));
                }
            }
        }
        let unexpected = self.manifest.tensors.len() - known;
        if unexpected > 0 {
            differences.push(format!(
                "{unexpected} tensor(s) that the model does not have"
            ));
        }
        if differences.is_empty() {
            return Ok(());
        }
        let shown = 3;
        let mut detail = differences
            .iter()
            .take(shown)
            .cloned()
            .collect::<Vec<_>>()
            .join("; ");
        if differences.len() > shown {
            // Writing to a string cannot fail.
            let _ = write!(
                detail,
                "; and {} more differences",
                differences.len() - shown
            );
        }
        Err(Error::OtherModel {
            dir: self.dir.clone(),
            detail,
        })
    }
}
