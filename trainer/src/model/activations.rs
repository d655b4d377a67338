//! The buffers through which activations and their gradients flow.
//!
//! All of them are allocated once for a micro-batch shape and reused by every micro-batch and step.
//! A block keeps what its backward pass reads in storage of its own; everything else, and every
//! gradient, is shared between the blocks, since only one block runs at a time. With recomputation
//! a block keeps less, down to its input alone. `footprint` counts the bytes of all this without allocating it.

use oxitron_kernels::{Error, Workspace};
use tch::{Device, Kind, Tensor};

use super::{
    LossSum, ModelError, Stopwatch, TorchContext,
    program::{Program, Slot, SlotKind, SlotSpec, Storage},
};
use crate::config::Recompute;

/// The slots of one block, or their gradients.
#[derive(Debug)]
pub(super) struct Slots(Vec<Tensor>);

impl Slots {
    /// Distinct slots, all of them writable.
    ///
    /// # Errors
    /// When an operation names a slot twice or one that its program does not have: a mistake in a
    /// family's description.
    pub(super) fn get<const N: usize>(
        &mut self,
        slots: [Slot; N],
    ) -> Result<[&mut Tensor; N], Error> {
        self.0
            .get_disjoint_mut(slots)
            .map_err(|problem| Error::Argument {
                op: "block",
                message: format!("slots {slots:?} of an operation: {problem}"),
            })
    }
}

/// The gradient of the residual stream, `[tokens, hidden]`. It flows through all layers in place.
#[derive(Debug)]
pub(super) struct StreamGradient {
    /// In the residual dtype.
    wide: Tensor,
    /// In the compute dtype, where that is another one: every norm that adds to the stream's
    /// gradient rounds it in passing, for the branch that comes next.
    rounded: Option<Tensor>,
}

impl StreamGradient {
    /// As the end of a branch takes it: in the compute dtype.
    pub(super) fn branch(&self) -> &Tensor {
        self.rounded.as_ref().unwrap_or(&self.wide)
    }

    /// As the embedding takes it: in the residual dtype.
    pub(super) fn wide(&self) -> &Tensor {
        &self.wide
    }

    /// Both, for a norm to write.
    pub(super) fn parts(&mut self) -> (&mut Tensor, Option<&mut Tensor>) {
        (&mut self.wide, self.rounded.as_mut())
    }
}

/// Dtypes of the buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Precision {
    /// Weights and activations.
    pub compute: Kind,
    /// The residual stream and its gradient.
    pub residual: Kind,
}

/// What a model needs to run micro-batches of one shape.
#[derive(Debug)]
pub struct Activations {
    pub(super) blocks: Vec<Slots>,
    pub(super) gradients: Slots,
    /// The residual stream between the layers, `[tokens, hidden]` each: what the embedding writes
    /// first, what the head reads last.
    pub(super) stream: Vec<Tensor>,
    /// Gradient of the residual stream.
    pub(super) stream_gradient: StreamGradient,
    /// Final norm, `[tokens, hidden]`, and its gradient.
    pub(super) normed: Tensor,
    pub(super) normed_gradient: Tensor,
    pub(super) rstd: Tensor,
    /// Of the micro-batches since it was cleared.
    pub loss: LossSum,
    pub(super) workspace: Workspace,
    pub(super) tokens: usize,
    /// What blocks do not keep.
    pub(super) recompute: Recompute,
    /// When each operation ran.
    pub stopwatch: Stopwatch,
}

impl Activations {
    /// Allocates the buffers for `tokens` tokens per micro-batch.
    ///
    /// # Errors
    /// When libtorch cannot allocate them.
    pub(super) fn new(
        program: &Program,
        blocks: usize,
        hidden: usize,
        tokens: usize,
        precision: Precision,
        recompute: Recompute,
        device: Device,
    ) -> Result<Self, ModelError> {
        let allocate = |width: usize, kind: Kind| {
            Tensor::f_zeros([tokens as i64, width as i64], (kind, device))
                .during("allocating activations")
        };
        let statistic = |width: usize| {
            Tensor::f_zeros([(tokens * width) as i64], (Kind::Float, device))
                .during("allocating activations")
        };
        let for_slot = |slot: &SlotSpec| match slot.kind {
            SlotKind::Residual => allocate(slot.width, precision.residual),
            SlotKind::Compute => allocate(slot.width, precision.compute),
            SlotKind::Statistic => statistic(slot.width),
        };
        let differ = precision.residual != precision.compute;
        let stream_gradient = StreamGradient {
            wide: allocate(hidden, precision.residual)?,
            rounded: differ
                .then(|| allocate(hidden, precision.compute))
                .transpose()?,
        };

        // Storage shared by all blocks, and the one gradient per slot.
        let mut shared = Vec::new();
        let mut gradients = Vec::new();
        for (index, slot) in program.slots.iter().enumerate() {
            let is_shared = program.storage(index, recompute) == Storage::Shared;
            shared.push(is_shared.then(|| for_slot(slot)).transpose()?);
            gradients.push(if slot.has_gradient {
                allocate(slot.width, precision.compute)?
            } else {
                statistic(0)?
            });
        }

        let stream: Vec<Tensor> = (0..=blocks)
            .map(|_| allocate(hidden, precision.residual))
            .collect::<Result<_, _>>()?;
        let mut block_slots = Vec::with_capacity(blocks);
        for block in 0..blocks {
            let mut tensors = Vec::with_capacity(program.slots.len());
            for (index, slot) in program.slots.iter().enumerate() {
                tensors.push(match &shared[index] {
                    Some(shared) => shared.shallow_clone(),
                    None if index == program.input => stream[block].shallow_clone(),
                    None if index == program.output => stream[block + 1].shallow_clone(),
                    None => for_slot(slot)?,
                });
            }
            block_slots.push(Slots(tensors));
        }
        Ok(Self {
            blocks: block_slots,
            gradients: Slots(gradients),
            stream,
            stream_gradient,
            normed: allocate(hidden, precision.compute)?,
            normed_gradient: allocate(hidden, precision.compute)?,
            rstd: statistic(1)?,
            loss: LossSum::new(device)?,
            workspace: Workspace::new(device),
            tokens,
            recompute,
            stopwatch: Stopwatch::default(),
        })
    }
}
