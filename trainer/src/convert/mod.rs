//! Hugging Face folders in and out, for the LLaMA layout.
//!
//! A checkpoint of this project already names and orients its tensors as a Hugging Face folder
//! does, so conversion is a change of container and element type, never of layout. What deserves
//! care is the metadata around the tensors:
//!
//! - `config.json` is written with the keys that both transformers 4.x and 5.x read (`rope_theta`,
//!   `rope_scaling`, `torch_dtype`), and read in both styles (5.x nests `rope_parameters`). The 4.x
//!   releases fall back to a rotary base of 10000, silently, when they meet only the new style.
//! - safetensors files carry `{"format": "pt"}`, without which some releases crash.
//! - A tied head is stored once. On import a redundant copy is accepted if it is equal.
//!
//! [`HfFolder`] streams tensors out of a folder, and is what `from-hf`, `init_from` and generation
//! read through; [`HfWriter`] streams them into one. [`to_hf()`] and [`from_hf()`] put these together,
//! with memory for one slice of one tensor. Their output appears under its name only when it is
//! complete.
//!
//! # What it refuses
//!
//! Anything whose meaning would be lost: rotary scaling, biases, other activations, quantised
//! weights, other model types, tensors that are missing, unexpected or of another shape. Headers
//! and indices are treated as hostile input.

mod error;
mod from_hf;
mod hf_config;
mod hf_folder;
mod hf_writer;
mod llama;
mod model_table;
mod staging;
mod tensor_file;
mod to_hf;
mod tokenizer;

#[cfg(test)]
mod tests;

pub use error::Error;
pub use from_hf::{Imported, from_hf};
pub use hf_folder::HfFolder;
pub use hf_writer::{HfWriter, Written};
pub use llama::{LlamaConfig, LlamaSizes, list_of_tensors};
pub use to_hf::{DEFAULT_SHARD_BYTES, ExportOptions, to_hf};
pub use tokenizer::tokenizer_attachments;
