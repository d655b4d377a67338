//! How the parameters of a model lie in memory.
//!
//! A **unit** is what is gathered, reduced and updated together: the embedding, each block, the
//! final norm, the head. Its trainable tensors share one flat buffer, its frozen tensors another,
//! so that a collective is one contiguous range and the optimizer one pass over memory.
//!
//! A **matrix** is what a kernel multiplies by. It may stack several canonical tensors along its
//! rows (query, key and value; gate and up): one product instead of three. Since the tensors are
//! row-major, each keeps its own contiguous range inside the matrix, and checkpoints never see the
//! stacking.
//!
//! A **layer** is what a step executes. It may use several units, and a unit may be used by several
//! layers: a tied embedding is one unit with two uses.

use std::ops::Range;

/// Every matrix starts at a multiple of this many elements: 256 bytes in bf16, 512 in fp32. The
/// offsets are then the same for every dtype, so weights, gradients and optimizer state share one
/// layout.
pub const ALIGNMENT: usize = 128;

/// How the elements of a tensor begin.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// Independent N(0, std²), a function of (seed, tensor name, element index) alone.
    Normal {
        /// Standard deviation.
        std: f64,
    },
    /// All ones (norm weights).
    Ones,
}

/// A tensor as the outside world knows it: Hugging Face name and orientation.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorSpec {
    /// Canonical name, for example `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// Shape, `[out, in]` for a projection.
    pub shape: Vec<usize>,
    /// Initial values.
    pub init: Init,
    /// Whether weight decay applies.
    pub decay: bool,
    /// Whether the optimizer changes it.
    pub trainable: bool,
}

impl TensorSpec {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether the tensor has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A weight as a kernel reads it: canonical tensors stacked along their first dimension.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    /// The tensors, top to bottom. All are trainable or none is.
    pub tensors: Vec<TensorSpec>,
}

impl Matrix {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.tensors.iter().map(TensorSpec::len).sum()
    }

    /// Whether the matrix has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Shape of the stack: rows add up, the other dimensions are shared.
    pub fn shape(&self) -> Vec<usize> {
        let mut shape = self.tensors[0].shape.clone();
        shape[0] = self.tensors.iter().map(|tensor| tensor.shape[0]).sum();
        shape
    }

    /// Whether the optimizer changes it.
    pub fn trainable(&self) -> bool {
        self.tensors.iter().any(|tensor| tensor.trainable)
    }
}

/// The buffer of a unit in which a matrix lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BufferKind {
    /// Reduced and updated.
    Trainable,
    /// Never changes.
    Frozen,
}

/// Where a matrix lies in its unit.
#[derive(Clone, Debug, PartialEq)]
pub struct Placement {
    /// Which of the unit's buffers.
    pub buffer: BufferKind,
    /// Elements before it.
    pub offset: usize,
    /// Shape of the matrix.
    pub shape: Vec<usize>,
}

/// Where a canonical tensor lies in its unit.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// The tensor.
    pub tensor: TensorSpec,
    /// Which of the unit's buffers.
    pub buffer: BufferKind,
    /// Elements of that buffer.
    pub range: Range<usize>,
}

/// Parameters that are gathered, reduced and updated together.
#[derive(Clone, Debug, PartialEq)]
pub struct Unit {
    /// For messages and traces: `embedding`, `block.3`, `norm`, `head`.
    pub name: String,
    /// In the order in which the layer's operations name them.
    pub matrices: Vec<Matrix>,
}

impl Unit {
    /// Where each matrix lies, in order.
    pub fn placements(&self) -> Vec<Placement> {
        let mut lengths = [0; 2];
        self.matrices
            .iter()
            .map(|matrix| {
                let buffer = if matrix.trainable() {
                    BufferKind::Trainable
                } else {
                    BufferKind::Frozen
                };
                let length = &mut lengths[buffer as usize];
                let offset = *length;
                *length = (offset + matrix.len()).next_multiple_of(ALIGNMENT);
                Placement {
                    buffer,
                    offset,
                    shape: matrix.shape(),
                }
            })
            .collect()
    }

    /// Where each canonical tensor lies, in order.
    pub fn parts(&self) -> Vec<Part> {
        let mut parts = Vec::new();
        for (matrix, placement) in self.matrices.iter().zip(self.placements()) {
            let mut start = placement.offset;
            for tensor in &matrix.tensors {
                let end = start + tensor.len();
                parts.push(Part {
                    tensor: tensor.clone(),
                    buffer: placement.buffer,
                    range: start..end,
                });
                start = end;
            }
        }
        parts
    }

    /// Elements of one of the unit's buffers, alignment included.
    pub fn buffer_len(&self, kind: BufferKind) -> usize {
        let placements = self.placements();
        let matrices = self.matrices.iter().zip(&placements);
        matrices
            .filter(|(_, placement)| placement.buffer == kind)
            .map(|(matrix, placement)| {
                (placement.offset + matrix.len()).next_multiple_of(ALIGNMENT)
            })
            .max()
            .unwrap_or(0)
    }
}

/// A step of the computation and the units it reads.
#[derive(Clone, Debug, PartialEq)]
pub struct Layer {
    /// For messages and traces.
    pub name: String,
    /// Indices into [`Units::units`].
    pub units: Vec<usize>,
}

/// The units of a model and the layers that use them, both in the order of the forward pass.
#[derive(Clone, Debug, PartialEq)]
pub struct Units {
    /// Storage.
    pub units: Vec<Unit>,
    /// Execution.
    pub layers: Vec<Layer>,
}

impl Units {
    /// All canonical tensors.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorSpec> {
        self.units
            .iter()
            .flat_map(|unit| &unit.matrices)
            .flat_map(|matrix| &matrix.tensors)
    }

    /// Number of parameters, alignment not counted.
    pub fn parameters(&self) -> usize {
        self.tensors().map(TensorSpec::len).sum()
    }

    /// The layer of the forward pass that uses `unit` first: in the backward pass, the layer after
    /// which the unit's gradient is complete.
    pub fn first_use(&self, unit: usize) -> usize {
        self.layers
            .iter()
            .position(|layer| layer.units.contains(&unit))
            .unwrap_or(0)
    }

    /// Whether the optimizer changes anything in `unit`.
    pub fn trainable(&self, unit: usize) -> bool {
        self.units[unit].matrices.iter().any(Matrix::trainable)
    }

    /// The earliest layer with something to train; gradients need not flow below it. `None` when
    /// everything is frozen.
    pub fn lowest_trainable_layer(&self) -> Option<usize> {
        self.layers
            .iter()
            .position(|layer| layer.units.iter().any(|&unit| self.trainable(unit)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, shape: &[usize], trainable: bool) -> TensorSpec {
        TensorSpec {
            name: name.into(),
            shape: shape.into(),
            init: Init::Ones,
            decay: true,
            trainable,
        }
    }

    #[test]
    fn stacked_tensors_are_contiguous_and_matrices_aligned() {
        let unit = Unit {
            name: "block.0".into(),
            matrices: vec![
                Matrix {
                    tensors: vec![tensor("norm", &[3], true)],
                },
                Matrix {
                    tensors: vec![tensor("q", &[4, 3], true), tensor("k", &[2, 3], true)],
                },
                Matrix {
                    tensors: vec![tensor("f", &[5, 3], false)],
                },
            ],
        };
        let placements = unit.placements();
        assert_eq!(placements[0].offset, 0);
        assert_eq!(placements[1].offset, ALIGNMENT);
        assert_eq!(placements[1].shape, [6, 3]);
        assert_eq!(placements[2].buffer, BufferKind::Frozen);
        assert_eq!(placements[2].offset, 0);
        let parts = unit.parts();
        assert_eq!(parts[1].range, ALIGNMENT..ALIGNMENT + 12);
        assert_eq!(parts[2].range, ALIGNMENT + 12..ALIGNMENT + 18);
        assert_eq!(unit.buffer_len(BufferKind::Trainable), 2 * ALIGNMENT);
        assert_eq!(unit.buffer_len(BufferKind::Frozen), ALIGNMENT);
    }
}
