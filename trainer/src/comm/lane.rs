//! Lanes: the operations a step may queue, checked before they leave the step thread.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use tch::{Device, Tensor};

use super::alone::{Alone, OTHER_DEVICE};
use super::collective::Collective;
use super::engine::Command;
use super::error::Result;
use super::event::Event;
use super::members::Members;
use super::nccl::{Gpu, GpuLane};
use super::operation::{Operation, submit};
use super::schedule::{Place, Target, Way};
use super::ticket::{Promise, Ticket};
use super::waiters::{Label, Waiters};

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
/// Every operation takes a tensor and returns a [`Ticket`] at once. The tensor must be contiguous;
/// it belongs to the operation until the ticket gives it back. If it shares its storage with other
/// tensors (a view of a larger buffer), the shared part must not be touched in the meantime.
///
/// The tensor's device decides who carries it: the rank's transport those of the CPU, and NCCL those
/// of the rank's GPU, on lanes that were made after [`Comm::open_gpu`](super::Comm::open_gpu). The
/// two are queues of their own. On a GPU, an operation comes after everything that the thread has
/// issued to its current stream; the lane runs it in a stream of its own, and the host waits for
/// nothing. A lane of one rank takes tensors of any device.
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
    /// Present where the lane carries tensors of a GPU.
    gpu: Option<GpuLane>,
    /// What the operations of this handle come after.
    after: Vec<Event>,
}

/// Who runs an operation.
enum Carrier<'a> {
    /// The communication thread, or this one on a lane of one rank.
    Host,
    /// NCCL.
    Gpus(&'a GpuLane),
    /// This thread, on a lane of one rank.
    AloneOnGpu(&'a Alone, Gpu),
}

impl Lane {
    pub(super) fn new(
        members: Arc<Members>,
        place: Place,
        rank: usize,
        commands: Option<Sender<Command>>,
        waiters: Waiters,
        gpu: Option<GpuLane>,
    ) -> Self {
        Self {
            members,
            place,
            rank,
            commands,
            waiters,
            alone: (place.size == 1).then(Arc::default),
            gpu,
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

    /// The version of NCCL that carries this lane's tensors of GPUs, as in `2.28.9`.
    #[must_use]
    pub fn nccl_version(&self) -> Option<String> {
        self.gpu.as_ref().map(|gpu| gpu.version().to_string())
    }

    /// Whether all is well between this rank's GPU and the others, as far as is known. A host that
    /// waits for a GPU asks now and then: what is awaited may never come, and after an error it holds
    /// parts of results. True of all lanes of the rank, whichever is asked.
    ///
    /// # Errors
    /// What NCCL says, with the lane and the operation that it runs; [`Error::Interrupted`] when the
    /// step has been given up.
    ///
    /// [`Error::Interrupted`]: super::Error::Interrupted
    pub fn check(&self) -> Result<()> {
        self.waiters
            .gpus()
            .map_or(Ok(()), |gpus| gpus.check(&self.waiters))
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
    ///
    /// Between GPUs, the lane's stream waits for the other one's. An operation on the CPU cannot come
    /// after one on a GPU that way, nor the other way round: it is refused.
    #[must_use = "operations of the original handle do not wait"]
    pub fn after(&self, ticket: &Ticket) -> Self {
        let mut lane = self.clone();
        lane.after.push(ticket.event());
        lane
    }

    /// Sums slices over the ranks: `buffer` is `[size · slice]` f32; afterwards
    /// `buffer[index·slice..(index+1)·slice]` holds the sum over all ranks of that slice, added in
    /// f32 in rank order (on GPUs: with [`Wire::F32`], in NCCL's), and the rest is unspecified.
    pub fn reduce_scatter(&self, buffer: Tensor, wire: Wire) -> Ticket {
        let checked = Collective::reduce_scatter(&buffer, self.place, wire);
        self.submit("reduce-scatter", buffer, None, checked)
    }

    /// Like [`Lane::reduce_scatter`], but this rank's sum goes to `into` and `buffer` is left as it
    /// was: `into` is `[slice]` f32 (any shape of as many elements) and shares no memory with
    /// `buffer`. It is overwritten, or with `accumulate` becomes `into[i] + sum[i]`, where `sum[i]`
    /// is formed first.
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
        let checked = Collective::reduce_scatter_into(&buffer, self.place, wire, &into, accumulate);
        self.submit("reduce-scatter-into", buffer, Some(into), checked)
    }

    /// Gathers slices: `buffer` is `[size · slice]` of any type that lanes carry, with the slice at
    /// `index` filled; afterwards it holds the slices of all ranks.
    pub fn all_gather(&self, buffer: Tensor) -> Ticket {
        let checked = Collective::all_gather(&buffer, self.place);
        self.submit("all-gather", buffer, None, checked)
    }

    /// Sums `buffer` (f32 or f64, any shape) over the ranks, on the CPU in rank order; the result has
    /// the same bits on every rank.
    pub fn all_reduce(&self, buffer: Tensor) -> Ticket {
        let checked = Collective::all_reduce(&buffer);
        self.submit("all-reduce", buffer, None, checked)
    }

    /// Like [`Lane::all_reduce`] of f32, with elements that travel as `wire` says. As bf16, every
    /// contribution is rounded, they are added in f32 in rank order, and the sum is rounded; the
    /// result has the same bits on every rank.
    pub fn all_reduce_as(&self, buffer: Tensor, wire: Wire) -> Ticket {
        if wire == Wire::F32 || self.place.size == 1 {
            return self.all_reduce(buffer);
        }
        let checked = Collective::all_reduce_as_bf16(&buffer);
        self.submit("all-reduce", buffer, None, checked)
    }

    /// Copies `buffer` (any type that lanes carry, any shape, the same on all ranks) of the rank at
    /// index `root` of the lane to all others.
    pub fn broadcast(&self, buffer: Tensor, root: usize) -> Ticket {
        let checked = Collective::broadcast(&buffer, self.place, root);
        self.submit("broadcast", buffer, None, checked)
    }

    /// Transposes slices: `buffer` is `[size · slice]`; afterwards its slice *j* is what slice
    /// `index` was on the rank at index *j*.
    pub fn all_to_all(&self, buffer: Tensor) -> Ticket {
        let checked = Collective::all_to_all(&buffer, self.place);
        self.submit("all-to-all", buffer, None, checked)
    }

    /// Sends `buffer` to the rank at index `peer`, which must call [`Lane::recv`] with a tensor of
    /// as many bytes, on a GPU of the same type. The queue stands still until it has arrived.
    pub fn send(&self, buffer: Tensor, peer: usize) -> Ticket {
        let checked = Collective::message(&buffer, self.place, peer, Way::Send);
        self.submit("send", buffer, None, checked)
    }

    /// Fills `buffer` with what the rank at index `peer` sends.
    pub fn recv(&self, buffer: Tensor, peer: usize) -> Ticket {
        let checked = Collective::message(&buffer, self.place, peer, Way::Receive);
        self.submit("recv", buffer, None, checked)
    }

    /// Passes on an operation that has been checked, or refuses it.
    fn submit(
        &self,
        name: &'static str,
        tensor: Tensor,
        into: Option<Tensor>,
        checked: Result<Collective, String>,
    ) -> Ticket {
        let label = Label {
            operation: name,
            lane: Arc::clone(&self.members),
        };
        let (promise, ticket) = Promise::new(self.rank, label, self.waiters.clone());
        let mut operation = Operation {
            name,
            lane: Arc::clone(&self.members),
            tensor,
            into,
            phases: VecDeque::new(),
            after: self.after.clone(),
            promise,
        };
        let carried = checked.and_then(|collective| {
            let carrier = self.carrier(collective.device())?;
            Ok((collective, carrier))
        });
        match carried {
            Err(reason) => operation.refuse(reason),
            Ok((collective, Carrier::Gpus(gpu))) => gpu.run(operation, collective, &self.waiters),
            Ok((collective, Carrier::AloneOnGpu(alone, gpu))) => {
                alone.run_on_gpu(operation, collective.target(), gpu);
            }
            Ok((collective, Carrier::Host)) => {
                let in_place = matches!(collective.target(), Target::InPlace);
                if self.alone.is_none() || !in_place {
                    operation.phases = collective.schedules(self.place).into();
                }
                match &self.alone {
                    _ if self.after.iter().any(Event::is_on_gpu) => {
                        operation.refuse(OTHER_DEVICE.to_owned());
                    }
                    Some(alone) => alone.run(operation, self.commands.as_ref()),
                    None => submit(operation, self.commands.as_ref()),
                }
            }
        }
        ticket
    }

    /// The half that carries tensors of a GPU.
    #[cfg(test)]
    pub(super) fn gpu_half(&self) -> Option<&GpuLane> {
        self.gpu.as_ref()
    }

    /// Who runs operations on tensors of `device`.
    fn carrier(&self, device: Device) -> Result<Carrier<'_>, String> {
        match (&self.gpu, Gpu::of(device), &self.alone) {
            (_, None, _) | (None, _, None) if device == Device::Cpu => Ok(Carrier::Host),
            (Some(lane), Some(gpu), _) if lane.gpu() == gpu => Ok(Carrier::Gpus(lane)),
            (None, Some(gpu), Some(alone)) => Ok(Carrier::AloneOnGpu(alone, gpu)),
            (Some(lane), ..) => Err(format!(
                "expected a tensor on the CPU or on this rank's {}, found one on {device:?}",
                lane.gpu()
            )),
            (None, ..) => Err(format!(
                "expected a CPU tensor, found one on {device:?}; lanes carry tensors of GPUs when \
                 they are made after the rank's GPU has been opened"
            )),
        }
    }
}

#[cfg(test)]
mod tests;
