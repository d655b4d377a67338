//! The safetensors container, as far as a writer needs it.
//!
//! A file is the length of its header (u64, little-endian), the header (JSON, padded with spaces to
//! a multiple of 8 bytes), and the tensors one after the other. Format:
//! <https://github.com/huggingface/safetensors#format>.

use serde_json::{Map, Value, json};

use super::dtype::Dtype;

/// An entry of a file that is about to be written.
pub(crate) struct Slot<'a> {
    /// Its name, unique in the file.
    pub name: &'a str,
    /// Its shape.
    pub shape: &'a [usize],
    /// Its element type.
    pub dtype: Dtype,
    /// Its size in bytes.
    pub bytes: u64,
}

/// The bytes before the first tensor, for entries that follow in this order without gaps.
pub(crate) fn header<'a>(
    metadata: &[(&str, &str)],
    slots: impl Iterator<Item = Slot<'a>>,
) -> Result<Vec<u8>, serde_json::Error> {
    let mut entries = Map::new();
    if !metadata.is_empty() {
        let pairs = metadata
            .iter()
            .map(|(key, value)| ((*key).to_owned(), Value::from(*value)));
        entries.insert("__metadata__".to_owned(), Value::Object(pairs.collect()));
    }
    let mut offset = 0;
    for slot in slots {
        let end = offset + slot.bytes;
        let entry = json!({
            "dtype": slot.dtype.name(),
            "shape": slot.shape,
            "data_offsets": [offset, end],
        });
        entries.insert(slot.name.to_owned(), entry);
        offset = end;
    }
    let mut json = serde_json::to_vec(&entries)?;
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut json);
    Ok(bytes)
}
