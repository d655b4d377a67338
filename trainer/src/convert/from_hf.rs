//! From a Hugging Face folder to a checkpoint of weights.

use std::path::Path;
use std::time::Duration;

use super::llama::{EMBEDDING, HEAD};
use super::staging::StagedFolder;
use super::{Error, HfFolder, list_of_tensors, tokenizer_attachments};
use crate::checkpoint::{ManifestMeta, PartWriter, PieceSpec, StateKind, commit};

/// Elements read and written at a time.
const BLOCK: usize = 1 << 20;
/// The save id of every import.
const SAVE_ID: &str = "import";

/// What was imported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Imported {
    /// Number of tensors.
    pub tensors: usize,
    /// Number of weights.
    pub parameters: u64,
    /// Bytes of the checkpoint.
    pub bytes: u64,
}

/// Writes the weights of a Hugging Face folder as a checkpoint `out`, which must not exist yet: fp32
/// master weights only, step 0, the model's `[model]` table as config, the tokenizer files attached.
/// `progress` is told the weights written and the weights to write.
///
/// # Errors
/// What [`HfFolder::open`] refuses, a tied head that is stored and differs from the embedding, an
/// output that exists, a failed read or write. `out` then does not exist.
pub fn from_hf(
    hf_dir: &Path,
    out: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Imported, Error> {
    let folder = HfFolder::open(hf_dir)?;
    if folder.has_redundant_head() {
        check_head(&folder)?;
    }
    let config = folder.config();
    let tensors = list_of_tensors(&config.sizes);
    let text = config.to_toml().map_err(|error| Error::Config {
        path: hf_dir.join("config.json"),
        detail: error.to_string(),
    })?;
    let counts: Vec<usize> = tensors
        .iter()
        .map(|(_, shape)| shape.iter().product())
        .collect();
    let total = counts.iter().map(|count| *count as u64).sum();

    let staged = StagedFolder::create(out)?;
    let pieces = tensors
        .iter()
        .zip(&counts)
        .map(|((name, shape), count)| PieceSpec::flat(name, StateKind::Master, shape, 0..*count));
    let mut writer = PartWriter::create(staged.path(), 0, 1, SAVE_ID, pieces)?;
    let mut done = 0;
    let mut buffer = vec![0.0; BLOCK];
    progress(done, total);
    for ((name, _), count) in tensors.iter().zip(&counts) {
        for start in (0..*count).step_by(BLOCK) {
            let range = start..(*count).min(start + BLOCK);
            let values = &mut buffer[..range.len()];
            folder.read_f32(name, range, values)?;
            writer.write(values)?;
            done += values.len() as u64;
            progress(done, total);
        }
    }
    writer.finish()?;
    let meta = ManifestMeta {
        run_id: "imported".to_owned(),
        special_tokens: config.special_tokens.clone(),
        config: text,
        ..ManifestMeta::default()
    };
    let attachments = tokenizer_attachments(hf_dir);
    let committed = commit(
        staged.path(),
        1,
        SAVE_ID,
        &meta,
        &attachments,
        Duration::from_secs(60),
    )?;
    staged.publish()?;
    Ok(Imported {
        tensors: tensors.len(),
        parameters: total,
        bytes: committed.bytes,
    })
}

/// Checks that a head stored beside tied embeddings is the embedding.
fn check_head(folder: &HfFolder) -> Result<(), Error> {
    let count: usize = folder.shape(EMBEDDING).unwrap_or_default().iter().product();
    let (mut embedding, mut head) = (vec![0.0; BLOCK], vec![0.0; BLOCK]);
    for start in (0..count).step_by(BLOCK) {
        let range = start..count.min(start + BLOCK);
        let (embedding, head) = (&mut embedding[..range.len()], &mut head[..range.len()]);
        folder.read_f32(EMBEDDING, range.clone(), embedding)?;
        folder.read_f32(HEAD, range, head)?;
        let bits = |values: &[f32], at: usize| values[at].to_bits();
        if let Some(at) = (0..head.len()).find(|at| bits(embedding, *at) != bits(head, *at)) {
            let detail = format!(
                "tie_word_embeddings is true, but `{HEAD}` differs from `{EMBEDDING}` at element \
                 {}; set tie_word_embeddings to false if the head is meant, or remove it",
                start + at
            );
            return Err(Error::Tensors {
                dir: folder.dir().to_owned(),
                detail,
            });
        }
    }
    Ok(())
}
