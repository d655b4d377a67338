//! Tokenizers in Hugging Face's `tokenizer.json` format: loading, using and training them.

mod train;

pub use train::{TrainOptions, TrainReport, train};

use crate::error::{Error, Result};
use crate::mix;
use std::path::{Path, PathBuf};
use tokenizers::Tokenizer;

/// Names of end-of-text tokens to look for where no `tokenizer_config.json` names one.
const USUAL_EOS: [&str; 4] = ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>"];

/// A tokenizer and what shards say about it.
#[derive(Debug, Clone)]
pub struct TextTokenizer {
    path: PathBuf,
    inner: Tokenizer,
    hash: String,
    vocab_size: usize,
    eos_id: u32,
}

impl TextTokenizer {
    /// Loads a `tokenizer.json`, or the one in a folder. The end-of-text token is `eos`, or else
    /// what a `tokenizer_config.json` beside it names, or else a usual name found in the
    /// vocabulary.
    ///
    /// Text that spells a special token is tokenised like any other text: a document cannot end
    /// itself.
    ///
    /// # Errors
    /// A file that is no tokenizer, or an end-of-text token that it does not have.
    pub fn load(path: &Path, eos: Option<&str>) -> Result<Self> {
        let path = if path.is_dir() {
            path.join("tokenizer.json")
        } else {
            path.to_path_buf()
        };
        let failed = |problem: String| Error::Tokenizer {
            path: path.clone(),
            problem,
        };
        let bytes = std::fs::read(&path).map_err(Error::io("read the tokenizer", &path))?;
        let mut inner = Tokenizer::from_bytes(&bytes)
            .map_err(|e| failed(format!("not a tokenizer.json ({e})")))?;
        inner.set_encode_special_tokens(true);
        // Truncation and padding are for serving; training reads whole documents.
        inner
            .with_truncation(None)
            .map_err(|e| failed(e.to_string()))?;
        inner.with_padding(None);
        let vocabulary = inner.get_vocab(true);
        let vocab_size = vocabulary.values().max().map_or(0, |&id| id as usize + 1);
        let eos_id = match eos.map(str::to_string).or_else(|| configured_eos(&path)) {
            Some(name) => *vocabulary.get(&name).ok_or_else(|| {
                failed(format!(
                    "the end-of-text token \"{name}\" is not in its vocabulary"
                ))
            })?,
            None => USUAL_EOS
                .iter()
                .find_map(|name| vocabulary.get(*name).copied())
                .ok_or_else(|| failed("no end-of-text token found; name it with --eos".into()))?,
        };
        Ok(Self {
            hash: mix::content_hash(&bytes),
            path,
            inner,
            vocab_size,
            eos_id,
        })
    }

    /// The tokenizer.json.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// xxh3-128 of the tokenizer.json, in hexadecimal.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    /// Number of ids: the largest id plus one.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Id that ends every document.
    pub fn eos_id(&self) -> u32 {
        self.eos_id
    }

    /// The ids of a document, the end-of-text id last. May be called from several threads.
    ///
    /// # Errors
    /// When the tokenizer's own pipeline fails on the text.
    pub fn encode_document(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.encode(text)?;
        ids.push(self.eos_id);
        Ok(ids)
    }

    /// The ids of a text, without any special token.
    ///
    /// # Errors
    /// When the tokenizer's own pipeline fails on the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self
            .inner
            .encode_fast(text, false)
            .map_err(|e| self.failed(e))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of ids; special tokens are shown where `with_special`.
    ///
    /// # Errors
    /// When the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32], with_special: bool) -> Result<String> {
        self.inner
            .decode(ids, !with_special)
            .map_err(|e| self.failed(e))
    }

    fn failed(&self, error: tokenizers::Error) -> Error {
        Error::Tokenizer {
            path: self.path.clone(),
            problem: error.to_string(),
        }
    }
}

/// The `eos_token` of the `tokenizer_config.json` beside a tokenizer.json: a string, or an object
/// with the string in `content`.
fn configured_eos(tokenizer: &Path) -> Option<String> {
    let text = std::fs::read_to_string(tokenizer.with_file_name("tokenizer_config.json")).ok()?;
    let config: serde_json::Value = serde_json::from_str(&text).ok()?;
    let eos = config.get("eos_token")?;
    Some(
        eos.as_str()
            .or_else(|| eos.get("content")?.as_str())?
            .to_string(),
    )
}

#[cfg(test)]
mod tests;
