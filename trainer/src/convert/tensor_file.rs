//! One safetensors file, read as if its author meant harm.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use super::Error;
use crate::checkpoint::{Dtype, Error as CheckpointError};

/// The largest header that is read, in bytes. The format allows 100 MB; the longest list of tensors
/// that this layout can have takes some 6 MB.
const MAX_HEADER_BYTES: u64 = 32 << 20;
/// Elements converted at a time.
const BLOCK: usize = 1 << 18;

/// An open safetensors file whose header has been checked against its size.
#[derive(Debug)]
pub(super) struct TensorFile {
    path: PathBuf,
    file: File,
    tensors: BTreeMap<String, StoredTensor>,
}

/// Where a tensor lies in its file.
#[derive(Debug)]
pub(super) struct StoredTensor {
    /// Element type as the header spells it; not all of them can be read.
    pub dtype: String,
    /// Shape.
    pub shape: Vec<usize>,
    /// Offset of the first byte from the start of the file.
    start: u64,
}

/// A tensor as the header describes it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

/// Bytes of an element of any type that the format knows.
fn element_bytes(dtype: &str) -> Option<u64> {
    match dtype {
        "BOOL" | "U8" | "I8" | "F8_E5M2" | "F8_E4M3" => Some(1),
        "U16" | "I16" | "F16" | "BF16" => Some(2),
        "U32" | "I32" | "F32" => Some(4),
        "U64" | "I64" | "F64" | "C64" => Some(8),
        _ => None,
    }
}

impl TensorFile {
    /// Opens a file and checks its header: every tensor has a known type, a shape that makes its
    /// size, and bytes of its own; together they fill the file without gaps.
    pub(super) fn open(path: &Path) -> Result<Self, Error> {
        let bad = |detail: String| Error::File {
            path: path.to_owned(),
            detail,
        };
        let file = File::open(path).map_err(CheckpointError::io("open", path))?;
        let size = file
            .metadata()
            .map_err(CheckpointError::io("read", path))?
            .len();
        if size < 8 {
            return Err(bad(format!(
                "{size} bytes are too few for a safetensors file"
            )));
        }
        let read = |bytes: &mut [u8], offset| {
            file.read_exact_at(bytes, offset)
                .map_err(CheckpointError::io("read", path))
        };
        let mut length = [0; 8];
        read(&mut length, 0)?;
        let length = u64::from_le_bytes(length);
        if length > MAX_HEADER_BYTES || length > size - 8 {
            return Err(bad(format!(
                "the header claims {length} bytes of a file of {size}; it is cut short or no \
                 safetensors file"
            )));
        }
        let mut header = vec![0; length as usize];
        read(&mut header, 8)?;
        let entries: BTreeMap<String, Value> = serde_json::from_slice(&header)
            .map_err(|error| bad(format!("the header is not readable: {error}")))?;
        let tensors = check(entries, 8 + length, size).map_err(bad)?;
        Ok(Self {
            path: path.to_owned(),
            file,
            tensors,
        })
    }

    /// The tensors by name.
    pub(super) fn tensors(&self) -> &BTreeMap<String, StoredTensor> {
        &self.tensors
    }

    /// The file.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Reads elements of a tensor as `f32`. `range` lies in the tensor and has `out`'s length.
    pub(super) fn read(
        &self,
        name: &str,
        range: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), Error> {
        let tensor = self.tensors.get(name);
        let dtype = tensor.and_then(|tensor| Dtype::from_name(&tensor.dtype));
        let (Some(tensor), Some(dtype)) = (tensor, dtype) else {
            let found = tensor.map_or("no such tensor", |tensor| tensor.dtype.as_str());
            let detail = format!("F32, BF16 or F16 expected, {found} found");
            return Err(Error::Request {
                tensor: name.to_owned(),
                detail,
            });
        };
        let mut offset = tensor.start + (range.start * dtype.bytes()) as u64;
        let mut read = |bytes: &mut [u8]| {
            self.file
                .read_exact_at(bytes, offset)
                .map_err(CheckpointError::io("read", &self.path))?;
            offset += bytes.len() as u64;
            Ok(())
        };
        if dtype == Dtype::F32 {
            return read(bytemuck::cast_slice_mut(out));
        }
        let mut raw = vec![0; out.len().min(BLOCK) * dtype.bytes()];
        for part in out.chunks_mut(BLOCK) {
            let raw = &mut raw[..part.len() * dtype.bytes()];
            read(raw)?;
            dtype.decode(raw, part);
        }
        Ok(())
    }
}

/// Checks the entries of a header against the file's `size`; `data` is where the tensors begin.
fn check(
    entries: BTreeMap<String, Value>,
    data: u64,
    size: u64,
) -> Result<BTreeMap<String, StoredTensor>, String> {
    let mut spans = Vec::new();
    let mut tensors = BTreeMap::new();
    for (name, value) in entries {
        if name == "__metadata__" {
            continue;
        }
        let entry: Entry =
            serde_json::from_value(value).map_err(|error| format!("tensor `{name}`: {error}"))?;
        let Some(element) = element_bytes(&entry.dtype) else {
            return Err(format!(
                "tensor `{name}`: unknown element type {}",
                entry.dtype
            ));
        };
        let expected = entry.shape.iter().try_fold(element, |bytes, &extent| {
            bytes.checked_mul(u64::try_from(extent).ok()?)
        });
        let (begin, end) = entry.data_offsets;
        if begin > end || expected != Some(end - begin) {
            return Err(format!(
                "tensor `{name}`: bytes {begin}..{end} do not hold {} of shape {:?}",
                entry.dtype, entry.shape
            ));
        }
        if end > size - data {
            return Err(format!(
                "tensor `{name}` ends at byte {end} of {} data bytes; the file is cut short",
                size - data
            ));
        }
        spans.push((begin, end));
        let tensor = StoredTensor {
            dtype: entry.dtype,
            shape: entry.shape,
            start: data + begin,
        };
        tensors.insert(name, tensor);
    }
    spans.sort_unstable();
    let mut covered = 0;
    for (begin, end) in spans {
        if begin != covered {
            return Err(format!(
                "the tensors overlap or leave a gap at data byte {begin}"
            ));
        }
        covered = end;
    }
    if covered != size - data {
        return Err(format!(
            "the tensors take {covered} bytes, the file has {} data bytes",
            size - data
        ));
    }
    Ok(tensors)
}
