//! Bytes of activations, counted without allocating any.
//!
//! The twin of [`Activations`](super::Activations): what is allocated there is counted here, and a
//! test of the allocator holds the two together. On top comes what operations take from the
//! workspace.

use oxitron_kernels::{
    WorkspacePlan, attention, linear_add, linear_cross_entropy, linear_glu, linear_rope, rms_norm,
};
use tch::{Device, Kind};

use super::{
    activations::Precision,
    decoder::kind,
    llama,
    program::{Op, Program, SlotKind, SlotSpec, Storage},
};
use crate::config::{Dtype, ModelConfig, Recompute};

const STATISTIC: usize = size_of::<f32>();

/// Bytes that a rank needs to run a micro-batch through a model, apart from weights and gradients
/// of weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ActivationBytes {
    /// What blocks keep until their backward pass, and the residual stream between the layers.
    pub kept: usize,
    /// What one block at a time uses: values that are not kept, and gradients of values.
    pub shared: usize,
    /// Scratch of operations, the logits of a chunk of tokens among it.
    pub workspace: usize,
}

impl ActivationBytes {
    /// All of it.
    pub fn total(&self) -> usize {
        self.kept + self.shared + self.workspace
    }
}

/// What micro-batches of `tokens` tokens need when `model` computes in `compute` on `device`, and
/// computes again what `recompute` says. Proportional to `tokens`, apart from the workspace.
pub fn activation_bytes(
    model: &ModelConfig,
    compute: Dtype,
    tokens: usize,
    recompute: Recompute,
    device: Device,
) -> ActivationBytes {
    let count = Count {
        device,
        program: llama::block_program(model),
        precision: Precision {
            compute: kind(compute),
            residual: kind(model.residual_dtype),
        },
        tokens,
    };
    let (blocks, hidden) = (model.num_layers, model.hidden_size);
    let stream = (blocks + 1) * count.values(hidden, count.precision.residual);
    ActivationBytes {
        kept: stream + blocks * count.slots(Storage::Block, recompute),
        shared: count.slots(Storage::Shared, recompute)
            + count.slot_gradients()
            + count.stream_gradient(hidden)
            + 2 * count.values(hidden, count.precision.compute)
            + tokens * STATISTIC,
        workspace: count.workspace(model).bytes(),
    }
}

struct Count {
    device: Device,
    program: Program,
    precision: Precision,
    tokens: usize,
}

impl Count {
    fn values(&self, width: usize, kind: Kind) -> usize {
        self.tokens * width * kind.elt_size_in_bytes()
    }

    fn slot(&self, slot: &SlotSpec) -> usize {
        match slot.kind {
            SlotKind::Residual => self.values(slot.width, self.precision.residual),
            SlotKind::Compute => self.values(slot.width, self.precision.compute),
            SlotKind::Statistic => self.tokens * slot.width * STATISTIC,
        }
    }

    /// The slots of a block that lie in `storage`.
    fn slots(&self, storage: Storage, recompute: Recompute) -> usize {
        let slots = self.program.slots.iter().enumerate();
        slots
            .filter(|&(index, _)| self.program.storage(index, recompute) == storage)
            .map(|(_, slot)| self.slot(slot))
            .sum()
    }

    /// The gradient of the residual stream, and the same in the compute dtype.
    fn stream_gradient(&self, hidden: usize) -> usize {
        let Precision { compute, residual } = self.precision;
        let rounded = if compute == residual {
            0
        } else {
            self.values(hidden, compute)
        };
        self.values(hidden, residual) + rounded
    }

    /// One gradient for each slot of every block; that of the residual stream is counted apart.
    fn slot_gradients(&self) -> usize {
        let slots = self.program.slots.iter();
        slots
            .filter(|slot| slot.has_gradient)
            .map(|slot| self.slot(slot))
            .sum()
    }

    /// What operations take from the workspace.
    fn workspace(&self, model: &ModelConfig) -> WorkspacePlan {
        let (kind, tokens, hidden) = (self.precision.compute, self.tokens, model.hidden_size);
        let width = |slot: usize| self.program.slots[slot].width;
        let mut plan = WorkspacePlan::new(self.device);
        for op in &self.program.ops {
            match *op {
                Op::RmsNorm { x, .. } => rms_norm::plan(&mut plan, tokens, width(x)),
                Op::LinearRope { x, qkv, .. } => {
                    let weight = [width(qkv), width(x)];
                    linear_rope::plan(&mut plan, kind, tokens, weight, model.head_dim);
                }
                Op::Attention { .. } => {
                    let heads = [model.num_heads, model.num_kv_heads, model.head_dim];
                    // The configuration has refused heads that the operation refuses.
                    let _ = attention::plan(&mut plan, kind, tokens, heads);
                }
                Op::LinearAdd { x, sum, .. } => {
                    linear_add::plan(&mut plan, kind, tokens, [width(sum), width(x)]);
                }
                Op::FeedForward {
                    x,
                    gate_up,
                    gated,
                    sum,
                    ..
                } => {
                    linear_glu::plan(&mut plan, kind, tokens, [width(gate_up), width(x)]);
                    linear_glu::plan_backward(&mut plan, kind, tokens, [width(sum), width(gated)]);
                    linear_add::plan(&mut plan, kind, tokens, [width(sum), width(gated)]);
                }
            }
        }
        rms_norm::plan(&mut plan, tokens, hidden);
        let head = [model.vocab_size, hidden];
        let chunk = linear_cross_entropy::default_chunk(self.device);
        linear_cross_entropy::plan(&mut plan, kind, tokens, head, chunk);
        plan
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::config::Config;

    #[test]
    fn recomputation_trades_what_blocks_keep_for_one_shared_place() {
        let text = "[model]\npreset = \"llama-7b\"\n[data]\n[[data.source]]\nname = \"a\"\n\
                    path = \"a\"\n[optimizer]\nlr = 1e-3\n[[stage]]\nname = \"s\"\nseq_len = 64\n\
                    steps = 1\nbatch_tokens = 64\n";
        let model = Config::from_text(text, "test", std::path::Path::new("/"), &[])
            .unwrap()
            .model;
        let bytes = |recompute| activation_bytes(&model, Dtype::Bf16, 4096, recompute, Device::Cpu);
        let [kept, between, again] = Recompute::ALL.map(bytes);
        let stream = (model.num_layers + 1) * 4096 * model.hidden_size * 4;
        assert_eq!(again.kept, stream);
        let block = (kept.kept - stream) / model.num_layers;
        assert_eq!(again.shared - kept.shared, block);
        assert_eq!(again.workspace, kept.workspace);
        assert!(again.total() < kept.total() / 3);
        // The branch of attention: norm, queries, keys and values, attention, and its statistics.
        let branch = 4096 * (5 * model.hidden_size * 2 + (1 + model.num_heads) * 4);
        assert_eq!(kept.kept - between.kept, model.num_layers * branch);
        assert_eq!(between.shared - kept.shared, branch);
        assert_eq!(between.workspace, kept.workspace);
    }
}
