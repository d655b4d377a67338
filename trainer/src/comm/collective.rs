//! What an operation is, as data: checked once, then run by whoever carries its tensor.
//!
//! The communication thread cuts it into schedules over messages (`schedule`); on GPUs it becomes
//! calls of NCCL (`nccl`). Both see the same checked buffers.

use tch::{Device, Tensor};

use super::buffer::{Buffer, Element, checked};
use super::lane::Wire;
use super::schedule::{
    AllGather, AllGatherAsBf16, AllToAll, Broadcast, Form, Place, PointToPoint, ReduceScatter,
    Schedule, Target, Way,
};

/// An operation whose arguments fit.
#[derive(Debug, Clone, Copy)]
pub(super) enum Collective {
    /// The sum of the own slice goes to `target`.
    ReduceScatter {
        buffer: Buffer,
        target: Target,
        form: Form,
    },
    AllReduce {
        buffer: Buffer,
        form: Form,
    },
    AllGather {
        buffer: Buffer,
    },
    Broadcast {
        buffer: Buffer,
        root: usize,
    },
    AllToAll {
        buffer: Buffer,
    },
    /// One end of a message to or from the member `peer`.
    Message {
        buffer: Buffer,
        peer: usize,
        way: Way,
    },
}

/// A collective, or what was expected of its arguments and what was found.
type Checked = Result<Collective, String>;

impl Collective {
    pub(super) fn reduce_scatter(tensor: &Tensor, place: Place, wire: Wire) -> Checked {
        let buffer = checked(tensor)?;
        Ok(Self::ReduceScatter {
            buffer,
            target: Target::InPlace,
            form: summed_form(buffer, place, wire)?,
        })
    }

    pub(super) fn reduce_scatter_into(
        tensor: &Tensor,
        place: Place,
        wire: Wire,
        into: &Tensor,
        accumulate: bool,
    ) -> Checked {
        let buffer = checked(tensor)?;
        let form = summed_form(buffer, place, wire)?;
        let into = checked(into).map_err(|reason| format!("the target: {reason}"))?;
        expect_target(into, buffer, place)?;
        let target = if accumulate {
            Target::Add(into)
        } else {
            Target::Write(into)
        };
        Ok(Self::ReduceScatter {
            buffer,
            target,
            form,
        })
    }

    pub(super) fn all_gather(tensor: &Tensor, place: Place) -> Checked {
        let buffer = checked(tensor)?;
        expect_slices(buffer, place)?;
        Ok(Self::AllGather { buffer })
    }

    pub(super) fn all_reduce(tensor: &Tensor) -> Checked {
        let buffer = checked(tensor)?;
        expect_element(buffer, &[Element::F32, Element::F64])?;
        let form = if buffer.element() == Element::F64 {
            Form::F64
        } else {
            Form::F32
        };
        Ok(Self::AllReduce { buffer, form })
    }

    pub(super) fn all_reduce_as_bf16(tensor: &Tensor) -> Checked {
        let buffer = checked(tensor)?;
        expect_element(buffer, &[Element::F32])?;
        Ok(Self::AllReduce {
            buffer,
            form: Form::F32AsBf16,
        })
    }

    pub(super) fn broadcast(tensor: &Tensor, place: Place, root: usize) -> Checked {
        let buffer = checked(tensor)?;
        if root >= place.size {
            return Err(format!(
                "root {root} is not an index of its {} ranks (ranks count from 0)",
                place.size
            ));
        }
        Ok(Self::Broadcast { buffer, root })
    }

    pub(super) fn all_to_all(tensor: &Tensor, place: Place) -> Checked {
        let buffer = checked(tensor)?;
        expect_slices(buffer, place)?;
        Ok(Self::AllToAll { buffer })
    }

    pub(super) fn message(tensor: &Tensor, place: Place, peer: usize, way: Way) -> Checked {
        let buffer = checked(tensor)?;
        if peer >= place.size || peer == place.index {
            return Err(format!(
                "peer {peer} must be the index of another of its {} ranks, own index {}",
                place.size, place.index
            ));
        }
        Ok(Self::Message { buffer, peer, way })
    }

    /// The memory that travels.
    pub(super) fn buffer(&self) -> Buffer {
        match *self {
            Self::ReduceScatter { buffer, .. }
            | Self::AllReduce { buffer, .. }
            | Self::AllGather { buffer }
            | Self::Broadcast { buffer, .. }
            | Self::AllToAll { buffer }
            | Self::Message { buffer, .. } => buffer,
        }
    }

    /// Where its tensors lie.
    pub(super) fn device(&self) -> Device {
        self.buffer().device()
    }

    /// What to do with the sum, where it does not stay in the buffer.
    pub(super) fn target(&self) -> Target {
        match *self {
            Self::ReduceScatter { target, .. } => target,
            _ => Target::InPlace,
        }
    }

    /// The same as schedules over messages, one after the other.
    pub(super) fn schedules(self, place: Place) -> Vec<Box<dyn Schedule>> {
        match self {
            Self::ReduceScatter {
                buffer,
                target,
                form,
            } => vec![Box::new(ReduceScatter::new(buffer, target, place, form))],
            Self::AllReduce { buffer, form } => {
                let gather: Box<dyn Schedule> = match form {
                    Form::F32AsBf16 => Box::new(AllGatherAsBf16::new(buffer, place)),
                    Form::F32 | Form::F64 => Box::new(AllGather::new(buffer, place)),
                };
                let target = Target::InPlace;
                let reduce = Box::new(ReduceScatter::new(buffer, target, place, form));
                vec![reduce, gather]
            }
            Self::AllGather { buffer } => vec![Box::new(AllGather::new(buffer, place))],
            Self::Broadcast { buffer, root } => vec![Box::new(Broadcast::new(buffer, place, root))],
            Self::AllToAll { buffer } => vec![Box::new(AllToAll::new(buffer, place))],
            Self::Message { buffer, peer, way } => {
                vec![Box::new(PointToPoint::new(buffer, peer, way))]
            }
        }
    }
}

/// The form in which `buffer` is summed.
fn summed_form(buffer: Buffer, place: Place, wire: Wire) -> Result<Form, String> {
    expect_element(buffer, &[Element::F32])?;
    expect_slices(buffer, place)?;
    Ok(match wire {
        Wire::Bf16 if place.size > 1 => Form::F32AsBf16,
        // Alone, nothing travels and nothing is rounded.
        _ => Form::F32,
    })
}

/// Checks the tensor that the own slice's sum goes to.
fn expect_target(into: Buffer, buffer: Buffer, place: Place) -> Result<(), String> {
    expect_element(into, &[Element::F32]).map_err(|reason| format!("the target: {reason}"))?;
    let slice = buffer.elements() / place.size;
    if into.elements() != slice {
        return Err(format!(
            "expected a target of the {slice} elements of one slice, found {}",
            into.elements()
        ));
    }
    if into.device() != buffer.device() {
        return Err(format!(
            "expected a target beside the buffer, found one on {:?} and the buffer on {:?}",
            into.device(),
            buffer.device()
        ));
    }
    if into.overlaps(&buffer) {
        return Err(
            "expected a target apart from the buffer, found one that shares memory with it"
                .to_owned(),
        );
    }
    Ok(())
}

fn expect_element(buffer: Buffer, expected: &[Element]) -> Result<(), String> {
    if expected.contains(&buffer.element()) {
        return Ok(());
    }
    Err(format!(
        "expected elements of type {expected:?}, found {:?}",
        buffer.element()
    ))
}

fn expect_slices(buffer: Buffer, place: Place) -> Result<(), String> {
    if buffer.elements().is_multiple_of(place.size) {
        return Ok(());
    }
    Err(format!(
        "expected one equal slice for each of {} ranks, found {} elements; pad the buffer",
        place.size,
        buffer.elements()
    ))
}
