//! Communication between ranks: lanes, tickets, and what moves the bytes.
//!
//! A [`Comm`] is one rank's place in the world: alone ([`Comm::solo`]), as one of several threads of
//! a process ([`Comm::threads`], for tests over many meshes), or as one of several MPI processes
//! (`Comm::mpi`, cargo feature `mpi`). It owns one **communication thread**, the only thread that
//! talks to other ranks. A [`Lane`] is a communicator over some of the ranks with one first-in
//! first-out queue; its operations return a [`Ticket`] at once, and the tensor handed to an operation
//! comes back when the ticket is waited for.
//!
//! ```text
//! step thread      lane.reduce_scatter(gradients) ─▶ ticket … compute … ticket.wait()
//!                        │ Operation                                ▲ Promise
//! communication    queue of lane 0 ─▶ schedule: rounds of chunks ───┘
//! thread           queue of lane 1 ─▶ …      │ start_send, start_recv, test
//!                                        Transport: threads' mailboxes, MPI point-to-point
//! ```
//!
//! A rank may have a GPU ([`Comm::open_gpu`]). Lanes carry tensors of it over NCCL (`nccl`), and those of
//! the CPU as above: the device of a tensor decides. An operation is first data (`collective`), checked
//! once, from which either way takes what it runs.
//!
//! What holds:
//!
//! - **One algorithm.** On CPUs, collectives are written once (`schedule`) over non-blocking point-to-point
//!   messages (`transport`), so what the conformance suite proves on threads holds on processes.
//!   MPI's own reductions are not used: Open MPI 4.1's reduce-scatter is a reduction to rank 0
//!   followed by a scatter, which moves more bytes and takes several times as long.
//! - **The same bits everywhere.** Sums are formed in rank order in f32 (f64 for f64), whatever the
//!   order in which messages arrive and whoever owns the result; [`Wire::Bf16`] rounds each
//!   contribution once, the own one too. Between GPUs NCCL adds what travels as it is, in an order of
//!   its own: the same bits on all ranks, and again on the same GPUs, but not those of the CPU.
//! - **One order per lane; between lanes, events.** All ranks must queue the same operations on a
//!   lane in the same order. Lanes never mix, each has its own message tag, and wait for each other
//!   only where [`Lane::after`] says so: the communication thread holds the operation back until the
//!   other one has ended, while the step thread goes on. A lane of one rank has no queue until that
//!   happens to it; its operations run where they are called.
//! - **Errors are results.** A failed operation poisons its lane and tells every ticket which lane,
//!   operation and peer failed. A ticket may be dropped: the communication thread keeps the memory
//!   until the operation is over.
//! - **No core is burnt.** Idle, the thread sleeps; busy, it polls with a growing pause.
//! - **Waiting can be watched and ended.** A [`Monitor`] says which collective a rank waits for, and
//!   can interrupt it when a step is given up.
//! - **A clean end.** [`Comm::finish`] returns when all ranks have left; [`Comm::abort`] is the last
//!   resort that takes the others along.
//!
//! `unsafe` in this folder is of four kinds: the memory behind a tensor that travels with its
//! operation (`buffer`, `schedule`), the addresses that threads exchange (`threads`), and raw calls of
//! MPI (`mpi`) and NCCL (`nccl`).

mod active;
mod alone;
mod backoff;
mod buffer;
mod collective;
mod engine;
mod environment;
mod error;
mod event;
mod handle;
mod lane;
mod members;
#[cfg(feature = "mpi")]
mod mpi;
mod nccl;
mod operation;
mod queue;
mod schedule;
mod threads;
mod ticket;
mod transport;
mod waiters;

pub use environment::{Environment, mpi_library};
pub use error::{Error, Result};
pub use handle::{ABORT_MARK, Comm};
pub use lane::{Lane, Wire};
pub use nccl::{GpuSeconds, Times};
pub use ticket::{Ticket, Traffic};
pub use waiters::Monitor;
