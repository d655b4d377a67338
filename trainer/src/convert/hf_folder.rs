//! A Hugging Face folder of the LLaMA layout, as a source of tensors.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::llama::HEAD;
use super::tensor_file::{StoredTensor, TensorFile};
use super::{Error, LlamaConfig, hf_config, list_of_tensors};
use crate::checkpoint::durable::read_small_file;
use crate::checkpoint::is_plain_name;

/// The largest `config.json` or index that is read.
const MAX_JSON_BYTES: u64 = 64 << 20;
/// Differences that an error spells out.
const SHOWN: usize = 5;

/// An open folder: config, and tensors that are read as `f32`. When it is open, the tensors are
/// known to be exactly those that the config describes.
///
/// Can be shared between threads; reads do not wait for each other.
#[derive(Debug)]
pub struct HfFolder {
    dir: PathBuf,
    config: LlamaConfig,
    files: Vec<TensorFile>,
    /// File of each tensor.
    by_name: HashMap<String, usize>,
}

/// `model.safetensors.index.json`. Other keys are bookkeeping.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl HfFolder {
    /// Opens a folder with `config.json` and either `model.safetensors` or
    /// `model.safetensors.index.json` with its shards.
    ///
    /// # Errors
    /// A file that is missing or damaged, a config that is not supported, tensors that are missing,
    /// unexpected or of another shape. Buffers of rotary frequencies are ignored; a head beside tied
    /// embeddings is accepted, see [`HfFolder::has_redundant_head`].
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, Error> {
        let dir = dir.as_ref();
        let path = dir.join("config.json");
        if !path.is_file() {
            let detail = "it has no config.json; check the path".to_owned();
            return Err(Error::NotAFolder {
                dir: dir.to_owned(),
                detail,
            });
        }
        let config = hf_config::parse(&path, &read_small_file(&path, MAX_JSON_BYTES)?)?;
        let (files, by_name) = open_files(dir)?;
        let folder = Self {
            dir: dir.to_owned(),
            config,
            files,
            by_name,
        };
        folder.check_tensors()?;
        Ok(folder)
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What `config.json` says.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// The names of the stored tensors, a redundant head and ignored buffers included, in no
    /// particular order.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.by_name.keys().map(String::as_str)
    }

    /// The shape of a stored tensor.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.stored(name).map(|tensor| tensor.shape.as_slice())
    }

    /// Whether a head is stored although the embeddings are tied. Its values should be compared
    /// with the embedding's before it is ignored.
    pub fn has_redundant_head(&self) -> bool {
        self.config.sizes.tie_word_embeddings && self.by_name.contains_key(HEAD)
    }

    /// Reads the elements `range` (row-major) of a tensor as `f32` into `out`.
    ///
    /// # Errors
    /// No such tensor, a range outside it, an `out` of another length, an element type other than
    /// F32, BF16 and F16, a failed read.
    pub fn read_f32(&self, name: &str, range: Range<usize>, out: &mut [f32]) -> Result<(), Error> {
        let file = self.by_name.get(name).map(|index| &self.files[*index]);
        let count = self.shape(name).map_or(0, |shape| shape.iter().product());
        let fits = range.start <= range.end && range.end <= count && out.len() == range.len();
        if let Some(file) = file.filter(|_| fits) {
            return file.read(name, range, out);
        }
        let detail = format!(
            "elements {range:?} into a buffer of {} were asked for; it has {count} elements",
            out.len()
        );
        Err(Error::Request {
            tensor: name.to_owned(),
            detail,
        })
    }

    fn stored(&self, name: &str) -> Option<&StoredTensor> {
        self.by_name
            .get(name)
            .and_then(|index| self.files[*index].tensors().get(name))
    }

    /// Compares names and shapes with what the config describes.
    fn check_tensors(&self) -> Result<(), Error> {
        let expected = list_of_tensors(&self.config.sizes);
        let mut differences = Vec::new();
        let mut check = |name: &str, shape: &[usize], required: bool| match self.stored(name) {
            None if required => differences.push(format!("`{name}` {shape:?} is missing")),
            None => {}
            Some(stored) if stored.shape != shape => differences.push(format!(
                "`{name}` has shape {:?}, {shape:?} was expected",
                stored.shape
            )),
            Some(stored) if !["F32", "BF16", "F16"].contains(&stored.dtype.as_str()) => differences
                .push(format!(
                    "`{name}` is {}; F32, BF16 or F16 was expected",
                    stored.dtype
                )),
            Some(_) => {}
        };
        for (name, shape) in &expected {
            check(name, shape, true);
        }
        let sizes = &self.config.sizes;
        if sizes.tie_word_embeddings {
            check(HEAD, &[sizes.vocab_size, sizes.hidden_size], false);
        }
        let known: HashSet<&str> = expected.iter().map(|(name, _)| name.as_str()).collect();
        let mut unexpected: Vec<&str> = self
            .tensor_names()
            .filter(|name| !known.contains(name) && !is_ignored(name))
            .filter(|name| !(sizes.tie_word_embeddings && *name == HEAD))
            .collect();
        unexpected.sort_unstable();
        differences.extend(
            unexpected
                .iter()
                .map(|name| format!("`{name}` is unexpected")),
        );
        if differences.is_empty() {
            return Ok(());
        }
        let mut detail = differences[..differences.len().min(SHOWN)].join("; ");
        if differences.len() > SHOWN {
            detail += &format!("; and {} more differences", differences.len() - SHOWN);
        }
        Err(Error::Tensors {
            dir: self.dir.clone(),
            detail,
        })
    }
}

/// Buffers that some exporters stored with the weights; they follow from the config.
fn is_ignored(name: &str) -> bool {
    name.ends_with("rotary_emb.inv_freq")
}

/// Opens the one file or the shards of the index.
fn open_files(dir: &Path) -> Result<(Vec<TensorFile>, HashMap<String, usize>), Error> {
    let index_path = dir.join("model.safetensors.index.json");
    let single = dir.join("model.safetensors");
    if !index_path.is_file() {
        if !single.is_file() {
            let detail = "it has neither model.safetensors nor model.safetensors.index.json; \
                          weights in pytorch_model.bin must be saved as safetensors first";
            return Err(Error::NotAFolder {
                dir: dir.to_owned(),
                detail: detail.to_owned(),
            });
        }
        let file = TensorFile::open(&single)?;
        let by_name = file
            .tensors()
            .keys()
            .map(|name| (name.clone(), 0))
            .collect();
        return Ok((vec![file], by_name));
    }
    let bad = |detail: String| Error::File {
        path: index_path.clone(),
        detail,
    };
    let index: Index = serde_json::from_slice(&read_small_file(&index_path, MAX_JSON_BYTES)?)
        .map_err(|error| bad(format!("not an index: {error}")))?;
    let mut files: Vec<TensorFile> = Vec::new();
    let mut opened: HashMap<&str, usize> = HashMap::new();
    let mut by_name = HashMap::new();
    for (tensor, name) in &index.weight_map {
        let number = match opened.get(name.as_str()) {
            Some(number) => *number,
            None => {
                if !is_plain_name(name) {
                    return Err(bad(format!("{name:?} is not a plain file name")));
                }
                files.push(TensorFile::open(&dir.join(name))?);
                opened.insert(name, files.len() - 1);
                files.len() - 1
            }
        };
        if !files[number].tensors().contains_key(tensor) {
            return Err(bad(format!("tensor `{tensor}` is not in `{name}`")));
        }
        by_name.insert(tensor.clone(), number);
    }
    for file in &files {
        let unlisted = file
            .tensors()
            .keys()
            .find(|name| !by_name.contains_key(*name) && !is_ignored(name));
        if let Some(name) = unlisted {
            let detail = format!("tensor `{name}` of {} is not listed", file.path().display());
            return Err(bad(detail));
        }
    }
    Ok((files, by_name))
}
