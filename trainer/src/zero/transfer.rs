//! State into the sharded buffers, tensor by tensor.
//!
//! The outside (initial values, checkpoints, Hugging Face folders) speaks of canonical tensors and
//! row-major element ranges; the inside of slices of flat units. This file is where they meet, and
//! each rank asks only for the elements that it holds.

use std::ops::Range;

use oxitron_kernels::philox;
use tch::Tensor;

use super::{
    CommClock, StateKind, Zero, ZeroError,
    buffer::slice_of,
    unit::{UnitState, torch_error},
};
use crate::plan::{BufferKind, Init, Part, TensorSpec};

/// Elements that are copied at a time, so that reading a large model needs little memory beyond it.
const CHUNK: usize = 1 << 22;

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
    /// Fills this rank's slices (and the frozen tensors it holds) from `read`, which writes the
    /// elements `range` of a tensor's state. The weights of other ranks are not there before the
    /// plan's opening gathers.
    ///
    /// # Errors
    /// What `read` says, with the tensor's name; a failing copy.
    pub fn load<E: std::fmt::Display>(
        &mut self,
        mut read: impl FnMut(&TensorSpec, StateKind, Range<usize>, &mut [f32]) -> Result<(), E>,
    ) -> Result<(), ZeroError> {
        self.rest()?;
        let mut values = Vec::new();
        for unit in &mut self.units {
            for part in unit.parts.clone() {
                let failed = |error: E| ZeroError::Read {
                    tensor: part.tensor.name.clone(),
                    problem: error.to_string(),
                };
                for held in unit.held(&part, &mut self.clock)? {
                    for start in held.elements.clone().step_by(CHUNK) {
                        let chunk = start..held.elements.end.min(start + CHUNK);
                        values.resize(chunk.len(), 0.0);
                        read(&part.tensor, held.state, chunk.clone(), &mut values)
                            .map_err(failed)?;
                        let within = start - held.elements.start;
                        held.write(within, &values)
                            .map_err(torch_error(&unit.name))?;
                    }
                }
            }
            unit.publish(self.offload.as_mut(), &mut self.clock)?;
        }
        Ok(())
    }

    /// Sets both moments to zero.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn reset_moments(&mut self) -> Result<(), ZeroError> {
        self.rest()?;
        for unit in &mut self.units {
            for moment in [&mut unit.exp_avg, &mut unit.exp_avg_sq] {
                let _ = moment.f_zero_().map_err(torch_error(&unit.name))?;
            }
        }
        Ok(())
    }
}

/// Elements of a tensor's state that lie on this rank.
struct Held {
    state: StateKind,
    /// Row-major elements of the whole tensor, not empty.
    elements: Range<usize>,
    /// View of them.
    view: Tensor,
}

impl Held {
    /// Writes `values` over the elements from `within` on, rounded to the dtype of the buffer.
    fn write(&self, within: usize, values: &[f32]) -> Result<(), tch::TchError> {
        let mut view = slice_of(&self.view, &(within..within + values.len()))?;
        view.f_copy_(&Tensor::f_from_slice(values)?)
    }
}

impl UnitState {
    /// What of a tensor lies on this rank.
    fn held(&mut self, part: &Part, clock: &mut CommClock) -> Result<Vec<Held>, ZeroError> {
        let mut held = Vec::new();
        if part.buffer == BufferKind::Frozen {
            if !self.frozen.sliced() {
                let whole = self.frozen.whole(clock)?;
                let view = slice_of(whole, &part.range).map_err(torch_error(&self.name))?;
                return Ok(vec![Held {
                    state: StateKind::Master,
                    elements: 0..part.tensor.len(),
                    view,
                }]);
            }
            let owned: Vec<_> = self.frozen.owned().collect();
            for (position, (own, _)) in owned.into_iter().enumerate() {
                if let Some((elements, within)) = overlap(part, &own) {
                    let slice = self.frozen.own(position, clock)?;
                    held.push(Held {
                        state: StateKind::Master,
                        elements,
                        view: slice_of(&slice, &within).map_err(torch_error(&self.name))?,
                    });
                }
            }
            return Ok(held);
        }
        for (own, local) in self.weights.owned() {
            let Some((elements, within)) = overlap(part, &own) else {
                continue;
            };
            let within = local.start + within.start..local.start + within.end;
            for (state, tensor) in [
                (StateKind::Master, &self.master),
                (StateKind::ExpAvg, &self.exp_avg),
                (StateKind::ExpAvgSq, &self.exp_avg_sq),
            ] {
                held.push(Held {
                    state,
                    elements: elements.clone(),
                    view: slice_of(tensor, &within).map_err(torch_error(&self.name))?,
                });
            }
        }
        Ok(held)
    }
}

/// The elements of a tensor that lie in a slice of its unit's buffer, counted in the tensor and in
/// the slice.
pub(super) fn overlap(part: &Part, own: &Range<usize>) -> Option<(Range<usize>, Range<usize>)> {
    let start = part.range.start.max(own.start);
    let end = part.range.end.min(own.end);
    (start < end).then(|| {
        let base = part.range.start;
        (start - base..end - base, start - own.start..end - own.start)
    })
}

#[cfg(test)]
impl Zero {
    /// Passes state in host memory in portions of at most `most` elements.
    pub fn cut_portions(&mut self, most: usize) {
        if let Some(offload) = &mut self.offload {
            offload.cut_portions(most);
        }
    }

    /// Changes one element of this rank's copy of the last unit's weights.
    pub fn damage_weights(&mut self) {
        let Some(unit) = self.units.last_mut() else {
            return;
        };
        let element = if unit.weights.sliced() {
            unit.weights.own(0, &mut self.clock)
        } else {
            unit.weights
                .whole(&mut self.clock)
                .map(Tensor::shallow_clone)
        };
        let _ = element.map(|weights| weights.get(0).fill_(7.0));
    }

    /// The unscaled gradients of all trainable tensors, by name, on a single rank.
    pub fn gradients_by_name(&mut self) -> std::collections::BTreeMap<String, Vec<f32>> {
        let mut gradients = std::collections::BTreeMap::new();
        for unit in &mut self.units {
            let Ok(buffer) = unit.gradients.whole(&mut self.clock) else {
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
