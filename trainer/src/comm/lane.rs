//! Lanes: the operations a step may queue, checked before they leave the step thread.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use tch::Tensor;

use super::alone::Alone;
use super::buffer::{Buffer, Element, checked, described};
use super::engine::Command;
use super::event::Event;
use super::members::Members;
use super::operation::{Operation, submit};
use super::schedule::{
    AllGather, AllGatherAsBf16, AllToAll, Broadcast, Form, Place, PointToPoint, ReduceScatter,
    Schedule, Target, Way,
};
use super::ticket::{Promise, Ticket};
use super::waiters::{Label, Waiters};

/// The schedules of an operation, or why its arguments do not fit.
type Plan = Result<Vec<Box<dyn Schedule>>, String>;

/// The type in which the elements of a sum travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wire {
    /// As they are.
    F32,
    /// Rounded to bf16 (nearest, ties to even); half the bytes. Every contribution is rounded once,
    /// the own one too, so that the sum does not depend on which rank owns the slice. They are added
    /// in f32; a reduce-scatter leaves the sum as it is, an all-reduce rounds it to send it on. On a
    /// lane of one rank nothing travels and nothing is rounded.
    Bf16,
}

/// A communicator over some ranks with one queue: operations run in the order in which they are
/// called, which must be the same on all of its ranks. Lanes run independently of each other, unless
/// [`Lane::after`] makes an operation of one wait for an operation of another.
///
/// Every operation takes a tensor and returns a [`Ticket`] at once. The tensor must be contiguous
/// and on the CPU; it belongs to the operation until the ticket gives it back. If it shares its
/// storage with other tensors (a view of a larger buffer), the shared part must not be touched in
/// the meantime.
///
/// An argument that does not fit gives a ticket that fails; nothing is sent and the lane stays
/// usable. An operation that fails on its way poisons its lane: all later ones fail as well.
#[derive(Debug, Clone)]
pub struct Lane {
    members: Arc<Members>,
    place: Place,
    rank: usize,
    /// Absent in a world of one rank, which has no communication thread.
    commands: Option<Sender<Command>>,
    /// Of the rank's tickets.
    waiters: Waiters,
    /// Present on a lane of one rank, where nothing has to travel.
    alone: Option<Arc<Alone>>,
    /// What the operations of this handle come after.
    after: Vec<Event>,
}

impl Lane {
    pub(super) fn new(
        members: Members,
        place: Place,
        rank: usize,
        commands: Option<Sender<Command>>,
        waiters: Waiters,
    ) -> Self {
        Self {
            members: Arc::new(members),
            place,
            rank,
            commands,
            waiters,
            alone: (place.size == 1).then(Arc::default),
            after: Vec::new(),
        }
    }

    /// The lane's number: how many lanes this rank had created before it. Ranks of a lane have the
    /// same number for it.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.members.id
    }

    /// The number of ranks of this lane.
    #[must_use]
    pub fn size(&self) -> usize {
        self.place.size
    }

    /// This rank's index among the lane's ranks.
    #[must_use]
    pub fn index(&self) -> usize {
        self.place.index
    }

    /// The lane's ranks in the world, ascending.
    #[must_use]
    pub fn ranks(&self) -> &[usize] {
        &self.members.ranks
    }

    /// A handle on the same lane and the same queue whose operations do not start before the one of
    /// `ticket`, an operation of this rank on another lane, has ended; nor before whatever this
    /// handle waits for already. An operation that must not start yet holds up those behind it on
    /// its lane; the step thread waits for nothing.
    ///
    /// This chains operations over the same memory: reduce-scatter in the shard group, then
    /// all-reduce of the own slice (a view made before) in the replica group. The handle stays valid
    /// when the ticket is waited for or dropped, and keeps no tensor alive.
    ///
    /// If the operation of `ticket` failed, those of the handle are not run: the first fails with
    /// [`Error::Dependency`](super::Error::Dependency) and poisons its lane.
    ///
    /// Ranks need not chain alike, but there must be one order of all operations of all lanes that
    /// fits every rank's queues and chains; otherwise ranks wait for each other for ever.
    ///
    /// On a lane of one rank tickets are ready at once as long as nothing has to be waited for. From
    /// the first operation that must wait, that lane has a queue like any other.
    #[must_use = "operations of the original handle do not wait"]
    pub fn after(&self, ticket: &Ticket) -> Self {
        let mut lane = self.clone();
        lane.after.push(ticket.event());
        lane
    }

    /// Sums slices over the ranks: `buffer` is `[size · slice]` f32; afterwards
    /// `buffer[index·slice..(index+1)·slice]` holds the sum over all ranks of that slice, added in
    /// f32 in rank order, and the rest is unspecified.
    pub fn reduce_scatter(&self, buffer: Tensor, wire: Wire) -> Ticket {
        let place = self.place;
        self.submit("reduce-scatter", buffer, |buffer| {
            let form = summed_form(buffer, place, wire)?;
            Ok(vec![Box::new(ReduceScatter::new(
                buffer,
                Target::InPlace,
                place,
                form,
            ))])
        })
    }

    /// Like [`Lane::reduce_scatter`], but this rank's sum goes to `into` and `buffer` is left as it
    /// was: `into` is `[slice]` f32 (any shape of as many elements) and shares no memory with
    /// `buffer`. It is overwritten, or with `accumulate` becomes `into[i] + sum[i]`, where `sum[i]`
    /// is formed in rank order first.
    ///
    /// The ticket gives `buffer` back; keep a view of `into` to read it, and do not touch it until
    /// then. After a failure it holds parts of the result.
    pub fn reduce_scatter_into(
        &self,
        buffer: Tensor,
        wire: Wire,
        into: Tensor,
        accumulate: bool,
    ) -> Ticket {
        let place = self.place;
        let target = checked(&into).map_err(|reason| format!("the target: {reason}"));
        let plan = |buffer: Buffer| -> Plan {
            let form = summed_form(buffer, place, wire)?;
            let target = target?;
            expect_target(target, buffer, place)?;
            let target = if accumulate {
                Target::Add(target)
            } else {
                Target::Write(target)
            };
            Ok(vec![Box::new(ReduceScatter::new(
                buffer, target, place, form,
            ))])
        };
        let planned = checked(&buffer).and_then(plan);
        self.submit_planned("reduce-scatter-into", buffer, Some(into), planned)
    }

    /// Gathers slices: `buffer` is `[size · slice]` of any type that lanes carry, with the slice at
    /// `index` filled; afterwards it holds the slices of all ranks.
    pub fn all_gather(&self, buffer: Tensor) -> Ticket {
        let place = self.place;
        self.submit("all-gather", buffer, |buffer| {
            expect_slices(buffer, place)?;
            Ok(vec![Box::new(AllGather::new(buffer, place))])
        })
    }

    /// Sums `buffer` (f32 or f64, any shape) over the ranks in rank order; the result has the same
    /// bits on every rank.
    pub fn all_reduce(&self, buffer: Tensor) -> Ticket {
        let place = self.place;
        self.submit("all-reduce", buffer, |buffer| {
            expect_element(buffer, &[Element::F32, Element::F64])?;
            let form = if buffer.element() == Element::F64 {
                Form::F64
            } else {
                Form::F32
            };
            Ok(vec![
                Box::new(ReduceScatter::new(buffer, Target::InPlace, place, form)),
                Box::new(AllGather::new(buffer, place)),
            ])
        })
    }

    /// Like [`Lane::all_reduce`] of f32, with elements that travel as `wire` says. As bf16, every
    /// contribution is rounded, they are added in f32, and the sum is rounded; the result has the
    /// same bits on every rank.
    pub fn all_reduce_as(&self, buffer: Tensor, wire: Wire) -> Ticket {
        if wire == Wire::F32 || self.place.size == 1 {
            return self.all_reduce(buffer);
        }
        let place = self.place;
        self.submit("all-reduce", buffer, |buffer| {
            expect_element(buffer, &[Element::F32])?;
            let form = Form::F32AsBf16;
            Ok(vec![
                Box::new(ReduceScatter::new(buffer, Target::InPlace, place, form)),
                Box::new(AllGatherAsBf16::new(buffer, place)),
            ])
        })
    }

    /// Copies `buffer` (any type that lanes carry, any shape, the same on all ranks) of the rank at
    /// index `root` of the lane to all others.
    pub fn broadcast(&self, buffer: Tensor, root: usize) -> Ticket {
        let place = self.place;
        self.submit("broadcast", buffer, |buffer| {
            if root >= place.size {
                return Err(format!(
                    "root {root} is not an index of its {} ranks (ranks count from 0)",
                    place.size
                ));
            }
            Ok(vec![Box::new(Broadcast::new(buffer, place, root))])
        })
    }

    /// Transposes slices: `buffer` is `[size · slice]`; afterwards its slice *j* is what slice
    /// `index` was on the rank at index *j*.
    pub fn all_to_all(&self, buffer: Tensor) -> Ticket {
        let place = self.place;
        self.submit("all-to-all", buffer, |buffer| {
            expect_slices(buffer, place)?;
            Ok(vec![Box::new(AllToAll::new(buffer, place))])
        })
    }

    /// Sends `buffer` to the rank at index `peer`, which must call [`Lane::recv`] with a tensor of
    /// as many bytes. The queue stands still until it has arrived.
    pub fn send(&self, buffer: Tensor, peer: usize) -> Ticket {
        self.point_to_point("send", buffer, peer, Way::Send)
    }

    /// Fills `buffer` with what the rank at index `peer` sends.
    pub fn recv(&self, buffer: Tensor, peer: usize) -> Ticket {
        self.point_to_point("recv", buffer, peer, Way::Receive)
    }

    fn point_to_point(&self, name: &'static str, buffer: Tensor, peer: usize, way: Way) -> Ticket {
        let place = self.place;
        self.submit(name, buffer, |buffer| {
            if peer >= place.size || peer == place.index {
                return Err(format!(
                    "peer {peer} must be the index of another of its {} ranks, own index {}",
                    place.size, place.index
                ));
            }
            Ok(vec![Box::new(PointToPoint::new(buffer, peer, way))])
        })
    }

    /// An operation in place, which has nothing to do on a lane of one rank.
    fn submit(
        &self,
        name: &'static str,
        tensor: Tensor,
        plan: impl FnOnce(Buffer) -> Plan,
    ) -> Ticket {
        let alone = self.place.size == 1;
        let buffer = if alone {
            // It may lie on a GPU.
            described(&tensor)
        } else {
            checked(&tensor)
        };
        let planned = buffer.and_then(plan);
        let phases = planned.map(|phases| if alone { Vec::new() } else { phases });
        self.submit_planned(name, tensor, None, phases)
    }

    /// Passes on an operation that has been checked and cut into schedules, or refuses it.
    fn submit_planned(
        &self,
        name: &'static str,
        tensor: Tensor,
        into: Option<Tensor>,
        planned: Plan,
    ) -> Ticket {
        let label = Label {
            operation: name,
            lane: Arc::clone(&self.members),
        };
        let (promise, ticket) = Promise::new(self.rank, label, self.waiters.clone());
        let (phases, refused) = match planned {
            Ok(phases) => (phases.into(), None),
            Err(reason) => (VecDeque::new(), Some(reason)),
        };
        let operation = Operation {
            name,
            lane: Arc::clone(&self.members),
            tensor,
            into,
            phases,
            after: self.after.clone(),
            promise,
        };
        match (refused, &self.alone) {
            (Some(reason), _) => operation.refuse(reason),
            (None, Some(alone)) => alone.run(operation, self.commands.as_ref()),
            (None, None) => submit(operation, self.commands.as_ref()),
        }
        ticket
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

#[cfg(test)]
mod tests;
