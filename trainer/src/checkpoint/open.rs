//! Reading a checkpoint: any elements of any tensor, with only the bytes that hold them.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use xxhash_rust::xxh3::xxh3_128;

use super::dtype::Dtype;
use super::durable::read_small_file;
use super::manifest::{
    FileEntry, FileKind, FormatLimits, MANIFEST, Manifest, ManifestMeta, StateEntry, StateKind,
    TensorEntry,
};
use super::seal::{Broken, decode, hex};
use super::{Error, validate};

/// An open checkpoint. Its manifest has been checked, its payload is checked as it is read.
///
/// Can be shared between threads; reads then take turns.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    manifest: Manifest,
    /// Position of each tensor in the manifest.
    by_name: HashMap<String, usize>,
    /// Whether chunks are compared with their checksums.
    verifies: bool,
    bytes_read: AtomicU64,
    chunk: Mutex<LoadedChunk>,
}

/// The chunk read last. Small tensors lie beside each other in a file, so the next read
/// often finds its bytes here.
#[derive(Debug, Default)]
pub(super) struct LoadedChunk {
    /// The open file and its index.
    file: Option<(usize, File)>,
    /// File and chunk index of what `bytes` holds.
    holds: Option<(usize, u64)>,
    pub(super) bytes: Vec<u8>,
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

    /// Reads the elements `range` (row-major) of a tensor into `out`, from whichever pieces hold
    /// them. Every chunk touched is read whole and compared with its checksum first.
    ///
    /// # Errors
    /// No such tensor or state, a range outside the tensor, an `out` of another length, a damaged
    /// chunk, a failed read. `out` is then unspecified.
    pub fn read(
        &self,
        tensor: &str,
        state: StateKind,
        range: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), Error> {
        let (entry, stored) = self.find(tensor, state)?;
        // Validated on opening: the product does not overflow.
        let count: usize = entry.shape.iter().product();
        if range.start > range.end || range.end > count || out.len() != range.len() {
            let detail = format!(
                "elements {range:?} into a buffer of {} were asked for; it has {count} elements",
                out.len()
            );
            return Err(Error::Request {
                tensor: tensor.to_owned(),
                detail,
            });
        }
        let mut chunk = self.chunk.lock().unwrap_or_else(PoisonError::into_inner);
        let element = stored.dtype.bytes() as u64;
        for piece in &stored.pieces {
            let region = &piece.region;
            let wanted = region.overlap(&entry.shape, &range);
            for run in region.runs(&entry.shape, wanted) {
                let offset = piece.offset + (run.index - region.range[0]) as u64 * element;
                let from = run.tensor - range.start;
                let out = &mut out[from..from + run.len];
                self.read_elements(&mut chunk, piece.file, offset, stored.dtype, out)?;
            }
        }
        Ok(())
    }

    /// The bytes of an attachment of at most `limit` bytes.
    ///
    /// # Errors
    /// No such attachment, one that is larger, a damaged chunk, a failed read.
    pub fn read_attachment(&self, name: &str, limit: u64) -> Result<Vec<u8>, Error> {
        let found = self.manifest.files.iter().enumerate().find(|(_, file)| {
            file.kind == FileKind::Attachment && file.name == name && file.bytes <= limit
        });
        let Some((index, file)) = found else {
            return Err(Error::NotACheckpoint {
                dir: self.dir.clone(),
                reason: format!("it carries no file `{name}` of at most {limit} bytes"),
            });
        };
        let mut bytes = Vec::with_capacity(file.bytes as usize);
        let mut chunk = LoadedChunk::default();
        for number in 0..file.chunks.len() as u64 {
            self.load(&mut chunk, index, number, self.verifies)?;
            bytes.extend_from_slice(&chunk.bytes);
        }
        Ok(bytes)
    }

    fn find(&self, tensor: &str, state: StateKind) -> Result<(&TensorEntry, &StateEntry), Error> {
        let missing = |remedy: &str| Error::NoSuchTensor {
            dir: self.dir.clone(),
            tensor: tensor.to_owned(),
            state,
            remedy: remedy.to_owned(),
        };
        let entry = self
            .tensor(tensor)
            .ok_or_else(|| missing("`oxitron inspect` lists the tensors it holds"))?;
        let stored = entry
            .states
            .iter()
            .find(|entry| entry.state == state)
            .ok_or_else(|| {
                missing("a checkpoint of weights only can initialise a run but not continue one")
            })?;
        Ok((entry, stored))
    }

    fn read_elements(
        &self,
        chunk: &mut LoadedChunk,
        file: usize,
        mut offset: u64,
        dtype: Dtype,
        out: &mut [f32],
    ) -> Result<(), Error> {
        if dtype == Dtype::F32 {
            return self.read_bytes(chunk, file, offset, bytemuck::cast_slice_mut(out));
        }
        let mut raw = vec![0; out.len().min(1 << 18) * dtype.bytes()];
        for part in out.chunks_mut(1 << 18) {
            let raw = &mut raw[..part.len() * dtype.bytes()];
            self.read_bytes(chunk, file, offset, raw)?;
            dtype.decode(raw, part);
            offset += raw.len() as u64;
        }
        Ok(())
    }

    /// Copies bytes, verified unless that was declined. The range lies in the file, as checked on
    /// opening.
    fn read_bytes(
        &self,
        chunk: &mut LoadedChunk,
        file: usize,
        mut offset: u64,
        mut out: &mut [u8],
    ) -> Result<(), Error> {
        let size = self.manifest.files[file].chunk_bytes;
        while !out.is_empty() {
            self.load(chunk, file, offset / size, self.verifies)?;
            let inside = (offset % size) as usize;
            let count = out.len().min(chunk.bytes.len() - inside);
            let (now, later) = out.split_at_mut(count);
            now.copy_from_slice(&chunk.bytes[inside..inside + count]);
            out = later;
            offset += count as u64;
        }
        Ok(())
    }

    /// Makes `chunk` hold chunk `number` of a file, compared with its checksum if `verify`.
    pub(super) fn load(
        &self,
        chunk: &mut LoadedChunk,
        index: usize,
        number: u64,
        verify: bool,
    ) -> Result<(), Error> {
        if chunk.holds == Some((index, number)) {
            return Ok(());
        }
        chunk.holds = None;
        let entry = &self.manifest.files[index];
        let path = self.dir.join(&entry.name);
        let file = match &mut chunk.file {
            Some((open, file)) if *open == index => file,
            slot => {
                let file = File::open(&path).map_err(Error::io("open", &path))?;
                &mut slot.insert((index, file)).1
            }
        };
        let start = number * entry.chunk_bytes;
        let end = (start + entry.chunk_bytes).min(entry.bytes);
        chunk.bytes.resize((end - start) as usize, 0);
        file.read_exact_at(&mut chunk.bytes, start)
            .map_err(|error| {
                if error.kind() == io::ErrorKind::UnexpectedEof {
                    // It was long enough when the checkpoint was opened.
                    let found = file.metadata().map_or(0, |data| data.len());
                    Error::FileSize {
                        path: path.clone(),
                        expected: entry.bytes,
                        found,
                    }
                } else {
                    Error::io("read", &path)(error)
                }
            })?;
        self.bytes_read.fetch_add(end - start, Ordering::Relaxed);
        if verify {
            let found = hex(xxh3_128(&chunk.bytes));
            let expected = &entry.chunks[number as usize];
            if found != *expected {
                return Err(Error::Chunk {
                    path,
                    start,
                    end,
                    expected: expected.clone(),
                    found,
                });
            }
        }
        chunk.holds = Some((index, number));
        Ok(())
    }
}
