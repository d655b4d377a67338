//! The `[model]` table of a checkpoint's config, as far as the LLaMA layout is concerned.

use serde::{Deserialize, Serialize};

use super::{Error, LlamaConfig, LlamaSizes};
use crate::checkpoint::Checkpoint;

/// A config of which only `[model]` matters here.
#[derive(Serialize, Deserialize)]
struct Document {
    model: Table,
}

/// The keys of `[model]` that describe the tensors and what is computed with them. A run's config
/// has more; they are the config module's to check.
#[derive(Serialize, Deserialize)]
struct Table {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_layers: usize,
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    rms_norm_eps: f64,
    tie_word_embeddings: bool,
    #[serde(default = "default_init_std")]
    init_std: f64,
    /// Only in imported models: a run has these per context stage.
    rope_base: Option<f64>,
    /// As `rope_base`.
    max_seq_len: Option<usize>,
}

fn default_init_std() -> f64 {
    0.02
}

impl LlamaConfig {
    /// The model in a checkpoint. Rotary base and sequence length are those of the last context
    /// stage trained, or those the model was imported with.
    ///
    /// # Errors
    /// A `[model]` table without one of the sizes, or impossible sizes.
    pub fn from_checkpoint(checkpoint: &Checkpoint) -> Result<Self, Error> {
        let invalid = |detail: String| Error::Config {
            path: checkpoint.dir().to_owned(),
            detail,
        };
        let meta = checkpoint.meta();
        let document: Document = toml::from_str(&meta.config)
            .map_err(|error| invalid(format!("the config in its manifest: {error}")))?;
        let table = document.model;
        let stage = meta.stage.as_ref();
        let rope_base = stage.map(|stage| stage.rope_base).or(table.rope_base);
        let max_seq_len = stage.map(|stage| stage.seq_len).or(table.max_seq_len);
        let (Some(rope_base), Some(max_seq_len)) = (rope_base, max_seq_len) else {
            return Err(invalid(
                "it was saved before the first step, so no context stage tells the rotary base; \
                 use a later checkpoint"
                    .to_owned(),
            ));
        };
        let sizes = LlamaSizes {
            vocab_size: table.vocab_size,
            hidden_size: table.hidden_size,
            intermediate_size: table.intermediate_size,
            num_layers: table.num_layers,
            num_heads: table.num_heads,
            num_kv_heads: table.num_kv_heads,
            head_dim: table.head_dim,
            tie_word_embeddings: table.tie_word_embeddings,
        };
        sizes
            .check()
            .map_err(|detail| invalid(format!("[model]: {detail}")))?;
        Ok(Self {
            sizes,
            rms_norm_eps: table.rms_norm_eps,
            rope_base,
            max_seq_len,
            init_std: table.init_std,
            special_tokens: meta.special_tokens.clone(),
        })
    }

    /// The text of a config with this model's `[model]` table.
    pub(super) fn to_toml(&self) -> Result<String, toml::ser::Error> {
        let sizes = &self.sizes;
        toml::to_string(&Document {
            model: Table {
                vocab_size: sizes.vocab_size,
                hidden_size: sizes.hidden_size,
                intermediate_size: sizes.intermediate_size,
                num_layers: sizes.num_layers,
                num_heads: sizes.num_heads,
                num_kv_heads: sizes.num_kv_heads,
                head_dim: sizes.head_dim,
                rms_norm_eps: self.rms_norm_eps,
                tie_word_embeddings: sizes.tie_word_embeddings,
                init_std: self.init_std,
                rope_base: Some(self.rope_base),
                max_seq_len: Some(self.max_seq_len),
            },
        })
    }
}
