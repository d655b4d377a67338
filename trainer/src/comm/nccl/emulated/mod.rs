//! NCCL without GPUs, for tests: ranks are threads of this process, and the stream of a lane is a
//! queue with a thread, so that what is issued really runs beside what the ranks do. The stream that
//! computes is the calling thread itself: a mark in it is reached at once, and where it has to wait
//! for a mark, the thread does.
//!
//! Sums are taken in rank order, so that results are those of the other transports to the bit. What
//! would hang GPUs or spoil their memory is an error: ranks of a communicator that do different
//! things, memory that overlaps where it must not, calls while one before is in progress, calls on a
//! communicator that is gone. Calls are in progress for a while, as those of a non-blocking
//! communicator may be.

mod clique;
mod functions;
mod queue;

pub(super) use functions::{control, library};
pub(super) use queue::{Mark, Queue};
