//! Lanes: the operations a step may queue, checked before they leave the step thread.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use tch::Tensor;

use super::buffer::{Buffer, Element, checked};
use super::engine::{Command, Operation};
use super::error::Error;
use super::schedule::{
    AllGather, AllToAll, Broadcast, Form, Place, PointToPoint, ReduceScatter, Schedule, Way,
};
use super::ticket::{Promise, Ticket, Traffic};

/// How many ranks of a lane an error message lists.
const LISTED_RANKS: usize = 8;

/// The type in which the elements of a reduce-scatter travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wire {
    /// As they are.
    F32,
    /// Rounded to bf16 (nearest, ties to even); half the bytes. Every contribution is rounded once,
    /// the own one too, so that the sum does not depend on which rank owns the slice. Sums stay in
    /// f32. On a lane of one rank nothing travels and nothing is rounded.
    Bf16,
}

/// The ranks of a lane and its number.
#[derive(Debug)]
pub(super) struct Members {
    pub(super) id: u32,
    /// Ranks of the world, ascending.
    pub(super) ranks: Vec<usize>,
}

impl fmt::Display for Members {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let listed: Vec<_> = self
            .ranks
            .iter()
            .take(LISTED_RANKS)
            .map(usize::to_string)
            .collect();
        write!(f, "lane {} (ranks {}", self.id, listed.join(", "))?;
        match self.ranks.len().saturating_sub(LISTED_RANKS) {
            0 => write!(f, ")"),
            more => write!(f, " and {more} more)"),
        }
    }
}

/// A communicator over some ranks with one queue: operations run in the order in which they are
/// called, which must be the same on all of its ranks. Lanes run independently of each other.
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
    /// Absent on a lane of one rank, where nothing has to travel.
    commands: Option<Sender<Command>>,
}

impl Lane {
    pub(super) fn new(
        members: Members,
        place: Place,
        rank: usize,
        commands: Option<Sender<Command>>,
    ) -> Self {
        Self {
            members: Arc::new(members),
            place,
            rank,
            commands,
        }
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

    /// Sums slices over the ranks: `buffer` is `[size · slice]` f32; afterwards
    /// `buffer[index·slice..(index+1)·slice]` holds the sum over all ranks of that slice, added in
    /// f32 in rank order, and the rest is unspecified.
    pub fn reduce_scatter(&self, buffer: Tensor, wire: Wire) -> Ticket {
        let place = self.place;
        self.submit("reduce-scatter", buffer, |buffer| {
            expect_element(buffer, &[Element::F32])?;
            expect_slices(buffer, place)?;
            let form = match wire {
                Wire::F32 => Form::F32,
                Wire::Bf16 => Form::F32AsBf16,
            };
            Ok(vec![Box::new(ReduceScatter::new(buffer, place, form))])
        })
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
                Box::new(ReduceScatter::new(buffer, place, form)),
                Box::new(AllGather::new(buffer, place)),
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

    /// Checks the tensor, lets `plan` cut the operation into schedules and queues them.
    fn submit(
        &self,
        name: &'static str,
        tensor: Tensor,
        plan: impl FnOnce(Buffer) -> Result<Vec<Box<dyn Schedule>>, String>,
    ) -> Ticket {
        let phases: VecDeque<_> = match checked(&tensor).and_then(plan) {
            Ok(phases) => phases.into(),
            Err(reason) => {
                let lane = self.members.to_string();
                return Ticket::ready(Err(Error::InvalidArgument {
                    lane,
                    operation: name,
                    reason,
                }));
            }
        };
        let Some(commands) = &self.commands else {
            return Ticket::ready(Ok((tensor, Traffic::default())));
        };
        let (promise, ticket) = Promise::new(self.rank);
        let lane = Arc::clone(&self.members);
        // When the communication thread has ended, the command comes back in the error and its
        // promise tells the ticket.
        let _ = commands.send(Command::Submit(Operation {
            name,
            lane,
            tensor,
            phases,
            promise,
        }));
        ticket
    }
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
mod tests {
    #![allow(clippy::unwrap_used)]

    use tch::{Device, Kind};

    use super::super::Comm;
    use super::*;

    #[test]
    fn arguments_that_do_not_fit_are_refused_without_harm_to_the_lane() {
        let lane = Comm::solo().lane(&[0]).unwrap();
        let wrong = lane.reduce_scatter(Tensor::zeros([4], (Kind::Double, Device::Cpu)), Wire::F32);
        let error = wrong.wait().unwrap_err().to_string();
        assert!(
            error.contains("reduce-scatter on lane 0 (ranks 0)"),
            "{error}"
        );
        assert!(error.contains("[F32], found F64"), "{error}");
        let itself = lane.send(Tensor::zeros([4], (Kind::Float, Device::Cpu)), 0);
        assert!(
            itself
                .wait()
                .unwrap_err()
                .to_string()
                .contains("another of its 1 ranks")
        );
        let tensor = Tensor::from_slice(&[1.5f32, 2.5]);
        let (tensor, traffic) = lane.reduce_scatter(tensor, Wire::Bf16).wait().unwrap();
        assert_eq!(Vec::<f32>::try_from(&tensor).unwrap(), [1.5, 2.5]);
        assert_eq!(traffic.bytes_sent, 0);
    }
}
