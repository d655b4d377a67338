//! Why a model could not be converted.

use std::path::PathBuf;

use crate::checkpoint;

/// An error of this module. Each message names the file and key or tensor, what was expected, what
/// was found, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A checkpoint could not be read or written, or a file operation failed.
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::Error),
    /// A folder is not a Hugging Face folder with safetensors.
    #[error("{} is not a Hugging Face folder: {detail}", .dir.display())]
    NotAFolder {
        /// The folder.
        dir: PathBuf,
        /// What is missing, and what to do.
        detail: String,
    },
    /// A config cannot be understood.
    #[error("{}: {detail}", .path.display())]
    Config {
        /// The file, or the checkpoint whose config is meant.
        path: PathBuf,
        /// Which key, what was expected, what was found.
        detail: String,
    },
    /// The model has a property that this layout cannot express.
    #[error(
        "{}: `{key}` = {found} is not supported, {supported} is; the model cannot be imported \
         without changing what it computes",
        .path.display()
    )]
    Unsupported {
        /// `config.json`.
        path: PathBuf,
        /// The key.
        key: String,
        /// Its value.
        found: String,
        /// The values that are supported.
        supported: String,
    },
    /// A safetensors file or an index is damaged or inconsistent.
    #[error("{}: {detail}; copy or download the file again", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Where, what was expected, what was found.
        detail: String,
    },
    /// The tensors are not those that the config describes.
    #[error("{}: the tensors do not fit config.json: {detail}", .dir.display())]
    Tensors {
        /// The folder.
        dir: PathBuf,
        /// Missing, unexpected and misshapen tensors.
        detail: String,
    },
    /// A caller asked for something that does not fit a tensor.
    #[error("tensor `{tensor}`: {detail}")]
    Request {
        /// The tensor.
        tensor: String,
        /// What was asked for, and what fits.
        detail: String,
    },
    /// A value that the chosen element type cannot hold.
    #[error("tensor `{tensor}` holds {value}, which F16 cannot; export with bf16 or fp32 instead")]
    Overflow {
        /// The tensor.
        tensor: String,
        /// The value.
        value: f32,
    },
    /// The output exists already.
    #[error("{} exists already; remove it or choose another output", .path.display())]
    OutputExists {
        /// The output.
        path: PathBuf,
    },
}
