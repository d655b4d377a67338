//! The files of a tokenizer, which travel with a model from folder to folder.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::hf_writer::write_json;
use super::{Error, LlamaConfig};
use crate::checkpoint::durable::write_file;
use crate::checkpoint::{Attachment, Checkpoint};

/// The files that are carried, verbatim but for what [`for_both_releases`] does.
const CARRIED: [&str; 9] = [
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
];
/// The largest carried file, in bytes.
const MAX_BYTES: u64 = 512 << 20;

/// The tokenizer files in the folder `dir`, to be attached to a checkpoint.
pub fn tokenizer_attachments(dir: &Path) -> Vec<Attachment> {
    CARRIED
        .iter()
        .map(|name| Attachment {
            name: (*name).to_owned(),
            source: dir.join(name),
        })
        .filter(|attachment| attachment.source.is_file())
        .collect()
}

/// Writes the tokenizer files that a checkpoint carries into `dir`. If it carries a tokenizer
/// without the two small files that name its special tokens, they are made from the tokens' ids.
/// Returns the names of the files written.
pub(super) fn export(
    checkpoint: &Checkpoint,
    config: &LlamaConfig,
    dir: &Path,
) -> Result<Vec<String>, Error> {
    let mut written = Vec::new();
    let mut tokenizer = None;
    for file in checkpoint
        .attachments()
        .filter(|file| CARRIED.contains(&file.name.as_str()))
    {
        let mut bytes = checkpoint.read_attachment(&file.name, MAX_BYTES)?;
        if file.name == "tokenizer_config.json" {
            bytes = for_both_releases(bytes);
        }
        write_file(dir, &file.name, &bytes)?;
        written.push(file.name.clone());
        if file.name == "tokenizer.json" {
            tokenizer = Some(bytes);
        }
    }
    let Some(tokenizer) = tokenizer else {
        return Ok(written);
    };
    let tokenizer: Value = serde_json::from_slice(&tokenizer).map_err(|error| Error::File {
        path: checkpoint.dir().join("tokenizer.json"),
        detail: error.to_string(),
    })?;
    let special = special_tokens(&tokenizer, config);
    let mut make = |name: &str, value: Value| {
        if written.iter().any(|file| file == name) {
            return Ok(());
        }
        written.push(name.to_owned());
        write_json(dir, name, &value)
    };
    let mut tokenizer_config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_seq_len,
        "clean_up_tokenization_spaces": false,
    });
    if let Value::Object(map) = &mut tokenizer_config {
        map.extend(special.clone());
    }
    make("tokenizer_config.json", tokenizer_config)?;
    make("special_tokens_map.json", Value::Object(special))?;
    Ok(written)
}

/// A `tokenizer_config.json` that transformers 4.x loads too. For a plain tokenizer.json 5.x writes
/// the class `TokenizersBackend`, which 4.x refuses; `PreTrainedTokenizerFast` means the same in both.
fn for_both_releases(bytes: Vec<u8>) -> Vec<u8> {
    let Ok(Value::Object(mut config)) = serde_json::from_slice(&bytes) else {
        return bytes;
    };
    match config.get_mut("tokenizer_class") {
        Some(class) if *class == "TokenizersBackend" => *class = json!("PreTrainedTokenizerFast"),
        _ => return bytes,
    }
    serde_json::to_vec_pretty(&config).unwrap_or(bytes)
}

/// The texts of the model's special tokens, by the names transformers gives them.
fn special_tokens(tokenizer: &Value, config: &LlamaConfig) -> Map<String, Value> {
    let text = |id: u32| {
        tokenizer["added_tokens"]
            .as_array()?
            .iter()
            .find(|token| token["id"].as_u64() == Some(u64::from(id)))
            .map(|token| token["content"].clone())
    };
    let tokens = &config.special_tokens;
    let roles = [
        ("bos_token", tokens.bos),
        ("eos_token", tokens.eos.first().copied()),
        ("pad_token", tokens.pad),
    ];
    roles
        .into_iter()
        .filter_map(|(role, id)| Some((role.to_owned(), text(id?)?)))
        .collect()
}
