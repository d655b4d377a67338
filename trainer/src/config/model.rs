//! `[model]`: architecture, number formats, where the weights begin.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::patterns::Patterns;

/// A decoder's sizes and formats.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    /// The preset that the sizes began with; they stand below in full.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preset: Option<String>,
    /// Architecture.
    pub family: Family,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the SwiGLU.
    pub intermediate_size: usize,
    /// Blocks.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Width of a head; even. `num_heads · head_dim` may differ from `hidden_size`.
    pub head_dim: usize,
    /// Added to the mean square inside the root of RMSNorm.
    pub rms_norm_eps: f64,
    /// RoPE base of the stages that do not set their own.
    pub rope_base: f64,
    /// Whether the output matrix is the embedding.
    pub tie_word_embeddings: bool,
    /// Number format of weights and activations, as asked for; see [`DtypeChoice::resolve`].
    pub dtype: DtypeChoice,
    /// Number format of the residual stream.
    pub residual_dtype: Dtype,
    /// Standard deviation of the initial weights.
    pub init_std: f64,
    /// A checkpoint or a Hugging Face folder to take the weights from (absolute path).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init_from: Option<PathBuf>,
    /// Tensors that are not trained.
    pub freeze: Patterns,
}

impl ModelConfig {
    /// Parameters of the model, a tied matrix counted once.
    pub fn parameters(&self) -> u64 {
        let [
            vocab,
            hidden,
            intermediate,
            layers,
            heads,
            kv_heads,
            head_dim,
        ] = [
            self.vocab_size,
            self.hidden_size,
            self.intermediate_size,
            self.num_layers,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
        ]
        .map(|size| size as u128);
        let attention = hidden * head_dim * (2 * heads + 2 * kv_heads);
        let block = attention + 3 * hidden * intermediate + 2 * hidden;
        let matrices = if self.tie_word_embeddings { 1 } else { 2 };
        let total = layers * block + matrices * vocab * hidden + hidden;
        u64::try_from(total).unwrap_or(u64::MAX)
    }
}

/// Architectures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// RMSNorm, half-split RoPE, grouped-query attention, SwiGLU, no biases.
    Llama,
}

/// A number format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// 8 bits of exponent, 7 of fraction.
    Bf16,
    /// IEEE single precision.
    Fp32,
}

/// A number format, or leave to choose one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DtypeChoice {
    /// Whatever the processor does fast.
    Auto,
    /// [`Dtype::Bf16`]
    Bf16,
    /// [`Dtype::Fp32`]
    Fp32,
}

impl DtypeChoice {
    /// The format asked for, or what `choose` says for `auto`.
    ///
    /// The chooser belongs to the caller because it looks at the processor; what it answers is
    /// recorded by [`super::Config::record_dtype`], so that a resumed run does not choose again.
    pub fn resolve(self, choose: impl FnOnce() -> Dtype) -> Dtype {
        match self {
            Self::Auto => choose(),
            Self::Bf16 => Dtype::Bf16,
            Self::Fp32 => Dtype::Fp32,
        }
    }
}

impl From<Dtype> for DtypeChoice {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::Bf16 => Self::Bf16,
            Dtype::Fp32 => Self::Fp32,
        }
    }
}
