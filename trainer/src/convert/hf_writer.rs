//! Writes the tensors of a Hugging Face folder, shard by shard.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::Error;
use crate::checkpoint::durable::{DurableFile, write_file};
use crate::checkpoint::payload::{Slot, header};
use crate::checkpoint::{Dtype, FileKind};

/// Values converted at a time.
const BLOCK: usize = 1 << 18;
/// The largest finite value of F16.
const F16_MAX: f32 = 65504.0;

/// Writes `model.safetensors`, or shards with an index, one tensor after the other in a fixed
/// order, with constant memory.
pub struct HfWriter {
    dir: PathBuf,
    dtype: Dtype,
    tensors: Vec<Planned>,
    shards: usize,
    /// The tensor that the next values belong to, and how many of its elements are still to come.
    current: usize,
    missing: usize,
    file: Option<DurableFile>,
    encoded: Vec<u8>,
}

/// A tensor and the shard it goes to.
struct Planned {
    name: String,
    shape: Vec<usize>,
    elements: usize,
    shard: usize,
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// Number of safetensors files.
    pub shards: usize,
    /// Bytes of all tensors.
    pub tensor_bytes: u64,
}

impl HfWriter {
    /// Plans the shards of `tensors` (name, shape) in the existing folder `dir`: a shard ends where
    /// the next tensor would take it beyond `max_shard_bytes`; a tensor that is larger gets a file
    /// of its own.
    ///
    /// # Errors
    /// A tensor without elements or with too many to count.
    pub fn create(
        dir: &Path,
        tensors: Vec<(String, Vec<usize>)>,
        dtype: Dtype,
        max_shard_bytes: u64,
    ) -> Result<Self, Error> {
        let mut planned = Vec::with_capacity(tensors.len());
        let (mut shard, mut filled) = (0, 0u64);
        for (name, shape) in tensors {
            let Some(elements) = crate::checkpoint::element_count(&shape) else {
                let detail = format!("shape {shape:?} has no element or too many to count");
                return Err(Error::Request {
                    tensor: name,
                    detail,
                });
            };
            let bytes = (elements * dtype.bytes()) as u64;
            if filled > 0 && filled.saturating_add(bytes) > max_shard_bytes {
                shard += 1;
                filled = 0;
            }
            filled = filled.saturating_add(bytes);
            planned.push(Planned {
                name,
                shape,
                elements,
                shard,
            });
        }
        Ok(Self {
            dir: dir.to_owned(),
            dtype,
            shards: shard + 1,
            missing: planned.first().map_or(0, |tensor| tensor.elements),
            tensors: planned,
            current: 0,
            file: None,
            encoded: Vec::new(),
        })
    }

    /// Writes the next values, in the order of the tensors, in slices of any length. They are
    /// rounded to nearest, ties to even.
    ///
    /// # Errors
    /// More values than there are elements, a value beyond the range of F16, a failed write.
    pub fn write(&mut self, mut values: &[f32]) -> Result<(), Error> {
        while !values.is_empty() {
            let Some(tensor) = self.tensors.get(self.current) else {
                let detail = "values were written after the last tensor".to_owned();
                return Err(Error::Request {
                    tensor: String::new(),
                    detail,
                });
            };
            let (now, later) = values.split_at(values.len().min(self.missing).min(BLOCK));
            if self.dtype == Dtype::F16
                && let Some(value) = now
                    .iter()
                    .find(|value| value.is_finite() && value.abs() > F16_MAX)
            {
                return Err(Error::Overflow {
                    tensor: tensor.name.clone(),
                    value: *value,
                });
            }
            let file = match &mut self.file {
                Some(file) => file,
                slot => slot.insert(Self::start(
                    &self.dir,
                    &self.tensors,
                    self.dtype,
                    tensor.shard,
                    self.shards,
                )?),
            };
            self.encoded.clear();
            self.dtype.encode(now, &mut self.encoded);
            file.write(&self.encoded)?;
            self.missing -= now.len();
            values = later;
            if self.missing == 0 {
                self.next_tensor()?;
            }
        }
        Ok(())
    }

    /// Moves on to the next tensor, and closes the shard if that one is in another.
    fn next_tensor(&mut self) -> Result<(), Error> {
        let shard = self.tensors[self.current].shard;
        self.current += 1;
        let next = self.tensors.get(self.current);
        self.missing = next.map_or(0, |tensor| tensor.elements);
        if next.is_none_or(|tensor| tensor.shard != shard)
            && let Some(file) = self.file.take()
        {
            file.finish(FileKind::Payload)?;
        }
        Ok(())
    }

    /// Starts a shard's file with its header.
    fn start(
        dir: &Path,
        tensors: &[Planned],
        dtype: Dtype,
        shard: usize,
        shards: usize,
    ) -> Result<DurableFile, Error> {
        let slots = tensors
            .iter()
            .filter(|tensor| tensor.shard == shard)
            .map(|tensor| Slot {
                name: &tensor.name,
                shape: &tensor.shape,
                dtype,
                bytes: (tensor.elements * dtype.bytes()) as u64,
            });
        let name = shard_name(shard, shards);
        // Some releases of transformers crash without this entry.
        let head = header(&[("format", "pt")], slots).map_err(|error| Error::File {
            path: dir.join(&name),
            detail: error.to_string(),
        })?;
        let mut file = DurableFile::create(dir, &name)?;
        file.write(&head)?;
        Ok(file)
    }

    /// Ends the last shard and writes the index, if there is more than one.
    ///
    /// # Errors
    /// Values that were not written, or a failed write.
    pub fn finish(self) -> Result<Written, Error> {
        if let Some(tensor) = self.tensors.get(self.current) {
            let detail = format!("{} elements were not written", self.missing);
            return Err(Error::Request {
                tensor: tensor.name.clone(),
                detail,
            });
        }
        let elements: usize = self.tensors.iter().map(|tensor| tensor.elements).sum();
        let tensor_bytes = (elements * self.dtype.bytes()) as u64;
        if self.shards > 1 {
            let map: Map<String, Value> = self
                .tensors
                .iter()
                .map(|tensor| {
                    (
                        tensor.name.clone(),
                        Value::from(shard_name(tensor.shard, self.shards)),
                    )
                })
                .collect();
            let index = json!({ "metadata": { "total_size": tensor_bytes }, "weight_map": map });
            write_json(&self.dir, "model.safetensors.index.json", &index)?;
        }
        Ok(Written {
            shards: self.shards,
            tensor_bytes,
        })
    }
}

/// Name of a safetensors file of a folder.
fn shard_name(shard: usize, shards: usize) -> String {
    if shards == 1 {
        "model.safetensors".to_owned()
    } else {
        format!("model-{:05}-of-{shards:05}.safetensors", shard + 1)
    }
}

/// Writes a JSON file that a person can read.
pub(super) fn write_json(dir: &Path, name: &str, value: &Value) -> Result<(), Error> {
    let mut text = serde_json::to_string_pretty(value).map_err(|error| Error::File {
        path: dir.join(name),
        detail: error.to_string(),
    })?;
    text.push('\n');
    Ok(write_file(dir, name, text.as_bytes())?)
}
