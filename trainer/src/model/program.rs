//! A block as data: the operations of a decoder layer over named slots.

use oxitron_kernels::linear_glu::Activation;

use crate::config::Recompute;

/// Index of a slot in its program.
pub type Slot = usize;

/// What a slot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotKind {
    /// The residual stream, `[tokens, width]` in the residual dtype. Its gradient flows through all
    /// blocks in place and belongs to none.
    Residual,
    /// An activation, `[tokens, width]` in the compute dtype.
    Compute,
    /// A statistic kept for the backward pass, `[tokens · width]` in fp32; it has no gradient.
    Statistic,
}

/// One value that the operations of a block read or write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotSpec {
    /// For messages.
    pub name: &'static str,
    /// What it holds.
    pub kind: SlotKind,
    /// Elements per token.
    pub width: usize,
    /// Whether the backward pass reads it: such a slot has storage of its own in every block, the
    /// others share theirs.
    pub kept: bool,
    /// Whether the backward pass writes its gradient.
    pub has_gradient: bool,
}

/// An operation over slots. `weight` is the index of a matrix in the block's unit.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// `y = x / rms(x) · weight`.
    RmsNorm {
        /// Residual stream in.
        x: Slot,
        /// `[width]`.
        weight: usize,
        /// Normalised activation out.
        y: Slot,
        /// 1 / rms per token, out.
        rstd: Slot,
    },
    /// `qkv = x · weightᵀ`, query and key heads rotated.
    LinearRope {
        /// Activation in.
        x: Slot,
        /// `[out, in]`.
        weight: usize,
        /// `[tokens, (query heads + 2 · key heads) · head_dim]`.
        qkv: Slot,
    },
    /// Causal attention inside each document.
    Attention {
        /// Rotated queries and keys, and values.
        qkv: Slot,
        /// `[tokens, query heads · head_dim]`.
        y: Slot,
        /// Log-sum-exp of the scores per query head, out.
        log_sum_exp: Slot,
    },
    /// `sum = residual + x · weightᵀ`: the end of a branch.
    LinearAdd {
        /// Activation in.
        x: Slot,
        /// `[out, in]`.
        weight: usize,
        /// Residual stream in.
        residual: Slot,
        /// Residual stream out.
        sum: Slot,
    },
    /// `sum = residual + (act(gate) · up) · downᵀ` with `[gate, up] = x · gate_upᵀ`: a branch whose
    /// two products are computed backwards together.
    FeedForward {
        /// Of the gate.
        activation: Activation,
        /// Activation in.
        x: Slot,
        /// Weight `[2 · inner, in]`, gate first, then up.
        gate_up_weight: usize,
        /// `[tokens, 2 · inner]`.
        gate_up: Slot,
        /// `act(gate) · up`, `[tokens, inner]`.
        gated: Slot,
        /// Weight `[out, inner]`.
        down_weight: usize,
        /// Residual stream in.
        residual: Slot,
        /// Residual stream out.
        sum: Slot,
    },
}

/// The operations of a block in the order of the forward pass.
#[derive(Clone, Debug, PartialEq)]
pub struct Program {
    /// All slots.
    pub slots: Vec<SlotSpec>,
    /// Walked forwards, and in reverse for the gradient.
    pub ops: Vec<Op>,
    /// The residual stream that enters the block.
    pub input: Slot,
    /// The residual stream that leaves it.
    pub output: Slot,
}

/// Where the values of a slot lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Storage {
    /// In the residual stream between two layers.
    Stream,
    /// In every block apart, until its backward pass.
    Block,
    /// In one place for all blocks, of which one runs at a time.
    Shared,
}

impl Program {
    /// Where the values of `slot` lie.
    pub(super) fn storage(&self, slot: Slot, recompute: Recompute) -> Storage {
        let lasts = match recompute {
            Recompute::None => true,
            Recompute::Attention => !self.is_in_attention_branch(slot),
            Recompute::Full => false,
        };
        if slot == self.input || slot == self.output {
            Storage::Stream
        } else if self.slots[slot].kept && lasts {
            Storage::Block
        } else {
            Storage::Shared
        }
    }

    /// Whether the backward pass reads `slot`, and another block has overwritten it by then.
    pub(super) fn is_lost(&self, slot: Slot, recompute: Recompute) -> bool {
        self.slots[slot].kept && self.storage(slot, recompute) == Storage::Shared
    }

    /// Whether `slot` is written by a branch with attention in it, before the sum that ends it.
    fn is_in_attention_branch(&self, slot: Slot) -> bool {
        let ends = |op: &Op| matches!(op, Op::LinearAdd { .. } | Op::FeedForward { .. });
        let mut branches = self.ops.split(ends);
        branches.any(|branch| {
            branch.iter().any(|op| matches!(op, Op::Attention { .. }))
                && branch.iter().any(|op| op.outputs().contains(&Some(slot)))
        })
    }
}

impl Op {
    /// The slots that it writes.
    fn outputs(&self) -> [Option<Slot>; 3] {
        match *self {
            Op::RmsNorm { y, rstd, .. } => [Some(y), Some(rstd), None],
            Op::LinearRope { qkv, .. } => [Some(qkv), None, None],
            Op::Attention { y, log_sum_exp, .. } => [Some(y), Some(log_sum_exp), None],
            Op::LinearAdd { sum, .. } => [Some(sum), None, None],
            Op::FeedForward {
                gate_up,
                gated,
                sum,
                ..
            } => [Some(gate_up), Some(gated), Some(sum)],
        }
    }
}
