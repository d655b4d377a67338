//! Tests on tiny folders, made with the safetensors crate rather than with our own writer.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod export;
mod hostile;
mod import;

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use safetensors::tensor::{Dtype as FileDtype, TensorView, serialize_to_file};
use serde_json::{Value, json};

use super::*;
use crate::checkpoint::{Checkpoint, Dtype};

/// A tensor of a test folder.
#[derive(Clone)]
pub(super) struct Tensor {
    pub name: String,
    pub dtype: FileDtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// Sizes in which no two dimensions are equal by chance.
pub(super) fn sizes(tied: bool) -> LlamaSizes {
    LlamaSizes {
        vocab_size: 11,
        hidden_size: 8,
        intermediate_size: 12,
        num_layers: 2,
        num_heads: 6,
        num_kv_heads: 2,
        head_dim: 4,
        tie_word_embeddings: tied,
    }
}

/// The config in the style of transformers 4.x.
pub(super) fn legacy_config(tied: bool) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 11,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "initializer_range": 0.01,
        "rope_theta": 500000.0,
        "rope_scaling": null,
        "attention_bias": false,
        "attention_dropout": 0.0,
        "mlp_bias": false,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": [2, 9],
        "pad_token_id": -1,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.46.3",
        "use_cache": true,
    })
}

/// Random bits of every tensor: all exponents occur, no NaN does.
pub(super) fn tensors(sizes: &LlamaSizes, dtype: FileDtype) -> Vec<Tensor> {
    let mut state = 0x0123_4567_89AB_CDEFu64;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u32
    };
    list_of_tensors(sizes)
        .into_iter()
        .map(|(name, shape)| {
            let count: usize = shape.iter().product();
            let bytes = (0..count)
                .flat_map(|_| {
                    let bits = next();
                    match dtype {
                        FileDtype::F32 => (bits & 0xBFFF_FFFF).to_le_bytes().to_vec(),
                        _ => (bits as u16 & 0xBFFF).to_le_bytes().to_vec(),
                    }
                })
                .collect();
            Tensor {
                name,
                dtype,
                shape,
                bytes,
            }
        })
        .collect()
}

/// Writes one safetensors file.
pub(super) fn write_file(path: &Path, tensors: &[Tensor]) {
    let views = tensors.iter().map(|tensor| {
        let view = TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes).unwrap();
        (tensor.name.clone(), view)
    });
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    serialize_to_file(views, Some(metadata), path).unwrap();
}

/// Writes a folder with one file.
pub(super) fn write_folder(dir: &Path, config: &Value, tensors: &[Tensor]) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    write_file(&dir.join("model.safetensors"), tensors);
}

/// All tensors of a folder as the safetensors crate reads them, by name.
pub(super) fn read_folder(dir: &Path) -> HashMap<String, Tensor> {
    let mut tensors = HashMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path
            .extension()
            .is_some_and(|extension| extension == "safetensors")
        {
            let bytes = fs::read(path).unwrap();
            let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            for (name, view) in file.tensors() {
                let tensor = Tensor {
                    name: name.clone(),
                    dtype: view.dtype(),
                    shape: view.shape().to_vec(),
                    bytes: view.data().to_vec(),
                };
                assert!(tensors.insert(name, tensor).is_none());
            }
        }
    }
    tensors
}

/// Asserts that a folder holds exactly these tensors, bit for bit.
pub(super) fn assert_same(dir: &Path, expected: &[Tensor]) {
    let found = read_folder(dir);
    assert_eq!(found.len(), expected.len());
    for tensor in expected {
        let found = &found[&tensor.name];
        assert_eq!(
            (found.dtype, &found.shape),
            (tensor.dtype, &tensor.shape),
            "{}",
            tensor.name
        );
        assert_eq!(found.bytes, tensor.bytes, "{}", tensor.name);
    }
}

/// A progress callback that ignores everything.
pub(super) fn quiet(_done: u64, _total: u64) {}

/// Exports in `dtype` with small shards or one file.
pub(super) fn export(from: &Path, to: &Path, dtype: Dtype, max_shard_bytes: u64) -> Written {
    let checkpoint = Checkpoint::open(from).unwrap();
    to_hf(
        &checkpoint,
        to,
        &ExportOptions {
            dtype,
            max_shard_bytes,
        },
        &mut quiet,
    )
    .unwrap()
}

/// The names in a folder, sorted.
pub(super) fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}
