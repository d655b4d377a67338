//! From a checkpoint to a Hugging Face folder.

use std::path::Path;

use super::hf_writer::{HfWriter, Written, write_json};
use super::staging::StagedFolder;
use super::{Error, LlamaConfig, hf_config, list_of_tensors, tokenizer};
use crate::checkpoint::{Checkpoint, Dtype, StateKind};

/// The largest safetensors file that is written unless said otherwise, in bytes.
pub const DEFAULT_SHARD_BYTES: u64 = 5_000_000_000;
/// Elements read and written at a time.
const BLOCK: usize = 1 << 20;

/// How to export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportOptions {
    /// Element type of the weights.
    pub dtype: Dtype,
    /// Where to end a safetensors file, in bytes.
    pub max_shard_bytes: u64,
}

impl Default for ExportOptions {
    fn default() -> Self {
        Self {
            dtype: Dtype::Bf16,
            max_shard_bytes: DEFAULT_SHARD_BYTES,
        }
    }
}

/// Writes the master weights of a checkpoint as a Hugging Face folder `out`, which must not exist
/// yet, with config, generation config, and the tokenizer that the checkpoint carries. `progress` is
/// told the weights written and the weights to write.
///
/// # Errors
/// A checkpoint whose tensors are not those of its config, a damaged chunk, an output that exists,
/// a failed write. `out` then does not exist.
pub fn to_hf(
    checkpoint: &Checkpoint,
    out: &Path,
    options: &ExportOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Written, Error> {
    let config = LlamaConfig::from_checkpoint(checkpoint)?;
    let tensors = list_of_tensors(&config.sizes);
    let expected = tensors
        .iter()
        .map(|(name, shape)| (name.as_str(), shape.as_slice()));
    checkpoint.check_model(expected, &[StateKind::Master])?;
    let folder = StagedFolder::create(out)?;
    let dir = folder.path();

    let total = tensors
        .iter()
        .map(|(_, shape)| shape.iter().product::<usize>() as u64)
        .sum();
    let mut done = 0;
    let mut buffer = vec![0.0; BLOCK];
    let mut writer =
        HfWriter::create(dir, tensors.clone(), options.dtype, options.max_shard_bytes)?;
    progress(done, total);
    for (name, shape) in &tensors {
        let count: usize = shape.iter().product();
        for start in (0..count).step_by(BLOCK) {
            let range = start..count.min(start + BLOCK);
            let values = &mut buffer[..range.len()];
            checkpoint.read(name, StateKind::Master, range, values)?;
            writer.write(values)?;
            done += values.len() as u64;
            progress(done, total);
        }
    }
    let written = writer.finish()?;

    write_json(
        dir,
        "config.json",
        &hf_config::to_json(&config, options.dtype),
    )?;
    let carried = tokenizer::export(checkpoint, &config, dir)?;
    if !carried.iter().any(|name| name == "generation_config.json") {
        let generation = hf_config::generation_json(&config.special_tokens);
        write_json(dir, "generation_config.json", &generation)?;
    }
    folder.publish()?;
    Ok(written)
}
