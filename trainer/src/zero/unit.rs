//! One unit as a rank holds it.

use std::ops::Range;

use oxitron_kernels::{
    Workspace,
    adamw::{self, AdamW},
    cast,
    cuda::Way,
    decision::Decision,
    norm,
};
use tch::{Device, Kind, Tensor};

use super::{
    CommClock, StateForm, ZeroError,
    buffer::{Buffer, slice_of},
    offload::{self, Offload, each_portion},
};
use crate::plan::{BufferKind, Holding, Layout, Part, Placement, Role, ShardMap, Unit};

/// Consecutive elements of the owned state that the optimizer treats alike.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Segment {
    /// Elements of the owned state.
    elements: Range<usize>,
    decay: bool,
}

/// Weights, gradients and this rank's slices of the optimizer state of a unit.
#[derive(Debug)]
pub(super) struct UnitState {
    pub(super) name: String,
    pub(super) parts: Vec<Part>,
    placements: Vec<Placement>,
    /// Elements of the owned state by piece, in runs that the optimizer treats alike.
    segments: Vec<Vec<Segment>>,
    /// Compute dtype.
    pub(super) weights: Buffer,
    /// Compute dtype; never changes.
    pub(super) frozen: Buffer,
    /// fp32. Where it is held whole, only the own slices are meaningful after a reduction.
    pub(super) gradients: Buffer,
    /// `[owned]`, fp32: the own slices of all pieces one after the other.
    pub(super) master: Tensor,
    /// `[owned]`, fp32 or bf16: first moment.
    pub(super) exp_avg: Tensor,
    /// `[owned]`, of the same dtype: second moment.
    pub(super) exp_avg_sq: Tensor,
}

impl UnitState {
    /// The state of unit number `index`, all zeros, as member `member` of its shard group holds it.
    /// `state` makes the tensors of the optimizer.
    pub(super) fn new(
        (index, unit): (usize, &Unit),
        map: &ShardMap,
        layout: &Layout,
        member: usize,
        (form, device): (StateForm, Device),
        mut state: impl FnMut(Kind, usize) -> Result<Tensor, tch::TchError>,
    ) -> Result<Self, ZeroError> {
        let buffer = |buffer: BufferKind, holding: Holding, kind: Kind| {
            Buffer::new(
                map,
                (index, unit.name.as_str()),
                buffer,
                member,
                holding,
                (kind, device),
            )
            .map_err(torch_error(&unit.name))
        };
        let weights = buffer(BufferKind::Trainable, layout.weights, form.compute)?;
        let owned = map.owned_len(index, BufferKind::Trainable);
        let mut state = |kind: Kind| state(kind, owned).map_err(torch_error(&unit.name));
        let parts = unit.parts();
        Ok(Self {
            name: unit.name.clone(),
            placements: unit.placements(),
            segments: weights
                .owned()
                .map(|(own, local)| segments(&parts, &own, local.start))
                .collect(),
            frozen: buffer(BufferKind::Frozen, layout.weights, form.compute)?,
            gradients: buffer(BufferKind::Trainable, layout.gradients, Kind::Float)?,
            master: state(Kind::Float)?,
            exp_avg: state(form.moments)?,
            exp_avg_sq: state(form.moments)?,
            parts,
            weights,
        })
    }

    /// The buffers that are exchanged as `role`.
    pub(super) fn buffers(&mut self, role: Role) -> Vec<&mut Buffer> {
        match role {
            Role::Weights => vec![&mut self.weights, &mut self.frozen],
            Role::Gradients => vec![&mut self.gradients],
        }
    }

    /// The weights that lie in one of the unit's buffers.
    pub(super) fn weights_buffer(&mut self, buffer: BufferKind) -> &mut Buffer {
        match buffer {
            BufferKind::Trainable => &mut self.weights,
            BufferKind::Frozen => &mut self.frozen,
        }
    }

    /// Views of the weights, one per matrix, waiting for gathers that are under way.
    pub(super) fn weight_views(&mut self, clock: &mut CommClock) -> Result<Vec<Tensor>, ZeroError> {
        let trainable = self.weights.whole(clock)?;
        let frozen = self.frozen.whole(clock)?;
        let view = |placement: &Placement| {
            let buffer = match placement.buffer {
                BufferKind::Trainable => trainable,
                BufferKind::Frozen => frozen,
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
        let any = |placement: &Placement| placement.buffer == BufferKind::Trainable;
        if !self.placements.iter().any(any) {
            return Ok(self.placements.iter().map(|_| None).collect());
        }
        let buffer = self.gradients.whole(clock)?;
        let view = |placement: &Placement| match placement.buffer {
            BufferKind::Trainable => matrix_view(buffer, placement)
                .map(Some)
                .map_err(torch_error(&self.name)),
            BufferKind::Frozen => Ok(None),
        };
        self.placements.iter().map(view).collect()
    }

    /// Adds Σ g² over this rank's slice of a piece of the reduced gradient to `total[0]`, and how
    /// many elements are not finite to `total[1]`; `total: [2]` fp64.
    pub(super) fn add_sum_of_squares(
        &mut self,
        position: usize,
        total: &mut Tensor,
        workspace: &mut Workspace,
        clock: &mut CommClock,
    ) -> Result<(), ZeroError> {
        let gradient = self.gradients.own(position, clock)?;
        norm::add_sum_of_squares(&gradient, total, workspace).map_err(kernel_error(&self.name))
    }

    /// Updates the slice of a piece as decided: moments, master weights, and this rank's part of
    /// the weights. Moments and master weights in host memory pass through `offload`.
    pub(super) fn update(
        &mut self,
        position: usize,
        adamw: &AdamW,
        decision: &Decision,
        offload: Option<&mut Offload>,
        clock: &mut CommClock,
    ) -> Result<(), ZeroError> {
        let gradient = self.gradients.own(position, clock)?;
        let weights = self.weights.own(position, clock)?;
        let slice = self.weights.local(position);
        let segments = &self.segments[position];
        let step = |range: Range<usize>, [master, exp_avg, exp_avg_sq]: &mut [Tensor; 3]| {
            for Segment { elements, decay } in within(segments, &range) {
                let part = |tensor: &Tensor, base: usize| {
                    let part = elements.start - base..elements.end - base;
                    slice_of(tensor, &part).map_err(offload::torch)
                };
                let settings = if decay {
                    *adamw
                } else {
                    AdamW {
                        weight_decay: 0.0,
                        ..*adamw
                    }
                };
                let owned = adamw::State {
                    master: &mut part(master, range.start)?,
                    exp_avg: &mut part(exp_avg, range.start)?,
                    exp_avg_sq: &mut part(exp_avg_sq, range.start)?,
                };
                adamw::step(
                    &settings,
                    owned,
                    &part(&gradient, slice.start)?,
                    Some(&mut part(&weights, slice.start)?),
                    decision,
                )?;
            }
            Ok(())
        };
        let state = [&self.master, &self.exp_avg, &self.exp_avg_sq];
        each_portion(offload, state, slice.clone(), Way::InAndOut, step)
            .map_err(kernel_error(&self.name))
    }

    /// Sets the whole gradient of a piece to zero for the next step. Where only slices are held,
    /// the next reduction replaces them and there is nothing to do.
    pub(super) fn clear_gradients(
        &mut self,
        position: usize,
        clock: &mut CommClock,
    ) -> Result<(), ZeroError> {
        self.gradients.settle(position, clock)?;
        self.gradients
            .clear(position)
            .map_err(torch_error(&self.name))
    }

    /// Writes this rank's part of the weights from the master weights.
    pub(super) fn publish(
        &mut self,
        mut offload: Option<&mut Offload>,
        clock: &mut CommClock,
    ) -> Result<(), ZeroError> {
        let owned: Vec<_> = self.weights.owned().collect();
        for (position, (_, local)) in owned.into_iter().enumerate() {
            let weights = self.weights.own(position, clock)?;
            let start = local.start;
            let write = |range: Range<usize>, [master]: &mut [Tensor; 1]| {
                let part = range.start - start..range.end - start;
                let mut weights = slice_of(&weights, &part).map_err(offload::torch)?;
                cast::forward(master, &mut weights)
            };
            let offload = offload.as_deref_mut();
            each_portion(offload, [&self.master], local, Way::In, write)
                .map_err(kernel_error(&self.name))?;
        }
        Ok(())
    }
}

/// What of `segments` lies in `range`, which like them counts elements of the owned state.
fn within<'a>(
    segments: &'a [Segment],
    range: &'a Range<usize>,
) -> impl Iterator<Item = Segment> + 'a {
    let cut = |segment: &Segment| Segment {
        elements: segment.elements.start.max(range.start)..segment.elements.end.min(range.end),
        decay: segment.decay,
    };
    segments
        .iter()
        .map(cut)
        .filter(|segment| !segment.elements.is_empty())
}

/// Splits the own slice of a piece into runs of equal treatment, as elements of the owned state, in
/// which the slice begins at `base`. Alignment gaps hold zeros with zero gradients, so they may
/// join either neighbour.
fn segments(parts: &[Part], own: &Range<usize>, base: usize) -> Vec<Segment> {
    let mut segments: Vec<Segment> = Vec::new();
    let trainable = parts
        .iter()
        .filter(|part| part.buffer == BufferKind::Trainable);
    for part in trainable {
        let start = part.range.start.max(own.start);
        let end = part.range.end.min(own.end);
        if start >= end {
            continue;
        }
        let range = base + start - own.start..base + end - own.start;
        match segments.last_mut() {
            Some(last) if last.decay == part.tensor.decay => last.elements.end = range.end,
            _ => segments.push(Segment {
                elements: range,
                decay: part.tensor.decay,
            }),
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
            segments(&parts, &(64..448), 0),
            [
                Segment {
                    elements: 0..36,
                    decay: false
                },
                Segment {
                    elements: 64..384,
                    decay: true
                },
            ]
        );
        assert_eq!(segments(&parts, &(512..576), 64), []);
        let second = segments(&parts, &(448..512), 384);
        assert_eq!(second[0].elements, 384..436);
        let whole = segments(&parts, &(64..448), 0);
        let part: Vec<_> = within(&whole, &(20..80)).map(|it| it.elements).collect();
        assert_eq!(part, [20..36, 64..80]);
        assert_eq!(within(&whole, &(40..60)).count(), 0);
    }
}
