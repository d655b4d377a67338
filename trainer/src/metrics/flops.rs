//! Counting the arithmetic of training, and what share of the machine it uses.
//!
//! The convention of `mfu` and `hfu`, named wherever a figure is shown ([`CONVENTION`]):
//!
//! - Matrix products cost `6·N_mm` FLOPs per position: 2 forward and 4 backward for each of the
//!   `N_mm` weights that enter one. The head counts (a tied matrix once, as head); the embedding
//!   look-up costs nothing; norms, RoPE, softmax and the optimizer are left out.
//! - Attention costs `6·L·n_q·d·len²` per document of `len` positions: `12·L·n_q·d` for each pair
//!   of positions forward and backward, and half of the pairs under a causal mask. **True document
//!   lengths** count, not the sequence length: work that a document mask spares is not claimed.
//! - MFU divides this by what the ranks could do at their stated peak. HFU adds what blocks compute
//!   again in the backward pass. What flash attention recomputes inside its own backward counts in
//!   neither.
//!
//! Most published figures count attention otherwise: `mfu_full` takes all pairs of positions of a
//! sample, `12·L·n_q·d·seq_len²` in all, as if there were neither a causal mask nor documents. It is
//! the figure to hold against theirs, and above `mfu` for the same step.

use crate::config::{ModelConfig, Recompute};

/// The convention in words, for logs and reports.
pub const CONVENTION: &str = "6·N_mm per position plus causal attention over true document lengths; peak as stated, or \
     known by the name of the GPU";

/// The sizes of a LLaMA-style decoder that decide its arithmetic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecoderShape {
    /// Blocks.
    pub layers: u64,
    /// Width of the residual stream.
    pub hidden: u64,
    /// Query heads.
    pub heads: u64,
    /// Key and value heads.
    pub kv_heads: u64,
    /// Width of a head.
    pub head_dim: u64,
    /// Width of the gate and of the up projection.
    pub intermediate: u64,
    /// Rows of the head, padding left out.
    pub vocab: u64,
}

/// Floating-point operations of a step, over all ranks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepFlops {
    /// What the model needs: the numerator of MFU.
    pub model: f64,
    /// What the hardware did, recomputation included: the numerator of HFU.
    pub hardware: f64,
}

impl DecoderShape {
    /// Weights of one block that enter a matrix product: q, k, v, output, gate, up and down.
    fn block_weights(&self) -> u64 {
        let output = self.heads * self.head_dim * self.hidden;
        self.qkv_weights() + output + 3 * self.hidden * self.intermediate
    }

    /// `N_mm`: weights that enter a matrix product for every position.
    pub fn matmul_weights(&self) -> u64 {
        self.layers * self.block_weights() + self.hidden * self.vocab
    }

    /// The shape of a configured model.
    pub fn of(model: &ModelConfig) -> Self {
        Self {
            layers: model.num_layers as u64,
            hidden: model.hidden_size as u64,
            heads: model.num_heads as u64,
            kv_heads: model.num_kv_heads as u64,
            head_dim: model.head_dim as u64,
            intermediate: model.intermediate_size as u64,
            vocab: model.vocab_size as u64,
        }
    }

    /// FLOPs of a step over `samples` samples of `seq_len` positions in the convention that counts
    /// every pair of positions of a sample: the numerator of `mfu_full`.
    pub fn full_attention_step(&self, samples: u64, seq_len: u64) -> f64 {
        let positions = samples as f64 * seq_len as f64;
        let pairs = (self.layers * self.heads * self.head_dim) as f64 * positions * seq_len as f64;
        6.0 * self.matmul_weights() as f64 * positions + 12.0 * pairs
    }

    /// FLOPs of a step over `positions` positions whose documents have `squared_lengths` as the
    /// sum of their squared lengths, with what blocks compute again.
    pub fn step(&self, positions: u64, squared_lengths: u64, recompute: Recompute) -> StepFlops {
        let positions = positions as f64;
        let pairs = (self.layers * self.heads * self.head_dim) as f64 * squared_lengths as f64;
        let model = 6.0 * self.matmul_weights() as f64 * positions + 6.0 * pairs;
        StepFlops {
            model,
            hardware: model + self.recomputed(positions, squared_lengths as f64, recompute),
        }
    }

    /// What blocks compute again, the last one excepted, whose values are all there when its
    /// backward begins: for `attention` the projections to query, key and value, and attention; for
    /// `full` also the attention's output, and gate and up. The product behind them, down, only
    /// makes what the next block has as its input.
    fn recomputed(&self, positions: f64, squared_lengths: f64, recompute: Recompute) -> f64 {
        let weights = match recompute {
            Recompute::None => return 0.0,
            Recompute::Attention => self.qkv_weights(),
            Recompute::Full => self.block_weights() - self.hidden * self.intermediate,
        };
        let pairs = (self.heads * self.head_dim) as f64 * squared_lengths;
        let block = 2.0 * weights as f64 * positions + 2.0 * pairs;
        self.layers.saturating_sub(1) as f64 * block
    }

    fn qkv_weights(&self) -> u64 {
        self.hidden * self.head_dim * (self.heads + 2 * self.kv_heads)
    }
}

impl StepFlops {
    /// MFU and HFU of a step that took `seconds` on `ranks` ranks, each able to do
    /// `peak_flops_per_rank` per second. None when the peak is not known.
    pub fn utilisation(
        &self,
        seconds: f64,
        ranks: usize,
        peak_flops_per_rank: Option<f64>,
    ) -> Option<Utilisation> {
        let available = seconds * ranks as f64 * peak_flops_per_rank?;
        (available > 0.0 && available.is_finite()).then(|| Utilisation {
            mfu: self.model / available,
            hfu: self.hardware / available,
        })
    }
}

/// Shares of the stated peak, between 0 and 1 where the peak is true.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Utilisation {
    /// Model FLOPs utilisation.
    pub mfu: f64,
    /// Hardware FLOPs utilisation.
    pub hfu: f64,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const INTERNLM2_1_8B: DecoderShape = DecoderShape {
        layers: 24,
        hidden: 2048,
        heads: 16,
        kv_heads: 8,
        head_dim: 128,
        intermediate: 8192,
        vocab: 92_544,
    };

    const LLAMA3_8B: DecoderShape = DecoderShape {
        layers: 32,
        hidden: 4096,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        intermediate: 14_336,
        vocab: 128_256,
    };

    #[test]
    fn known_models_cost_what_is_published_per_token() {
        // GFLOP per token at 4096 positions: products alone, and with causal attention.
        for (shape, products, causal) in [(INTERNLM2_1_8B, 10.20, 11.40), (LLAMA3_8B, 45.03, 48.25)]
        {
            assert!((6e-9 * shape.matmul_weights() as f64 - products).abs() < 0.005);
            let step = shape.step(4096, 4096 * 4096, Recompute::None);
            assert!(
                (step.model / 4096.0 / 1e9 - causal).abs() < 0.01,
                "{step:?}"
            );
            assert_eq!(step.model, step.hardware);
        }
    }

    #[test]
    fn attention_is_counted_by_document() {
        let whole = LLAMA3_8B.step(4096, 4096 * 4096, Recompute::None).model;
        let halves = LLAMA3_8B.step(4096, 2 * 2048 * 2048, Recompute::None).model;
        let attention = 6.0 * (32 * 32 * 128) as f64 * (4096.0 * 4096.0 - 2.0 * 2048.0 * 2048.0);
        assert_eq!(whole - halves, attention);
    }

    #[test]
    fn the_full_convention_counts_masked_pairs_too() {
        // Its attention is twice that of samples of one document.
        let whole = INTERNLM2_1_8B
            .step(2 * 4096, 2 * 4096 * 4096, Recompute::None)
            .model;
        let full = INTERNLM2_1_8B.full_attention_step(2, 4096);
        let products = 6.0 * INTERNLM2_1_8B.matmul_weights() as f64 * 8192.0;
        assert_eq!(full - products, 2.0 * (whole - products));
        // 6·N_mm + 12·L·d·T, as published, per position.
        assert_eq!((full - products) / 8192.0, 12.0 * 24.0 * 2048.0 * 4096.0);
    }

    #[test]
    fn recomputation_adds_what_all_blocks_but_the_last_run_again() {
        let again = |recompute| {
            let step = LLAMA3_8B.step(1000, 1000 * 1000, recompute);
            (step.hardware - step.model) / (31.0 * 1000.0)
        };
        // By hand, per position and block: query and both of key and value; scores and their sums
        // over half of 1000 positions; the output; gate and up.
        let branch = 2.0 * 4096.0 * (4096.0 + 2.0 * 1024.0) + 4.0 * 4096.0 * 500.0;
        let rest = 2.0 * 4096.0 * 4096.0 + 2.0 * 4096.0 * 2.0 * 14_336.0;
        assert_eq!(again(Recompute::None), 0.0);
        assert!((again(Recompute::Attention) / branch - 1.0).abs() < 1e-9);
        assert!((again(Recompute::Full) / (branch + rest) - 1.0).abs() < 1e-9);
    }

    #[test]
    fn utilisation_needs_a_peak() {
        let step = StepFlops {
            model: 40.0,
            hardware: 50.0,
        };
        let used = step.utilisation(2.0, 5, Some(10.0)).unwrap();
        assert_eq!(used, Utilisation { mfu: 0.4, hfu: 0.5 });
        assert_eq!(step.utilisation(2.0, 5, None), None);
        assert_eq!(step.utilisation(0.0, 5, Some(10.0)), None);
    }
}
