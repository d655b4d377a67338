//! Operations that streams of a GPU are to end, and what is known of them.

use std::fmt;
use std::sync::Arc;

use tch::Tensor;

use super::super::error::{Error, Result};
use super::super::ticket::Traffic;
use super::super::waiters::{Label, Waiters};
use super::communicator::Communicator;
use super::stream::{Gpu, Mark, Queue};

/// Where an operation begins and ends in its lane's stream.
pub(in super::super) struct End {
    pub(super) label: Label,
    pub(super) start: Mark,
    pub(super) mark: Mark,
    /// Absent where nothing travels.
    pub(super) communicator: Option<Arc<Communicator>>,
}

/// An operation that is being issued to a stream.
pub(super) struct Begun {
    start: Mark,
    end: Mark,
}

impl Begun {
    /// Lets `queue` come after all that this thread has issued to its current stream, and after
    /// `behind`; the operation begins there.
    pub(super) fn new(gpu: Gpu, queue: &Queue, behind: &[Arc<End>]) -> Result<Self, String> {
        gpu.bind()?;
        let mut computed = gpu.mark(false)?;
        computed.record(&gpu.current()?)?;
        computed.hold_back(queue)?;
        for end in behind {
            end.mark.hold_back(queue)?;
        }
        let (mut start, end) = (gpu.mark(true)?, gpu.mark(true)?);
        start.record(queue)?;
        Ok(Self { start, end })
    }

    /// The operation ends where `queue` has got to.
    pub(super) fn end(
        self,
        queue: &Queue,
        label: Label,
        communicator: Option<Arc<Communicator>>,
    ) -> Result<Arc<End>, String> {
        let Self { start, mut end } = self;
        end.record(queue)?;
        Ok(Arc::new(End {
            label,
            start,
            mark: end,
            communicator,
        }))
    }
}

impl End {
    /// Whether the stream has come so far. What cannot be asked any more is over.
    pub(super) fn is_done(&self) -> bool {
        self.mark.is_done().unwrap_or(true)
    }

    /// Whether it has begun and not ended.
    pub(super) fn is_running(&self) -> bool {
        self.start.is_done().unwrap_or(false) && !self.is_done()
    }
}

impl fmt::Debug for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("End").field("label", &self.label).finish()
    }
}

/// What a ticket of an issued operation holds. Its memory is kept from being reused before the
/// stream is done with it, whether it is waited for or dropped.
pub(in super::super) struct Pending {
    gpu: Gpu,
    /// The stream that works on the memory, until somebody has waited for it.
    queue: Option<Queue>,
    tensor: Option<Tensor>,
    into: Option<Tensor>,
    /// What must have ended before the tensor can be used.
    ends: Vec<Arc<End>>,
    bytes_sent: u64,
}

impl Pending {
    /// An operation that works on `tensor` (and `into`) until `ends`, in no stream of its own.
    pub(in super::super) fn new(
        gpu: Gpu,
        tensor: Tensor,
        into: Option<Tensor>,
        ends: Vec<Arc<End>>,
        bytes_sent: u64,
    ) -> Self {
        Self {
            gpu,
            queue: None,
            tensor: Some(tensor),
            into,
            ends,
            bytes_sent,
        }
    }

    /// The same in `queue`.
    pub(in super::super) fn in_queue(mut self, queue: &Queue) -> Self {
        self.queue = Some(queue.clone());
        self
    }

    pub(in super::super) fn ends(&self) -> &[Arc<End>] {
        &self.ends
    }

    pub(in super::super) fn is_done(&self) -> bool {
        self.ends.iter().all(|end| end.is_done())
    }

    /// Lets the current stream of this thread wait, and gives the tensor back.
    pub(in super::super) fn wait(
        mut self,
        label: &Label,
        waiters: &Waiters,
    ) -> Result<(Tensor, Traffic)> {
        let communicators = self.ends.iter().filter_map(|end| end.communicator.as_ref());
        for communicator in communicators {
            communicator.check(label, waiters)?;
        }
        let waited = self
            .hold_back(label, waiters)
            .map_err(|reason| Error::Gpu {
                lane: label.lane.to_string(),
                operation: label.operation,
                reason,
            })?;
        // From here on the current stream comes after the lane's, so that memory that is freed is
        // reused in order.
        self.queue = None;
        let on_gpu = (!self.ends.is_empty()).then(|| Times {
            busy: self.own_end(label),
            waited,
        });
        let traffic = Traffic {
            bytes_sent: self.bytes_sent,
            on_gpu,
            ..Traffic::default()
        };
        match self.tensor.take() {
            Some(tensor) => Ok((tensor, traffic)),
            None => Err(Error::Gpu {
                lane: label.lane.to_string(),
                operation: label.operation,
                reason: "its tensor has been given back already".to_owned(),
            }),
        }
    }

    /// The end of the operation itself, not of one that it came after.
    fn own_end(&self, label: &Label) -> Option<Arc<End>> {
        let own = |end: &&Arc<End>| Arc::ptr_eq(&end.label.lane, &label.lane);
        self.ends.iter().find(own).map(Arc::clone)
    }

    /// The marks between which the current stream stands still, if it has to.
    fn hold_back(&self, label: &Label, waiters: &Waiters) -> Result<Option<(Mark, Mark)>, String> {
        if self.is_done() {
            return Ok(None);
        }
        let (mut before, mut after) = (self.gpu.mark(true)?, self.gpu.mark(true)?);
        let current = self.gpu.current()?;
        before.record(&current)?;
        // An emulated stream is this thread, and waits here.
        let _waiting = waiters.enter(label);
        for end in &self.ends {
            end.mark.hold_back(&current)?;
        }
        after.record(&current)?;
        Ok(Some((before, after)))
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        let Some(queue) = &self.queue else { return };
        for tensor in self.tensor.iter().chain(&self.into) {
            if let Err(reason) = queue.uses(tensor) {
                // Rather lost than reused too early.
                std::mem::forget(tensor.shallow_clone());
                tracing::warn!("memory of a collective is not freed: {reason}");
            }
        }
    }
}

/// How long an operation took on a GPU, and how long a stream waited for it: known once the GPU has
/// come so far.
#[derive(Debug)]
pub struct Times {
    /// Absent for an operation that had nothing to do.
    busy: Option<Arc<End>>,
    /// Around the wait; absent where the operation had ended before.
    waited: Option<(Mark, Mark)>,
}

/// What [`Times`] come to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GpuSeconds {
    /// From when the lane's stream came to the operation until it was done with it. Waiting for other
    /// ranks to come to it counts.
    pub busy: f64,
    /// While the stream that waited for it stood still.
    pub waited: f64,
}

impl Times {
    /// Both, once they are known; does not wait. Where the GPU cannot be asked any more, zeros.
    #[must_use]
    pub fn read(&self) -> Option<GpuSeconds> {
        self.look().unwrap_or_else(|_| Some(GpuSeconds::default()))
    }

    fn look(&self) -> Result<Option<GpuSeconds>, String> {
        let mut seconds = GpuSeconds::default();
        if let Some((before, after)) = &self.waited {
            if !after.is_done()? {
                return Ok(None);
            }
            seconds.waited = after.seconds_since(before)?;
        }
        if let Some(End { start, mark, .. }) = self.busy.as_deref() {
            if !mark.is_done()? {
                return Ok(None);
            }
            seconds.busy = mark.seconds_since(start)?;
        }
        Ok(Some(seconds))
    }
}
