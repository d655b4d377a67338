//! One unit as a rank holds it.

use std::ops::Range;

use oxitron_kernels::{
    adamw::{self, AdamW},
    cast,
    norm::{self, SumOfSquares},
};
use tch::{Device, Kind, Tensor};

use super::{CommClock, Slot, ZeroError};
use crate::plan::{BufferKind, Part, Placement, Unit};

/// Consecutive elements of a slice that the optimizer treats alike.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Segment {
    /// Elements of this rank's slice.
    range: Range<usize>,
    decay: bool,
}

/// Weights, gradients and this rank's slice of the optimizer state of a unit.
#[derive(Debug)]
pub(super) struct UnitState {
    pub(super) name: String,
    pub(super) parts: Vec<Part>,
    placements: Vec<Placement>,
    /// Elements of the padded trainable buffer that this rank owns.
    pub(super) slice: Range<usize>,
    segments: Vec<Segment>,
    /// `[padded]`, compute dtype.
    pub(super) weights: Slot,
    /// `[padded]`, fp32; after a reduction only the slice is meaningful.
    pub(super) gradients: Slot,
    /// `[frozen]`, compute dtype.
    pub(super) frozen: Tensor,
    /// `[slice]`, fp32.
    pub(super) master: Tensor,
    /// `[slice]`, fp32: first moment.
    pub(super) exp_avg: Tensor,
    /// `[slice]`, fp32: second moment.
    pub(super) exp_avg_sq: Tensor,
}

impl UnitState {
    pub(super) fn new(
        unit: &Unit,
        slice: Range<usize>,
        padded: usize,
        compute: Kind,
        device: Device,
    ) -> Result<Self, ZeroError> {
        let zeros = |length: usize, kind: Kind| {
            Tensor::f_zeros([length as i64], (kind, device)).map_err(torch_error(&unit.name))
        };
        let parts = unit.parts();
        Ok(Self {
            name: unit.name.clone(),
            placements: unit.placements(),
            segments: segments(&parts, &slice),
            weights: Slot::Ready(zeros(padded, compute)?),
            gradients: Slot::Ready(zeros(padded, Kind::Float)?),
            frozen: zeros(unit.buffer_len(BufferKind::Frozen), compute)?,
            master: zeros(slice.len(), Kind::Float)?,
            exp_avg: zeros(slice.len(), Kind::Float)?,
            exp_avg_sq: zeros(slice.len(), Kind::Float)?,
            parts,
            slice,
        })
    }

    /// Views of the weights, one per matrix, waiting for a gather that is under way.
    pub(super) fn weight_views(&mut self, clock: &mut CommClock) -> Result<Vec<Tensor>, ZeroError> {
        let trainable = self.weights.ready(clock)?;
        let view = |placement: &Placement| {
            let buffer = match placement.buffer {
                BufferKind::Trainable => &*trainable,
                BufferKind::Frozen => &self.frozen,
            };
            matrix_view(buffer, placement).map_err(torch_error(&self.name))
        };
        self.placements.iter().map(view).collect()
    }

    /// Views of the gradients, one per matrix, `None` where frozen.
    pub(super) fn gradient_views(
        &mut self,
        clock: &mut CommClock,
    ) -> Result<Vec<Option<Tensor>>, ZeroError> {
        let buffer = self.gradients.ready(clock)?;
        let view = |placement: &Placement| match placement.buffer {
            BufferKind::Trainable => matrix_view(buffer, placement)
                .map(Some)
                .map_err(torch_error(&self.name)),
            BufferKind::Frozen => Ok(None),
        };
        self.placements.iter().map(view).collect()
    }

    /// Σ g² over this rank's slice of the reduced gradient.
    pub(super) fn sum_of_squares(
        &mut self,
        clock: &mut CommClock,
    ) -> Result<SumOfSquares, ZeroError> {
        let gradient = slice_of(self.gradients.ready(clock)?, &self.slice);
        let gradient = gradient.map_err(torch_error(&self.name))?;
        norm::sum_of_squares(&gradient).map_err(kernel_error(&self.name))
    }

    /// Updates the slice: moments, master weights, and this rank's part of the weights.
    pub(super) fn update(&mut self, adamw: &AdamW, clock: &mut CommClock) -> Result<(), ZeroError> {
        let torch = torch_error(&self.name);
        let gradient = slice_of(self.gradients.ready(clock)?, &self.slice).map_err(&torch)?;
        let weights = slice_of(self.weights.ready(clock)?, &self.slice).map_err(&torch)?;
        for Segment { range, decay } in &self.segments {
            let part = |tensor: &Tensor| slice_of(tensor, range).map_err(&torch);
            let settings = if *decay {
                *adamw
            } else {
                AdamW {
                    weight_decay: 0.0,
                    ..*adamw
                }
            };
            let state = adamw::State {
                master: &mut part(&self.master)?,
                exp_avg: &mut part(&self.exp_avg)?,
                exp_avg_sq: &mut part(&self.exp_avg_sq)?,
            };
            adamw::step(
                &settings,
                state,
                &part(&gradient)?,
                Some(&mut part(&weights)?),
            )
            .map_err(kernel_error(&self.name))?;
        }
        Ok(())
    }

    /// Sets the whole gradient buffer to zero for the next step.
    pub(super) fn clear_gradients(&mut self, clock: &mut CommClock) -> Result<(), ZeroError> {
        let buffer = self.gradients.ready(clock)?;
        buffer.f_zero_().map(drop).map_err(torch_error(&self.name))
    }

    /// Writes this rank's part of the weights from the master weights.
    pub(super) fn publish(&mut self, clock: &mut CommClock) -> Result<(), ZeroError> {
        let torch = torch_error(&self.name);
        let mut weights = slice_of(self.weights.ready(clock)?, &self.slice).map_err(torch)?;
        cast::forward(&self.master, &mut weights).map_err(kernel_error(&self.name))
    }
}

/// Splits a slice into runs of equal treatment. Alignment gaps hold zeros with zero gradients, so
/// they may join either neighbour.
fn segments(parts: &[Part], slice: &Range<usize>) -> Vec<Segment> {
    let mut segments: Vec<Segment> = Vec::new();
    let trainable = parts
        .iter()
        .filter(|part| part.buffer == BufferKind::Trainable);
    for part in trainable {
        let start = part.range.start.max(slice.start);
        let end = part.range.end.min(slice.end);
        if start >= end {
            continue;
        }
        let (range, decay) = (start - slice.start..end - slice.start, part.tensor.decay);
        match segments.last_mut() {
            Some(last) if last.decay == decay => last.range.end = range.end,
            _ => segments.push(Segment { range, decay }),
        }
    }
    segments
}

fn matrix_view(buffer: &Tensor, placement: &Placement) -> Result<Tensor, tch::TchError> {
    let shape: Vec<i64> = placement.shape.iter().map(|&size| size as i64).collect();
    let length: i64 = shape.iter().product();
    buffer
        .f_narrow(0, placement.offset as i64, length)?
        .f_view(shape.as_slice())
}

pub(super) fn slice_of(buffer: &Tensor, range: &Range<usize>) -> Result<Tensor, tch::TchError> {
    buffer.f_narrow(0, range.start as i64, range.len() as i64)
}

pub(super) fn torch_error(unit: &str) -> impl Fn(tch::TchError) -> ZeroError + '_ {
    |source| ZeroError::Torch {
        unit: unit.to_owned(),
        source,
    }
}

pub(super) fn kernel_error(unit: &str) -> impl Fn(oxitron_kernels::Error) -> ZeroError + '_ {
    |source| ZeroError::Kernel {
        unit: unit.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{Init, TensorSpec};

    fn part(range: Range<usize>, decay: bool) -> Part {
        let tensor = TensorSpec {
            name: String::new(),
            shape: vec![range.len()],
            init: Init::Ones,
            decay,
            trainable: true,
        };
        Part {
            tensor,
            buffer: BufferKind::Trainable,
            range,
        }
    }

    #[test]
    fn segments_follow_decay_and_stay_inside_the_slice() {
        let parts = [
            part(0..100, false),
            part(128..300, true),
            part(384..500, true),
        ];
        assert_eq!(
            segments(&parts, &(64..448)),
            [
                Segment {
                    range: 0..36,
                    decay: false
                },
                Segment {
                    range: 64..384,
                    decay: true
                },
            ]
        );
        assert_eq!(segments(&parts, &(512..576)), []);
    }
}
