//! The LLaMA layout: which tensors a model of given sizes has.

use crate::checkpoint::SpecialTokens;

/// The sizes that decide names and shapes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LlamaSizes {
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
}

/// A model of the LLaMA layout, as a config describes it.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    /// Sizes.
    pub sizes: LlamaSizes,
    /// Epsilon of the RMS norms.
    pub rms_norm_eps: f64,
    /// Base of the rotary embedding (`rope_theta`).
    pub rope_base: f64,
    /// Longest sequence the model was trained on (`max_position_embeddings`).
    pub max_seq_len: usize,
    /// Standard deviation of the initial weights.
    pub init_std: f64,
    /// Token ids with a meaning.
    pub special_tokens: SpecialTokens,
}

/// No size of a model reaches this; products of two sizes stay far from overflow.
const MAX_SIZE: usize = 1 << 28;
/// More layers than any model has. A layer costs memory as soon as its tensors are listed.
const MAX_LAYERS: usize = 1 << 12;

impl LlamaSizes {
    /// Says which size is impossible, if one is. Keys are spelled as in `[model]`.
    pub(super) fn check(&self) -> Result<(), String> {
        let sizes = [
            ("vocab_size", self.vocab_size, MAX_SIZE),
            ("hidden_size", self.hidden_size, MAX_SIZE),
            ("intermediate_size", self.intermediate_size, MAX_SIZE),
            ("num_layers", self.num_layers, MAX_LAYERS),
            ("num_heads", self.num_heads, MAX_LAYERS),
            ("num_kv_heads", self.num_kv_heads, MAX_LAYERS),
            ("head_dim", self.head_dim, MAX_LAYERS),
        ];
        for (key, size, limit) in sizes {
            if size == 0 || size > limit {
                return Err(format!("{key} = {size}; 1 to {limit} is expected"));
            }
        }
        if !self.num_heads.is_multiple_of(self.num_kv_heads) {
            return Err(format!(
                "{} query heads cannot share {} key and value heads evenly",
                self.num_heads, self.num_kv_heads
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(format!(
                "head_dim = {} is odd; rotary pairs need it even",
                self.head_dim
            ));
        }
        Ok(())
    }
}

/// Name of the embedding.
pub(super) const EMBEDDING: &str = "model.embed_tokens.weight";
/// Name of the head.
pub(super) const HEAD: &str = "lm_head.weight";

/// Names and shapes of all tensors, in the order of the forward pass. Weights of linear maps are
/// `[out, in]`. A tied head is not listed.
pub fn list_of_tensors(sizes: &LlamaSizes) -> Vec<(String, Vec<usize>)> {
    let hidden = sizes.hidden_size;
    let queries = sizes.num_heads * sizes.head_dim;
    let keys = sizes.num_kv_heads * sizes.head_dim;
    let block = [
        ("input_layernorm", vec![hidden]),
        ("self_attn.q_proj", vec![queries, hidden]),
        ("self_attn.k_proj", vec![keys, hidden]),
        ("self_attn.v_proj", vec![keys, hidden]),
        ("self_attn.o_proj", vec![hidden, queries]),
        ("post_attention_layernorm", vec![hidden]),
        ("mlp.gate_proj", vec![sizes.intermediate_size, hidden]),
        ("mlp.up_proj", vec![sizes.intermediate_size, hidden]),
        ("mlp.down_proj", vec![hidden, sizes.intermediate_size]),
    ];
    let mut tensors = vec![(EMBEDDING.to_owned(), vec![sizes.vocab_size, hidden])];
    for layer in 0..sizes.num_layers {
        for (name, shape) in &block {
            tensors.push((format!("model.layers.{layer}.{name}.weight"), shape.clone()));
        }
    }
    tensors.push(("model.norm.weight".to_owned(), vec![hidden]));
    if !sizes.tie_word_embeddings {
        tensors.push((HEAD.to_owned(), vec![sizes.vocab_size, hidden]));
    }
    tensors
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Parameter counts of published models.
    #[test]
    fn parameter_counts_are_those_published() {
        let count = |sizes: &LlamaSizes| -> usize {
            list_of_tensors(sizes)
                .iter()
                .map(|(_, shape)| shape.iter().product::<usize>())
                .sum()
        };
        let internlm2 = LlamaSizes {
            vocab_size: 92544,
            hidden_size: 2048,
            intermediate_size: 8192,
            num_layers: 24,
            num_heads: 16,
            num_kv_heads: 8,
            head_dim: 128,
            tie_word_embeddings: false,
        };
        assert_eq!(count(&internlm2), 1_889_110_016);
        let seven = LlamaSizes {
            hidden_size: 4096,
            intermediate_size: 14336,
            num_layers: 32,
            num_heads: 32,
            ..internlm2
        };
        assert_eq!(count(&seven), 7_737_708_544);
        let tied = LlamaSizes {
            tie_word_embeddings: true,
            ..seven.clone()
        };
        assert_eq!(count(&seven) - count(&tied), 92544 * 4096);
    }
}
