//! An operation on its way: what a lane hands to whoever runs it, and the ways it can end.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Instant;

use tch::Tensor;

use super::engine::Command;
use super::error::Error;
use super::event::{Event, Gate, gate};
use super::members::Members;
use super::nccl::Pending;
use super::schedule::Schedule;
use super::ticket::{Given, Promise, Traffic};

/// A checked operation that is not done.
pub(super) struct Operation {
    pub(super) name: &'static str,
    pub(super) lane: Arc<Members>,
    /// Keeps the memory alive that the schedules point into; the ticket gives it back.
    pub(super) tensor: Tensor,
    /// A second tensor that the schedules write to, if there is one. Messages never touch it.
    pub(super) into: Option<Tensor>,
    /// Run one after the other by the communication thread; a GPU needs none.
    pub(super) phases: VecDeque<Box<dyn Schedule>>,
    /// What must have ended well before it starts.
    pub(super) after: Vec<Event>,
    pub(super) promise: Promise,
}

impl Operation {
    /// Whether it may start.
    pub(super) fn gate(&self) -> Gate {
        gate(&self.after)
    }

    /// Hands the tensor back. The second one is let go first, so that whoever waited is the only
    /// owner of what it kept.
    pub(super) fn succeed(self, begun: Option<Instant>, bytes_sent: u64) {
        let busy_seconds = begun.map_or(0.0, |begun| begun.elapsed().as_secs_f64());
        drop((self.into, self.phases));
        let traffic = Traffic {
            bytes_sent,
            begun,
            busy_seconds,
            on_gpu: None,
        };
        self.promise.fulfil(Ok(Given::Ended(self.tensor, traffic)));
    }

    /// What is left of one whose tensors are on their way by other means.
    pub(super) fn into_parts(self) -> (Promise, Tensor, Option<Tensor>) {
        (self.promise, self.tensor, self.into)
    }

    /// Hands over what streams of a GPU will be done with: for the host, the operation is over.
    pub(super) fn issued(promise: Promise, pending: Pending) {
        promise.fulfil(Ok(Given::Issued(pending)));
    }

    /// Ends it, not run, because `cause` has poisoned its lane.
    pub(super) fn poison(self, cause: &Arc<Error>) {
        let error = Error::Poisoned {
            lane: self.lane.to_string(),
            operation: self.name,
            cause: Arc::clone(cause),
        };
        self.fail(error);
    }

    /// Ends it, not run, because an operation that it comes after has failed with `cause`. Returns
    /// what poisons its lane from here on.
    pub(super) fn miss(self, cause: Arc<Error>) -> Arc<Error> {
        let error = Error::Dependency {
            lane: self.lane.to_string(),
            operation: self.name,
            cause,
        };
        self.fail(error.clone());
        Arc::new(error)
    }

    /// Ends it, not run, because its arguments do not fit. Its lane stays usable.
    pub(super) fn refuse(self, reason: String) {
        let error = Error::InvalidArgument {
            lane: self.lane.to_string(),
            operation: self.name,
            reason,
        };
        self.fail(error);
    }

    /// Ends it with `error`. Nobody works on its memory.
    pub(super) fn fail(self, error: Error) {
        drop((self.tensor, self.into));
        self.promise.fulfil(Err(error));
    }
}

/// Hands `operation` to the communication thread. Where that has ended, or never was, the promise
/// tells the ticket.
pub(super) fn submit(operation: Operation, commands: Option<&Sender<Command>>) {
    if let Some(commands) = commands {
        // An error gives the command back, which is dropped here.
        let _ = commands.send(Command::Submit(operation));
    }
}
