//! State into and out of the sharded buffers, tensor by tensor.
//!
//! The outside (initial values, checkpoints, Hugging Face folders) speaks of canonical tensors and
//! row-major element ranges; the inside of slices of flat units. This file is where they meet, and
//! each rank asks only for the elements that it holds.

use std::ops::Range;

use oxitron_kernels::philox;
use tch::{Kind, Tensor};

use super::{
    StateKind, Zero, ZeroError,
    unit::{UnitState, slice_of, torch_error},
};
use crate::plan::{BufferKind, Init, Part, TensorSpec};

/// Elements that are copied at a time, so that reading a large model needs little memory beyond it.
const CHUNK: usize = 1 << 22;

/// A run of elements of one tensor's state, copied to host memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Staged {
    /// Canonical name.
    pub tensor: String,
    /// Shape of the whole tensor.
    pub shape: Vec<usize>,
    /// Which state.
    pub state: StateKind,
    /// Row-major elements of the whole tensor.
    pub range: Range<usize>,
    /// Their values.
    pub data: Vec<f32>,
}

/// The initial values of a model as a source for [`Zero::load`].
#[derive(Clone, Copy, Debug)]
pub struct InitialValues {
    /// The run's seed.
    pub seed: u64,
}

impl InitialValues {
    /// Writes elements `range` of a tensor's state: the same on every mesh, since each value is a
    /// function of (seed, tensor name, index) alone. Moments start at zero.
    pub fn read(&self, spec: &TensorSpec, state: StateKind, range: Range<usize>, out: &mut [f32]) {
        match (state, spec.init) {
            (StateKind::Master, Init::Normal { std }) => {
                philox::fill_normal(out, self.seed, &spec.name, range.start as u64, std as f32);
            }
            (StateKind::Master, Init::Ones) => out.fill(1.0),
            _ => out.fill(0.0),
        }
    }
}

impl Zero {
    /// Fills this rank's slices (and its frozen tensors) from `read`, which writes the elements
    /// `range` of a tensor's state, then gathers the weights.
    ///
    /// # Errors
    /// What `read` says, with the tensor's name; a failing copy or collective.
    pub fn load<E: std::fmt::Display>(
        &mut self,
        mut read: impl FnMut(&TensorSpec, StateKind, Range<usize>, &mut [f32]) -> Result<(), E>,
    ) -> Result<(), ZeroError> {
        let mut values = Vec::new();
        for unit in &mut self.units {
            for part in unit.parts.clone() {
                let failed = |error: E| ZeroError::Read {
                    tensor: part.tensor.name.clone(),
                    problem: error.to_string(),
                };
                for (state, held) in unit.held(&part) {
                    for start in held.clone().step_by(CHUNK) {
                        let chunk = start..held.end.min(start + CHUNK);
                        values.resize(chunk.len(), 0.0);
                        read(&part.tensor, state, chunk.clone(), &mut values).map_err(failed)?;
                        unit.write(&part, state, chunk, &values)?;
                    }
                }
            }
            unit.publish(&mut self.clock)?;
        }
        (0..self.units.len()).try_for_each(|unit| self.gather(unit))
    }

    /// Sets both moments to zero.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn reset_moments(&mut self) -> Result<(), ZeroError> {
        for unit in &mut self.units {
            for moment in [&mut unit.exp_avg, &mut unit.exp_avg_sq] {
                let _ = moment.f_zero_().map_err(torch_error(&unit.name))?;
            }
        }
        Ok(())
    }

    /// Copies this rank's share of the state to host memory: its slices of the trainable tensors,
    /// and an equal share of the frozen ones.
    ///
    /// # Errors
    /// When libtorch fails to copy.
    pub fn stage(&mut self) -> Result<Vec<Staged>, ZeroError> {
        let mut staged = Vec::new();
        for unit in &self.units {
            for part in &unit.parts {
                for (state, held) in unit.held(part) {
                    let range = match part.buffer {
                        BufferKind::Trainable => held,
                        // Every rank holds all of it.
                        BufferKind::Frozen => share(part.tensor.len(), self.index, self.members),
                    };
                    if range.is_empty() {
                        continue;
                    }
                    staged.push(Staged {
                        tensor: part.tensor.name.clone(),
                        shape: part.tensor.shape.clone(),
                        state,
                        data: unit.read(part, state, &range)?,
                        range,
                    });
                }
            }
        }
        Ok(staged)
    }
}

/// An equal share of `length` elements.
fn share(length: usize, index: usize, members: usize) -> Range<usize> {
    let size = length.div_ceil(members);
    (index * size).min(length)..((index + 1) * size).min(length)
}

impl UnitState {
    /// The states of a tensor that this rank holds, and which elements of it.
    fn held(&self, part: &Part) -> Vec<(StateKind, Range<usize>)> {
        if part.buffer == BufferKind::Frozen {
            return vec![(StateKind::Master, 0..part.tensor.len())];
        }
        let start = part.range.start.max(self.slice.start);
        let end = part.range.end.min(self.slice.end).max(start);
        let owned = start - part.range.start..end - part.range.start;
        [StateKind::Master, StateKind::ExpAvg, StateKind::ExpAvgSq]
            .map(|state| (state, owned.clone()))
            .into()
    }

    /// View of elements `range`, not empty, of a tensor's state.
    fn view(
        &self,
        part: &Part,
        state: StateKind,
        range: &Range<usize>,
    ) -> Result<Tensor, ZeroError> {
        let (buffer, base) = match (part.buffer, state) {
            (BufferKind::Frozen, _) => (&self.frozen, 0),
            (BufferKind::Trainable, StateKind::Master) => (&self.master, self.slice.start),
            (BufferKind::Trainable, StateKind::ExpAvg) => (&self.exp_avg, self.slice.start),
            (BufferKind::Trainable, StateKind::ExpAvgSq) => (&self.exp_avg_sq, self.slice.start),
        };
        let start = part.range.start + range.start - base;
        slice_of(buffer, &(start..start + range.len())).map_err(torch_error(&self.name))
    }

    fn write(
        &mut self,
        part: &Part,
        state: StateKind,
        range: Range<usize>,
        values: &[f32],
    ) -> Result<(), ZeroError> {
        let mut view = self.view(part, state, &range)?;
        let torch = torch_error(&self.name);
        // Rounds to the compute dtype where the buffer is of that.
        Tensor::f_from_slice(values)
            .and_then(|values| view.f_copy_(&values))
            .map_err(torch)
    }

    fn read(
        &self,
        part: &Part,
        state: StateKind,
        range: &Range<usize>,
    ) -> Result<Vec<f32>, ZeroError> {
        let view = self.view(part, state, range)?;
        view.f_to_kind(Kind::Float)
            .and_then(|values| Vec::<f32>::try_from(&values))
            .map_err(torch_error(&self.name))
    }
}

#[cfg(test)]
impl Zero {
    /// The unscaled gradients of all trainable tensors, by name, on a single rank.
    pub fn gradients_by_name(&mut self) -> std::collections::BTreeMap<String, Vec<f32>> {
        let mut gradients = std::collections::BTreeMap::new();
        for unit in &mut self.units {
            let Ok(buffer) = unit.gradients.ready(&mut self.clock) else {
                continue;
            };
            for part in unit
                .parts
                .iter()
                .filter(|part| part.buffer == BufferKind::Trainable)
            {
                let values = slice_of(buffer, &part.range).and_then(|v| Vec::<f32>::try_from(&v));
                gradients.insert(part.tensor.name.clone(), values.unwrap_or_default());
            }
        }
        gradients
    }
}
