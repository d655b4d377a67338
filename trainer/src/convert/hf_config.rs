//! `config.json`: both styles in, the style that every release reads out.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{Error, LlamaConfig, LlamaSizes};
use crate::checkpoint::{Dtype, SpecialTokens};

/// The keys that decide what a model computes. All others are bookkeeping and are ignored.
#[derive(Deserialize)]
struct Raw {
    model_type: Option<String>,
    vocab_size: Option<usize>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    hidden_act: Option<String>,
    rms_norm_eps: Option<f64>,
    max_position_embeddings: Option<usize>,
    initializer_range: Option<f64>,
    tie_word_embeddings: Option<bool>,
    rope_theta: Option<f64>,
    rope_scaling: Option<Value>,
    rope_parameters: Option<Value>,
    partial_rotary_factor: Option<f64>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    attention_dropout: Option<f64>,
    quantization_config: Option<Value>,
    bos_token_id: Option<Ids>,
    eos_token_id: Option<Ids>,
    pad_token_id: Option<Ids>,
}

/// Token ids: one or several. Old configs write -1 for none.
#[derive(Deserialize)]
#[serde(untagged)]
enum Ids {
    One(i64),
    Several(Vec<i64>),
}

impl Ids {
    fn list(ids: Option<Self>) -> Vec<u32> {
        let ids = match ids {
            None => Vec::new(),
            Some(Self::One(id)) => vec![id],
            Some(Self::Several(ids)) => ids,
        };
        ids.into_iter()
            .filter_map(|id| u32::try_from(id).ok())
            .collect()
    }

    fn first(ids: Option<Self>) -> Option<u32> {
        Self::list(ids).first().copied()
    }
}

/// Reads a `config.json`. Keys that may be absent have the defaults of transformers' LLaMA.
pub(super) fn parse(path: &Path, bytes: &[u8]) -> Result<LlamaConfig, Error> {
    let invalid = |detail: String| Error::Config {
        path: path.to_owned(),
        detail,
    };
    let raw: Raw = serde_json::from_slice(bytes).map_err(|error| invalid(error.to_string()))?;
    refuse(path, &raw)?;
    let rope_base = rope_base(path, &raw)?;
    let need = |key: &str, value: Option<usize>| {
        value.ok_or_else(|| invalid(format!("`{key}` is missing")))
    };
    let hidden_size = need("hidden_size", raw.hidden_size)?;
    let num_heads = need("num_attention_heads", raw.num_attention_heads)?;
    let head_dim = match raw.head_dim {
        Some(head_dim) => head_dim,
        None if num_heads > 0 && hidden_size.is_multiple_of(num_heads) => hidden_size / num_heads,
        None => {
            return Err(invalid(format!(
                "`head_dim` is missing and hidden_size = {hidden_size} is no multiple of \
                 num_attention_heads = {num_heads}"
            )));
        }
    };
    let sizes = LlamaSizes {
        vocab_size: need("vocab_size", raw.vocab_size)?,
        hidden_size,
        intermediate_size: need("intermediate_size", raw.intermediate_size)?,
        num_layers: need("num_hidden_layers", raw.num_hidden_layers)?,
        num_heads,
        num_kv_heads: raw.num_key_value_heads.unwrap_or(num_heads),
        head_dim,
        tie_word_embeddings: raw.tie_word_embeddings.unwrap_or(false),
    };
    sizes.check().map_err(invalid)?;
    let config = LlamaConfig {
        sizes,
        rms_norm_eps: raw.rms_norm_eps.unwrap_or(1e-6),
        rope_base,
        max_seq_len: raw.max_position_embeddings.unwrap_or(2048),
        init_std: raw.initializer_range.unwrap_or(0.02),
        special_tokens: SpecialTokens {
            bos: Ids::first(raw.bos_token_id),
            eos: Ids::list(raw.eos_token_id),
            pad: Ids::first(raw.pad_token_id),
        },
    };
    let positive = |value: f64| value.is_finite() && value > 0.0;
    if !positive(config.rms_norm_eps) || !positive(config.rope_base) || config.max_seq_len == 0 {
        return Err(invalid(format!(
            "rms_norm_eps = {}, rope_theta = {} and max_position_embeddings = {} must be positive",
            config.rms_norm_eps, config.rope_base, config.max_seq_len
        )));
    }
    Ok(config)
}

/// Refuses what this layout cannot express, by key.
fn refuse(path: &Path, raw: &Raw) -> Result<(), Error> {
    let unsupported =
        |key: &str, found: String, supported: &str| Err(unsupported(path, key, found, supported));
    match raw.model_type.as_deref() {
        Some("llama") => {}
        Some(other) => return unsupported("model_type", format!("{other:?}"), "\"llama\""),
        None => return unsupported("model_type", "nothing".to_owned(), "\"llama\""),
    }
    if let Some(act) = raw
        .hidden_act
        .as_deref()
        .filter(|act| !["silu", "swish"].contains(act))
    {
        return unsupported("hidden_act", format!("{act:?}"), "\"silu\"");
    }
    for (key, value) in [
        ("attention_bias", raw.attention_bias),
        ("mlp_bias", raw.mlp_bias),
    ] {
        if value == Some(true) {
            return unsupported(key, "true".to_owned(), "false");
        }
    }
    if let Some(dropout) = raw.attention_dropout.filter(|dropout| *dropout != 0.0) {
        return unsupported("attention_dropout", dropout.to_string(), "0");
    }
    if let Some(factor) = raw.partial_rotary_factor.filter(|factor| *factor != 1.0) {
        return unsupported("partial_rotary_factor", factor.to_string(), "1");
    }
    if raw
        .quantization_config
        .as_ref()
        .is_some_and(|config| !config.is_null())
    {
        return unsupported(
            "quantization_config",
            "an object".to_owned(),
            "no quantisation",
        );
    }
    Ok(())
}

fn unsupported(path: &Path, key: &str, found: String, supported: &str) -> Error {
    let (key, supported) = (key.to_owned(), supported.to_owned());
    Error::Unsupported {
        path: path.to_owned(),
        key,
        found,
        supported,
    }
}

/// The rotary base from `rope_theta` (4.x) or `rope_parameters` (5.x; `rope_scaling` is its alias
/// there), and a refusal of every scaling.
fn rope_base(path: &Path, raw: &Raw) -> Result<f64, Error> {
    let mut stated = raw.rope_theta;
    let tables = [
        ("rope_scaling", &raw.rope_scaling),
        ("rope_parameters", &raw.rope_parameters),
    ];
    for (key, table) in tables {
        let table = match table {
            None | Some(Value::Null) => continue,
            Some(Value::Object(table)) => table,
            Some(other) => {
                let detail = format!("`{key}` = {other} is not a table");
                return Err(Error::Config {
                    path: path.to_owned(),
                    detail,
                });
            }
        };
        let plain = "\"default\" (no scaling)";
        let mut kind = "default";
        for name in ["type", "rope_type"] {
            match table.get(name) {
                None | Some(Value::Null) => {}
                Some(Value::String(value)) if value == "default" => {}
                Some(Value::String(value)) => kind = value,
                Some(other) => {
                    return Err(unsupported(
                        path,
                        &format!("{key}.{name}"),
                        other.to_string(),
                        plain,
                    ));
                }
            }
        }
        if kind != "default" {
            return Err(unsupported(
                path,
                &format!("{key}.rope_type"),
                format!("{kind:?}"),
                plain,
            ));
        }
        for (name, value) in table {
            match name.as_str() {
                "type" | "rope_type" => {}
                "rope_theta" => {
                    let theta = value.as_f64();
                    if theta.is_none() || stated.is_some_and(|stated| Some(stated) != theta) {
                        let detail = format!(
                            "`{key}.rope_theta` = {value} is no number or contradicts another \
                             `rope_theta`"
                        );
                        return Err(Error::Config {
                            path: path.to_owned(),
                            detail,
                        });
                    }
                    stated = theta;
                }
                "partial_rotary_factor" if value.as_f64() == Some(1.0) => {}
                // Without a type, a factor is a scaling all the same; per-layer tables are objects.
                _ => {
                    let found = value.to_string();
                    return Err(unsupported(
                        path,
                        &format!("{key}.{name}"),
                        found,
                        "only rope_theta",
                    ));
                }
            }
        }
    }
    Ok(stated.unwrap_or(10_000.0))
}

/// Makes a `config.json` that transformers 4.x and 5.x both read.
pub(super) fn to_json(config: &LlamaConfig, dtype: Dtype) -> Value {
    let sizes = &config.sizes;
    let tokens = &config.special_tokens;
    let dtype = match dtype {
        Dtype::F32 => "float32",
        Dtype::Bf16 => "bfloat16",
        Dtype::F16 => "float16",
    };
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_kv_heads,
        "head_dim": sizes.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rope_theta": config.rope_base,
        "rope_scaling": null,
        "rms_norm_eps": config.rms_norm_eps,
        "initializer_range": config.init_std,
        "attention_bias": false,
        "attention_dropout": 0.0,
        "mlp_bias": false,
        "pretraining_tp": 1,
        "tie_word_embeddings": sizes.tie_word_embeddings,
        "use_cache": true,
        "bos_token_id": tokens.bos,
        "eos_token_id": eos(tokens),
        "pad_token_id": tokens.pad,
        "torch_dtype": dtype,
    })
}

/// Makes a `generation_config.json`.
pub(super) fn generation_json(tokens: &SpecialTokens) -> Value {
    let mut map = Map::new();
    map.insert("_from_model_config".to_owned(), Value::Bool(true));
    if let Some(id) = tokens.bos {
        map.insert("bos_token_id".to_owned(), json!(id));
    }
    if !tokens.eos.is_empty() {
        map.insert("eos_token_id".to_owned(), eos(tokens));
    }
    if let Some(id) = tokens.pad {
        map.insert("pad_token_id".to_owned(), json!(id));
    }
    Value::Object(map)
}

/// One id as a number, several as a list, none as null.
fn eos(tokens: &SpecialTokens) -> Value {
    match tokens.eos.as_slice() {
        [] => Value::Null,
        [id] => json!(id),
        several => json!(several),
    }
}
