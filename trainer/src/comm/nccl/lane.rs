//! The GPU half of a lane: a communicator and a stream.
//!
//! An operation is issued when it is called, on the thread that calls: the lane's stream waits for
//! that thread's current one and for what the operation comes after, then takes NCCL's kernels. The
//! marks around them are all that the host keeps.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::super::alone::OTHER_DEVICE;
use super::super::collective::Collective;
use super::super::error::Error;
use super::super::event::Gate;
use super::super::operation::Operation;
use super::super::schedule::Place;
use super::super::waiters::{Label, Waiters};
use super::calls::{self, Staging};
use super::communicator::{Communicator, interrupted};
use super::library::Version;
use super::pending::{Begun, End, Pending};
use super::stream::{Gpu, Queue};

/// The GPU half of a lane, shared by the handles on it.
#[derive(Clone, Debug)]
pub(in super::super) struct GpuLane(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    gpu: Gpu,
    version: Version,
    communicator: Arc<Communicator>,
    queue: Queue,
    place: Place,
    /// Held while an operation is issued: handles on two threads must not issue two at once.
    work: Mutex<Work>,
    /// Operations that have not been seen to end, the oldest first.
    under_way: Mutex<VecDeque<Arc<End>>>,
}

#[derive(Debug, Default)]
struct Work {
    staging: Staging,
    /// Why nothing is issued any more, though NCCL may be well.
    poison: Option<Arc<Error>>,
}

/// The parts of a lane that calls of NCCL need.
#[derive(Clone, Copy)]
pub(super) struct Parts<'a> {
    pub(super) communicator: &'a Communicator,
    pub(super) queue: &'a Queue,
    pub(super) place: Place,
    pub(super) label: &'a Label,
    pub(super) waiters: &'a Waiters,
}

impl GpuLane {
    pub(super) fn new(
        gpu: Gpu,
        version: Version,
        communicator: Communicator,
        place: Place,
    ) -> Result<Self, String> {
        Ok(Self(Arc::new(Shared {
            gpu,
            version,
            communicator: Arc::new(communicator),
            queue: gpu.lane_queue()?,
            place,
            work: Mutex::default(),
            under_way: Mutex::default(),
        })))
    }

    pub(in super::super) fn gpu(&self) -> Gpu {
        self.0.gpu
    }

    pub(in super::super) fn version(&self) -> Version {
        self.0.version
    }

    pub(super) fn communicator(&self) -> &Communicator {
        &self.0.communicator
    }

    /// Issues `operation`, which is `collective`, or ends it with why it cannot be.
    pub(in super::super) fn run(
        &self,
        operation: Operation,
        collective: Collective,
        waiters: &Waiters,
    ) {
        let mut work = self.0.work.lock().unwrap_or_else(PoisonError::into_inner);
        let label = Label {
            operation: operation.name,
            lane: Arc::clone(&operation.lane),
        };
        if waiters.interrupted() {
            return operation.fail(interrupted(&label));
        }
        if let Some(cause) = &work.poison {
            return operation.poison(cause);
        }
        let behind = match operation.gate() {
            Gate::Open => Vec::new(),
            Gate::Behind(ends) => ends,
            Gate::Shut => return operation.refuse(OTHER_DEVICE.to_owned()),
            Gate::Broken(cause) => {
                work.poison = Some(operation.miss(cause));
                return;
            }
        };
        match self.issue(&operation, &collective, &behind, &mut work, &label, waiters) {
            Ok((end, bytes_sent)) => {
                let (promise, tensor, into) = operation.into_parts();
                let ends = vec![end];
                let pending = Pending::new(self.0.gpu, tensor, into, ends, bytes_sent);
                Operation::issued(promise, pending.in_queue(&self.0.queue));
            }
            Err(error) => {
                // Part of it may be under way, so its memory is kept as that of a success would be.
                let tensor = operation.tensor.shallow_clone();
                let into = operation.into.as_ref().map(|into| into.shallow_clone());
                let part = Pending::new(self.0.gpu, tensor, into, Vec::new(), 0);
                drop(part.in_queue(&self.0.queue));
                if work.poison.is_none() {
                    work.poison = Some(Arc::new(self.root_of(&error)));
                }
                operation.fail(error);
            }
        }
    }

    /// What later operations are told, where `error` has stopped this one.
    fn root_of(&self, error: &Error) -> Error {
        self.0
            .communicator
            .failure()
            .unwrap_or_else(|| error.clone())
    }

    fn issue(
        &self,
        operation: &Operation,
        collective: &Collective,
        behind: &[Arc<End>],
        work: &mut Work,
        label: &Label,
        waiters: &Waiters,
    ) -> Result<(Arc<End>, u64), Error> {
        let Shared {
            gpu,
            communicator,
            queue,
            place,
            ..
        } = &*self.0;
        communicator.check(label, waiters)?;
        let broken = |reason| Error::Gpu {
            lane: label.lane.to_string(),
            operation: label.operation,
            reason,
        };
        let begun = Begun::new(*gpu, queue, behind).map_err(broken)?;
        let parts = Parts {
            communicator,
            queue,
            place: *place,
            label,
            waiters,
        };
        let tensors = (&operation.tensor, operation.into.as_ref());
        calls::issue(parts, collective, tensors, &mut work.staging)?;
        let communicator = Some(Arc::clone(communicator));
        let end = begun
            .end(queue, label.clone(), communicator)
            .map_err(broken)?;
        let mut under_way = self.under_way();
        while under_way.front().is_some_and(|oldest| oldest.is_done()) {
            under_way.pop_front();
        }
        under_way.push_back(Arc::clone(&end));
        Ok((end, calls::ring_bytes(collective, *place)))
    }

    fn under_way(&self) -> MutexGuard<'_, VecDeque<Arc<End>>> {
        self.0
            .under_way
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The operation that the lane's stream is at.
    pub(super) fn running(&self) -> Option<Label> {
        let under_way = self.under_way();
        let running = under_way.iter().find(|end| end.is_running());
        running.map(|end| end.label.clone())
    }

    /// The oldest operation that has not ended, or the lane itself.
    fn oldest(&self, lane: &Label) -> Label {
        let under_way = self.under_way();
        let oldest = under_way.iter().find(|end| !end.is_done());
        oldest.map_or_else(|| lane.clone(), |end| end.label.clone())
    }

    /// # Errors
    /// What NCCL says, naming the oldest operation that has not ended.
    pub(super) fn check(&self, waiters: &Waiters) -> Result<(), Error> {
        if let Some(failure) = self.0.communicator.failure() {
            return Err(failure);
        }
        let label = self.oldest(&self.0.communicator.label("the last operation"));
        self.0.communicator.check(&label, waiters)
    }

    /// Aborts what is under way; `error` makes an error of the operation that it hits.
    pub(super) fn abort(&self, error: impl Fn(&Label) -> Error) {
        let label = self.oldest(&self.0.communicator.label("the next operation"));
        self.0.communicator.abort(error(&label));
    }
}
