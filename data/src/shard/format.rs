//! Names, types, metadata and digests of the shard format, shared by writer and reader.

use crate::error::{Error, Result};
use arrow_schema::{DataType, Field, Schema};
use parquet::file::metadata::KeyValue;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use xxhash_rust::xxh3::Xxh3;

/// Version of the shard format that this crate writes, and the only one that it reads.
pub const FORMAT_VERSION: u32 = 1;

pub(super) const TOKENS: &str = "tokens";
pub(super) const N_TOKENS: &str = "n_tokens";
pub(super) const DOC_ID: &str = "doc_id";
pub(super) const LOSS_WEIGHT: &str = "loss_weight";
pub(super) const SOURCE: &str = "source";

const KEY_VERSION: &str = "oxitron.format_version";
const KEY_TOKENIZER: &str = "oxitron.tokenizer";
const KEY_VOCAB_SIZE: &str = "oxitron.vocab_size";
const KEY_EOS_ID: &str = "oxitron.eos_id";
const KEY_DOCUMENTS: &str = "oxitron.documents";
const KEY_TOKENS: &str = "oxitron.tokens";
const KEY_CHECKSUM: &str = "oxitron.checksum";
const KEY_ROW_GROUPS: &str = "oxitron.row_groups";

/// What all shards of one tokenisation have in common.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardHeader {
    /// xxh3-128 of the tokenizer.json, in hexadecimal.
    pub tokenizer: String,
    /// Number of ids that the tokenizer may emit: every id is below it.
    pub vocab_size: usize,
    /// Id that ends every document.
    pub eos_id: u32,
}

/// Counts and digests of one row group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowGroupSummary {
    /// Rows.
    pub documents: u64,
    /// Sum of `n_tokens`.
    pub tokens: u64,
    /// xxh3-64 over lengths, token ids and weights, in hexadecimal.
    pub tokens_digest: String,
    /// xxh3-64 over lengths and document ids, in hexadecimal.
    pub ids_digest: String,
}

/// Arrow schema of a shard.
pub(super) fn schema(with_weights: bool) -> Schema {
    let list = |name: &str, item: DataType| {
        let item = Arc::new(Field::new("element", item, false));
        Field::new(name, DataType::List(item), false)
    };
    let mut fields = vec![
        list(TOKENS, DataType::UInt32),
        Field::new(N_TOKENS, DataType::UInt32, false),
        Field::new(DOC_ID, DataType::Utf8, false),
        Field::new(SOURCE, DataType::Utf8, false),
    ];
    if with_weights {
        fields.push(list(LOSS_WEIGHT, DataType::Float16));
    }
    Schema::new(fields)
}

/// The file metadata of a finished shard.
pub(super) fn metadata(header: &ShardHeader, groups: &[RowGroupSummary]) -> Result<Vec<KeyValue>> {
    let row_groups = serde_json::to_string(groups).map_err(|e| Error::Option {
        option: "row groups",
        problem: e.to_string(),
    })?;
    let documents: u64 = groups.iter().map(|g| g.documents).sum();
    let tokens: u64 = groups.iter().map(|g| g.tokens).sum();
    let pairs = [
        (KEY_VERSION, FORMAT_VERSION.to_string()),
        (KEY_TOKENIZER, header.tokenizer.clone()),
        (KEY_VOCAB_SIZE, header.vocab_size.to_string()),
        (KEY_EOS_ID, header.eos_id.to_string()),
        (KEY_DOCUMENTS, documents.to_string()),
        (KEY_TOKENS, tokens.to_string()),
        (KEY_CHECKSUM, checksum(groups)),
        (KEY_ROW_GROUPS, row_groups),
    ];
    Ok(pairs
        .into_iter()
        .map(|(k, v)| KeyValue::new(k.to_string(), v))
        .collect())
}

/// Checksum of a shard's contents: a hash over the digests of its row groups.
pub(super) fn checksum(groups: &[RowGroupSummary]) -> String {
    let mut text = String::new();
    for group in groups {
        text.push_str(&group.tokens_digest);
        text.push_str(&group.ids_digest);
    }
    crate::mix::content_hash(text.as_bytes())
}

/// What the metadata of a shard say.
#[derive(Debug)]
pub(super) struct FileMetadata {
    pub header: ShardHeader,
    pub row_groups: Vec<RowGroupSummary>,
    pub checksum: String,
}

/// Reads the `oxitron.*` metadata and checks them against each other.
pub(super) fn parse_metadata(path: &Path, pairs: Option<&Vec<KeyValue>>) -> Result<FileMetadata> {
    let pairs: HashMap<&str, &str> = pairs
        .into_iter()
        .flatten()
        .filter_map(|pair| Some((pair.key.as_str(), pair.value.as_deref()?)))
        .collect();
    let schema_error = |what: &str, expected: &str, found: &str| Error::Schema {
        path: path.to_path_buf(),
        what: what.to_string(),
        expected: expected.to_string(),
        found: found.to_string(),
    };
    let text = |key: &str| {
        pairs
            .get(key)
            .copied()
            .ok_or_else(|| schema_error(key, "metadata key", "none"))
    };
    let number = |key: &str| -> Result<u64> {
        let value = text(key)?;
        value
            .parse()
            .map_err(|_| schema_error(key, "a whole number", value))
    };

    let version = number(KEY_VERSION)?;
    if version != u64::from(FORMAT_VERSION) {
        let expected = format!("{FORMAT_VERSION}, the one this build reads");
        return Err(schema_error(KEY_VERSION, &expected, &version.to_string()));
    }
    let vocab_size = number(KEY_VOCAB_SIZE)?;
    let eos_id = number(KEY_EOS_ID)?;
    if vocab_size > 1 << 32 || eos_id >= vocab_size {
        let found = format!("eos id {eos_id}, vocabulary {vocab_size}");
        return Err(schema_error(
            KEY_EOS_ID,
            "an eos id inside the vocabulary",
            &found,
        ));
    }
    let row_groups: Vec<RowGroupSummary> = serde_json::from_str(text(KEY_ROW_GROUPS)?)
        .map_err(|e| schema_error(KEY_ROW_GROUPS, "a list of row groups", &e.to_string()))?;
    let total = |pick: fn(&RowGroupSummary) -> u64| {
        row_groups
            .iter()
            .try_fold(0u64, |sum, group| sum.checked_add(pick(group)))
    };
    let sums = [
        (KEY_DOCUMENTS, total(|g| g.documents)),
        (KEY_TOKENS, total(|g| g.tokens)),
    ];
    for (key, sum) in sums {
        let stated = number(key)?;
        if sum != Some(stated) {
            return Err(schema_error(
                key,
                "the sum over the row groups",
                &stated.to_string(),
            ));
        }
    }
    let stated = text(KEY_CHECKSUM)?;
    if stated != checksum(&row_groups) {
        return Err(schema_error(KEY_CHECKSUM, &checksum(&row_groups), stated));
    }
    Ok(FileMetadata {
        header: ShardHeader {
            tokenizer: text(KEY_TOKENIZER)?.to_string(),
            vocab_size: vocab_size as usize,
            eos_id: eos_id as u32,
        },
        checksum: stated.to_string(),
        row_groups,
    })
}

/// Digest over lengths, token ids and weights of a row group.
pub(super) fn tokens_digest(lengths: &[u32], tokens: &[u32], weights: Option<&[u16]>) -> String {
    let mut hasher = Xxh3::new();
    update_u32(&mut hasher, lengths);
    update_u32(&mut hasher, tokens);
    for chunk in weights.unwrap_or_default().chunks(2048) {
        let bytes: Vec<u8> = chunk.iter().flat_map(|w| w.to_le_bytes()).collect();
        hasher.update(&bytes);
    }
    format!("{:016x}", hasher.digest())
}

/// Digest over lengths and document ids of a row group.
pub(super) fn ids_digest<'a>(lengths: &[u32], ids: impl Iterator<Item = &'a str>) -> String {
    let mut hasher = Xxh3::new();
    update_u32(&mut hasher, lengths);
    for id in ids {
        hasher.update(&(id.len() as u64).to_le_bytes());
        hasher.update(id.as_bytes());
    }
    format!("{:016x}", hasher.digest())
}

/// Feeds words in little-endian bytes, through a buffer that keeps the hasher on long inputs.
fn update_u32(hasher: &mut Xxh3, words: &[u32]) {
    let mut buffer = [0u8; 8192];
    for chunk in words.chunks(buffer.len() / 4) {
        for (bytes, word) in buffer.chunks_exact_mut(4).zip(chunk) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        hasher.update(&buffer[..chunk.len() * 4]);
    }
}
