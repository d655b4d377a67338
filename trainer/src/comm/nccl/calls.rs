//! Collectives as calls of NCCL.
//!
//! What is summed in f32 or f64, and what is only moved, goes straight from the caller's memory to
//! the caller's memory: NCCL works in place. Three things need memory of the lane's own, kept from
//! one operation to the next:
//!
//! - a sum that is added to what is there: NCCL only writes;
//! - an all-to-all in place: NCCL must not receive where it sends from;
//! - sums of what travels as bf16. NCCL's own sum of bf16 rounds at every hop of its ring or tree, so
//!   that the error grows with the ranks and depends on where a slice is owned. Here every
//!   contribution is rounded once, all travel to the owner of the slice, and are added in f32 in rank
//!   order, as over every other transport: the same bits as there. It takes as many bytes on the wire
//!   as NCCL's, and twice the buffer's rounded size in memory.
//!
//! The order in which NCCL adds is its own. It gives the same bits on every rank, and the same again
//! on the same machines; they are not those of the other transports, which add in rank order.

use std::ffi::c_int;

use cudarc::nccl::sys::{ncclComm_t, ncclDataType_t, ncclRedOp_t};
use oxitron_kernels::cast;
use tch::{Kind, Tensor};

use super::super::buffer::{Buffer, Element};
use super::super::collective::Collective;
use super::super::error::Error;
use super::super::schedule::{Form, Place, Target, Way};
use super::lane::Parts;
use super::library::{Code, IN_PROGRESS, Library, SUCCESS};
use super::stream::{flat, words};

/// Memory of a lane, which grows to the largest request.
#[derive(Debug, Default)]
pub(super) struct Staging {
    /// f32: sums on their way to where they are added.
    sum: Option<Tensor>,
    /// bf16: the own contribution to every slice.
    rounded: Option<Tensor>,
    /// bf16: every contribution to the own slice.
    arrived: Option<Tensor>,
    /// Bytes of any type.
    moved: Option<Tensor>,
}

/// The bytes that this rank sends on if the ranks stand in a ring, as NCCL lets them for long
/// buffers.
pub(super) fn ring_bytes(collective: &Collective, place: Place) -> u64 {
    let buffer = collective.buffer();
    let elements = match collective {
        // Unequal slices are padded.
        Collective::AllReduce { .. } => buffer.elements().div_ceil(place.size) * place.size,
        _ => buffer.elements(),
    };
    let others = |width: usize| (elements / place.size * (place.size - 1) * width) as u64;
    let width = buffer.element().bytes();
    match collective {
        Collective::ReduceScatter { form, .. } => others(form.wire_bytes()),
        Collective::AllReduce { form, .. } => 2 * others(form.wire_bytes()),
        Collective::AllGather { .. } | Collective::AllToAll { .. } => others(width),
        // The last of the ring has nobody to pass it on to.
        Collective::Broadcast { root, .. } if (place.index + 1) % place.size == *root => 0,
        Collective::Message {
            way: Way::Receive, ..
        } => 0,
        Collective::Broadcast { .. } | Collective::Message { .. } => buffer.bytes() as u64,
    }
}

/// Puts the kernels of `collective` into the lane's stream. The tensors are those that the
/// collective's buffers describe: the one that travels, and the target of a sum.
///
/// # Errors
/// [`Error::Gpu`] and the other errors of a call.
pub(super) fn issue(
    parts: Parts<'_>,
    collective: &Collective,
    (tensor, into): (&Tensor, Option<&Tensor>),
    staging: &mut Staging,
) -> Result<(), Error> {
    let buffer = collective.buffer();
    if buffer.elements() == 0 {
        return Ok(());
    }
    let Place { index, size } = parts.place;
    let (slice, stream) = (buffer.elements() / size, parts.queue.raw());
    let kind = data_type(buffer.element());
    let all = buffer.at(0);
    match *collective {
        Collective::ReduceScatter {
            form: Form::F32AsBf16,
            target,
            ..
        } => rounded_sum(parts, (tensor, into), target, staging),
        Collective::AllReduce {
            form: Form::F32AsBf16,
            ..
        } => rounded_sum_everywhere(parts, tensor, staging),
        Collective::ReduceScatter { target, .. } => {
            let sum = match target {
                Target::InPlace => buffer.at(index * slice),
                Target::Write(into) => into.at(0),
                Target::Add(_) => {
                    let sum = parts.stage(&mut staging.sum, Kind::Float, slice, tensor)?;
                    sum.data_ptr().cast()
                }
            };
            parts.call(|nccl, communicator| {
                // SAFETY: `all` leads to `size · slice` elements and `sum` to `slice`, which lie
                // where NCCL allows it in place or apart; both stay until the stream is done.
                unsafe {
                    (nccl.reduce_scatter)(
                        all.cast(),
                        sum.cast(),
                        slice,
                        kind,
                        ncclRedOp_t::ncclSum,
                        communicator,
                        stream,
                    )
                }
            })?;
            match (target, into) {
                (Target::Add(_), Some(into)) => {
                    let sum = parts.stage(&mut staging.sum, Kind::Float, slice, tensor)?;
                    let mut into = parts.flat(into)?;
                    parts.run(move || cast::accumulate(&sum, &mut into).map_err(words))
                }
                _ => Ok(()),
            }
        }
        Collective::AllReduce { .. } => parts.call(|nccl, communicator| {
            // SAFETY: `all` leads to so many elements, which stay until the stream is done.
            unsafe {
                (nccl.all_reduce)(
                    all.cast(),
                    all.cast(),
                    buffer.elements(),
                    kind,
                    ncclRedOp_t::ncclSum,
                    communicator,
                    stream,
                )
            }
        }),
        Collective::AllGather { .. } => gather(parts, buffer),
        Collective::Broadcast { root, .. } => parts.call(|nccl, communicator| {
            // SAFETY: as above.
            unsafe {
                (nccl.broadcast)(
                    all.cast(),
                    all.cast(),
                    buffer.elements(),
                    kind,
                    root as c_int,
                    communicator,
                    stream,
                )
            }
        }),
        Collective::AllToAll { .. } => swap(parts, tensor, buffer, staging),
        Collective::Message { peer, way, .. } => parts.call(|nccl, communicator| {
            let (count, peer) = (buffer.elements(), peer as c_int);
            // SAFETY: as above.
            unsafe {
                match way {
                    Way::Send => (nccl.send)(all.cast(), count, kind, peer, communicator, stream),
                    Way::Receive => {
                        (nccl.recv)(all.cast(), count, kind, peer, communicator, stream)
                    }
                }
            }
        }),
    }
}

/// Gathers the slices of `buffer` in place.
fn gather(parts: Parts<'_>, buffer: Buffer) -> Result<(), Error> {
    let Place { index, size } = parts.place;
    let (slice, stream) = (buffer.elements() / size, parts.queue.raw());
    let (own, all) = (buffer.at(index * slice), buffer.at(0));
    parts.call(|nccl, communicator| {
        // SAFETY: `all` leads to `size · slice` elements, of which `own` is this rank's slice; they
        // stay until the stream is done.
        unsafe {
            let kind = data_type(buffer.element());
            (nccl.all_gather)(own.cast(), all.cast(), slice, kind, communicator, stream)
        }
    })
}

/// Swaps slice *j* of this rank with slice *i* of rank *j*: what arrives waits in the lane's memory.
fn swap(
    parts: Parts<'_>,
    tensor: &Tensor,
    buffer: Buffer,
    staging: &mut Staging,
) -> Result<(), Error> {
    let slice = buffer.elements() / parts.place.size;
    let bytes = buffer.bytes();
    let moved = parts.stage(&mut staging.moved, Kind::Uint8, bytes, tensor)?;
    let arrived = moved.data_ptr().cast::<u8>();
    let width = slice * buffer.element().bytes();
    let messages = (0..parts.place.size).map(|peer| Exchange {
        peer,
        send: buffer.at(peer * slice),
        receive: arrived.wrapping_add(peer * width),
    });
    exchange(
        parts,
        messages.collect(),
        slice,
        data_type(buffer.element()),
    )?;
    let mut target = parts.torch(parts.flat(tensor)?.f_view_dtype(Kind::Uint8))?;
    parts.run(move || {
        let copied = target.f_copy_(&moved);
        copied.map_err(|error| error.to_string())
    })
}

/// The sum of the own slice of what travels as bf16.
fn rounded_sum(
    parts: Parts<'_>,
    (tensor, into): (&Tensor, Option<&Tensor>),
    target: Target,
    staging: &mut Staging,
) -> Result<(), Error> {
    let Place { index, size } = parts.place;
    let all = parts.flat(tensor)?;
    let slice = all.numel() / size;
    let sum = match (target, into) {
        (Target::Write(_), Some(into)) => parts.flat(into)?,
        (Target::Add(_), Some(_)) => parts.stage(&mut staging.sum, Kind::Float, slice, tensor)?,
        _ => parts.part(&all, index * slice, slice)?,
    };
    scatter_rounded(parts, &all, slice, sum.shallow_clone(), staging)?;
    match (target, into) {
        (Target::Add(_), Some(into)) => {
            let mut into = parts.flat(into)?;
            parts.run(move || cast::accumulate(&sum, &mut into).map_err(words))
        }
        _ => Ok(()),
    }
}

/// The same for every slice, rounded again to be sent on, on all ranks. The last slice may be short.
fn rounded_sum_everywhere(
    parts: Parts<'_>,
    tensor: &Tensor,
    staging: &mut Staging,
) -> Result<(), Error> {
    let Place { index, size } = parts.place;
    let mut all = parts.flat(tensor)?;
    let slice = all.numel().div_ceil(size);
    let sum = parts.stage(&mut staging.sum, Kind::Float, slice, tensor)?;
    scatter_rounded(parts, &all, slice, sum.shallow_clone(), staging)?;
    // What was sent has left.
    let rounded = parts.stage(&mut staging.rounded, Kind::BFloat16, size * slice, tensor)?;
    let mut own = parts.part(&rounded, index * slice, slice)?;
    parts.run(move || cast::forward(&sum, &mut own).map_err(words))?;
    let buffer = super::super::buffer::checked(&rounded).map_err(|reason| parts.broken(reason))?;
    gather(parts, buffer)?;
    let used = parts.part(&rounded, 0, all.numel())?;
    parts.run(move || cast::forward(&used, &mut all).map_err(words))
}

/// Sends everybody its slice of `all`, `[≤ size · slice]` f32, as bf16, and adds what arrives in rank
/// order: `sum` is `[slice]` f32. Past the end of `all`, sums are unspecified.
fn scatter_rounded(
    parts: Parts<'_>,
    all: &Tensor,
    slice: usize,
    mut sum: Tensor,
    staging: &mut Staging,
) -> Result<(), Error> {
    let Place { index, size } = parts.place;
    let rounded = parts.stage(&mut staging.rounded, Kind::BFloat16, size * slice, all)?;
    let arrived = parts.stage(&mut staging.arrived, Kind::BFloat16, size * slice, all)?;
    let (from, mut to) = (all.shallow_clone(), parts.part(&rounded, 0, all.numel())?);
    parts.run(move || cast::forward(&from, &mut to).map_err(words))?;
    let width = slice * Element::Bf16.bytes();
    let at =
        |tensor: &Tensor, peer: usize| tensor.data_ptr().cast::<u8>().wrapping_add(peer * width);
    let messages = (0..size)
        .filter(|&peer| peer != index)
        .map(|peer| Exchange {
            peer,
            send: at(&rounded, peer),
            receive: at(&arrived, peer),
        });
    let messages = messages.collect();
    exchange(parts, messages, slice, ncclDataType_t::ncclBfloat16)?;
    let contributions = (0..size).map(|member| {
        let from = if member == index { &rounded } else { &arrived };
        parts.part(from, member * slice, slice)
    });
    let contributions: Vec<Tensor> = contributions.collect::<Result<_, _>>()?;
    parts.run(move || {
        for (member, contribution) in contributions.iter().enumerate() {
            let added = match member {
                0 => cast::forward(contribution, &mut sum),
                _ => cast::accumulate(contribution, &mut sum),
            };
            added.map_err(words)?;
        }
        Ok(())
    })
}

/// What goes to a peer and comes from it.
struct Exchange {
    peer: usize,
    send: *mut u8,
    receive: *mut u8,
}

/// Sends and receives `count` elements with each peer, all at once.
fn exchange(
    parts: Parts<'_>,
    messages: Vec<Exchange>,
    count: usize,
    kind: ncclDataType_t,
) -> Result<(), Error> {
    let stream = parts.queue.raw();
    parts.call(|nccl, communicator| {
        // SAFETY: a group begins and ends on this thread, with nothing but these calls in between;
        // sources and targets are `count` elements each, none of the ones overlapping the others,
        // and stay until the stream is done.
        unsafe {
            let mut code = (nccl.group_start)();
            if code != SUCCESS {
                return code;
            }
            for Exchange {
                peer,
                send,
                receive,
            } in messages
            {
                let peer = peer as c_int;
                let sent = (nccl.send)(send.cast(), count, kind, peer, communicator, stream);
                let received = (nccl.recv)(receive.cast(), count, kind, peer, communicator, stream);
                code = first_failure([code, sent, received]);
            }
            first_failure([code, (nccl.group_end)()])
        }
    })
}

/// The first that says more than that it goes on; otherwise the last.
fn first_failure<const N: usize>(codes: [Code; N]) -> Code {
    let failed = |code: &&Code| !matches!(**code, SUCCESS | IN_PROGRESS);
    let last = codes.last();
    *codes.iter().find(failed).or(last).unwrap_or(&SUCCESS)
}

fn data_type(element: Element) -> ncclDataType_t {
    match element {
        Element::F32 => ncclDataType_t::ncclFloat32,
        Element::F64 => ncclDataType_t::ncclFloat64,
        Element::Bf16 => ncclDataType_t::ncclBfloat16,
        Element::I64 => ncclDataType_t::ncclInt64,
        Element::U8 => ncclDataType_t::ncclUint8,
    }
}

impl Parts<'_> {
    fn broken(&self, reason: String) -> Error {
        Error::Gpu {
            lane: self.label.lane.to_string(),
            operation: self.label.operation,
            reason,
        }
    }

    fn torch<T>(&self, result: Result<T, tch::TchError>) -> Result<T, Error> {
        result.map_err(|error| self.broken(error.to_string()))
    }

    fn call(&self, call: impl FnOnce(&Library, ncclComm_t) -> Code) -> Result<(), Error> {
        self.communicator.call(self.label, self.waiters, None, call)
    }

    fn run(&self, ops: impl FnOnce() -> Result<(), String> + Send + 'static) -> Result<(), Error> {
        self.queue.run(ops).map_err(|reason| self.broken(reason))
    }

    fn flat(&self, tensor: &Tensor) -> Result<Tensor, Error> {
        flat(tensor).map_err(|reason| self.broken(reason))
    }

    fn part(&self, tensor: &Tensor, start: usize, length: usize) -> Result<Tensor, Error> {
        self.torch(tensor.f_narrow(0, start as i64, length as i64))
    }

    /// The first `elements` elements of a slot of the lane's memory, beside `like`.
    fn stage(
        &self,
        slot: &mut Option<Tensor>,
        kind: Kind,
        elements: usize,
        like: &Tensor,
    ) -> Result<Tensor, Error> {
        let length = elements as i64;
        let memory = match slot.take() {
            Some(memory) if memory.numel() >= elements => memory,
            outgrown => {
                if let Some(outgrown) = outgrown {
                    // The stream may be at work on it.
                    let kept = self.queue.uses(&outgrown);
                    kept.map_err(|reason| self.broken(reason))?;
                }
                let device = like.device();
                let allocate = || {
                    let memory = Tensor::f_empty([length], (kind, device));
                    memory.map_err(|error| error.to_string())
                };
                let memory = self.queue.allocate(allocate);
                memory.map_err(|reason| self.broken(reason))?
            }
        };
        let part = self.torch(memory.f_narrow(0, 0, length));
        *slot = Some(memory);
        part
    }
}
