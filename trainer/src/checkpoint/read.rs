//! Reading from an open checkpoint: any elements of any tensor, with only the chunks that hold them.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use xxhash_rust::xxh3::xxh3_128;

use super::dtype::Dtype;
use super::manifest::{FileKind, StateEntry, StateKind, TensorEntry};
use super::seal::hex;
use super::{Checkpoint, Error};

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

    /// All elements of a tensor, row-major.
    ///
    /// # Errors
    /// As [`Checkpoint::read`].
    pub fn read_whole(&self, tensor: &str, state: StateKind) -> Result<Vec<f32>, Error> {
        let (entry, _) = self.find(tensor, state)?;
        let mut values = vec![0.0; entry.shape.iter().product()];
        self.read(tensor, state, 0..values.len(), &mut values)?;
        Ok(values)
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
