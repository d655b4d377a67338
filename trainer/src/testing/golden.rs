//! Reading `tests/golden`: what PyTorch and transformers computed.

use std::fs;
use std::path::PathBuf;

use safetensors::{Dtype as Stored, SafeTensors};
use serde_json::Value;
use tch::Device;

use super::counter_hash::Scales;
use crate::config::{Dtype, DtypeChoice, Family, ModelConfig, Patterns};
use crate::model::Batch;

/// A golden file pair: facts in JSON, tensors beside it.
pub struct Golden {
    pub facts: Value,
    bytes: Vec<u8>,
}

/// A file or folder of `tests/golden`, or of the folder that `OXITRON_GOLDEN` names: the tests also
/// run on machines without the sources.
pub fn path(name: &str) -> PathBuf {
    let here = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/golden");
    let folder = std::env::var_os("OXITRON_GOLDEN").map_or_else(here, PathBuf::from);
    folder.join(name)
}

impl Golden {
    pub fn open(name: &str) -> Self {
        Self::with_tensors(name, name)
    }

    /// For a reference whose tensors lie under another name than its facts.
    pub fn with_tensors(facts: &str, tensors: &str) -> Self {
        let read = |name: String| {
            let path = path(&name);
            fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        };
        Self {
            facts: serde_json::from_slice(&read(format!("{facts}.json"))).unwrap(),
            bytes: read(format!("{tensors}.safetensors")),
        }
    }

    pub fn i64(&self, name: &str) -> Vec<i64> {
        let (_, bytes) = self.tensor(name, Stored::I64);
        let values = bytes
            .chunks_exact(8)
            .map(|b| i64::from_le_bytes(b.try_into().unwrap()));
        values.collect()
    }

    fn tensor(&self, name: &str, dtype: Stored) -> (Vec<usize>, Vec<u8>) {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let view = file.tensor(name).unwrap();
        assert_eq!(view.dtype(), dtype, "{name}");
        (view.shape().to_vec(), view.data().to_vec())
    }

    pub fn i32(&self, name: &str) -> (Vec<usize>, Vec<i32>) {
        let (shape, bytes) = self.tensor(name, Stored::I32);
        let values = bytes
            .chunks_exact(4)
            .map(|b| i32::from_le_bytes(b.try_into().unwrap()));
        (shape, values.collect())
    }

    pub fn f32(&self, name: &str) -> Vec<f32> {
        let (_, bytes) = self.tensor(name, Stored::F32);
        bytes
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
            .collect()
    }

    /// The batches stored under `prefix` (`tokens`, `targets`, `positions`): one per leading index,
    /// of the last two dimensions.
    pub fn batches(&self, prefix: &str) -> Vec<Batch> {
        self.batches_on(Device::Cpu, prefix)
    }

    /// The same on another device.
    pub fn batches_on(&self, device: Device, prefix: &str) -> Vec<Batch> {
        let (shape, tokens) = self.i32(&format!("{prefix}tokens"));
        let (_, targets) = self.i32(&format!("{prefix}targets"));
        let (_, positions) = self.i32(&format!("{prefix}positions"));
        let [rows, seq_len] = shape[shape.len() - 2..] else {
            panic!("batches have rows")
        };
        let wide = |values: &[i32]| values.iter().map(|&v| i64::from(v)).collect::<Vec<_>>();
        let size = rows * seq_len;
        (0..tokens.len() / size)
            .map(|index| {
                let range = index * size..(index + 1) * size;
                let starts: Vec<Vec<u32>> = positions[range.clone()]
                    .chunks(seq_len)
                    .map(|row| {
                        (0..)
                            .zip(row)
                            .filter(|&(_, &p)| p == 0)
                            .map(|(i, _)| i)
                            .collect()
                    })
                    .collect();
                let (tokens, targets) = (wide(&tokens[range.clone()]), wide(&targets[range]));
                Batch::new(&tokens, &targets, &starts, seq_len, device).unwrap()
            })
            .collect()
    }
}

/// The model of a golden case, its RoPE base, and the scales of its weights.
pub fn model(facts: &Value) -> (ModelConfig, f64, Scales) {
    let size = |key: &str| facts[key].as_u64().unwrap() as usize;
    let number = |key: &str| facts[key].as_f64().unwrap();
    let config = ModelConfig {
        preset: None,
        family: Family::Llama,
        vocab_size: size("vocab_size"),
        hidden_size: size("hidden_size"),
        intermediate_size: size("intermediate_size"),
        num_layers: size("num_layers"),
        num_heads: size("num_heads"),
        num_kv_heads: size("num_kv_heads"),
        head_dim: size("head_dim"),
        rms_norm_eps: number("rms_norm_eps"),
        rope_base: number("rope_theta"),
        tie_word_embeddings: facts["tied"].as_bool().unwrap(),
        dtype: DtypeChoice::Fp32,
        residual_dtype: Dtype::Fp32,
        init_std: 0.02,
        init_from: None,
        freeze: Patterns::default(),
    };
    let scales = Scales {
        embedding: number("scale_embedding") as f32,
        linear: number("scale_linear") as f32,
        residual: number("scale_residual") as f32,
        norm: number("scale_norm") as f32,
    };
    (config, number("rope_theta"), scales)
}

/// The numbers of a JSON list.
pub fn numbers(list: &Value) -> Vec<f64> {
    list.as_array()
        .unwrap()
        .iter()
        .map(|value| value.as_f64().unwrap())
        .collect()
}
