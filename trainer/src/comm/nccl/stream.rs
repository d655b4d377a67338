//! Streams and marks as lanes use them: those of a GPU, or emulated ones in tests.

use std::fmt;

use oxitron_kernels::Error;
use oxitron_kernels::cuda::{self, Event, Stream};
use tch::{Device, Tensor};

#[cfg(test)]
use super::emulated;
use super::library::RawStream;

/// A rank's GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Gpu {
    /// Number `0` of this process, as libtorch counts.
    Real(usize),
    /// Tensors of the CPU, on a thread whose ops take a GPU's path.
    #[cfg(test)]
    Emulated,
}

impl fmt::Display for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Real(ordinal) => write!(f, "GPU {ordinal}"),
            #[cfg(test)]
            Self::Emulated => write!(f, "emulated GPU"),
        }
    }
}

impl Gpu {
    /// The GPU that tensors of `device` lie on.
    pub(in super::super) fn of(device: Device) -> Option<Self> {
        match device {
            Device::Cuda(ordinal) => Some(Self::Real(ordinal)),
            #[cfg(test)]
            Device::Cpu if cuda::is_gpu(device) => Some(Self::Emulated),
            _ => None,
        }
    }

    /// Makes it the one that calls of this thread are for.
    pub(super) fn bind(self) -> Result<(), String> {
        match self {
            Self::Real(ordinal) => cuda::bind(ordinal).map_err(words),
            #[cfg(test)]
            Self::Emulated => Ok(()),
        }
    }

    /// The stream that this thread's work goes into.
    pub(super) fn current(self) -> Result<Queue, String> {
        match self {
            Self::Real(ordinal) => Stream::current(ordinal).map(Queue::Gpu).map_err(words),
            #[cfg(test)]
            Self::Emulated => Ok(Queue::Emulated(emulated::Queue::Caller)),
        }
    }

    /// A stream for a lane: what travels should not queue behind what computes.
    pub(super) fn lane_queue(self) -> Result<Queue, String> {
        match self {
            Self::Real(ordinal) => Stream::from_pool(ordinal, true)
                .map(Queue::Gpu)
                .map_err(words),
            #[cfg(test)]
            Self::Emulated => Ok(Queue::Emulated(emulated::Queue::worker())),
        }
    }

    /// A mark, which tells the time where `timing` asks for it.
    pub(super) fn mark(self, timing: bool) -> Result<Mark, String> {
        match self {
            Self::Real(_) => Event::new(timing).map(Mark::Gpu).map_err(words),
            #[cfg(test)]
            Self::Emulated => Ok(Mark::Emulated(emulated::Mark::default())),
        }
    }
}

/// A view of all elements of a contiguous tensor, in their order.
pub(super) fn flat(tensor: &Tensor) -> Result<Tensor, String> {
    let flat = tensor.f_view([tensor.numel() as i64]);
    flat.map_err(|error| error.to_string())
}

pub(super) fn words(error: Error) -> String {
    error.to_string()
}

/// A stream.
#[derive(Clone, Debug)]
pub(in super::super) enum Queue {
    Gpu(Stream),
    #[cfg(test)]
    Emulated(emulated::Queue),
}

impl Queue {
    fn stream(&self) -> Result<Stream, String> {
        match self {
            Self::Gpu(stream) => Ok(*stream),
            #[cfg(test)]
            Self::Emulated(_) => Err("a GPU meets an emulated one".to_owned()),
        }
    }

    #[cfg(test)]
    fn emulated(&self) -> Result<&emulated::Queue, String> {
        match self {
            Self::Gpu(_) => Err("an emulated GPU meets a real one".to_owned()),
            Self::Emulated(queue) => Ok(queue),
        }
    }

    /// As NCCL takes it.
    pub(super) fn raw(&self) -> RawStream {
        match self {
            Self::Gpu(stream) => stream.handle(),
            #[cfg(test)]
            Self::Emulated(queue) => queue.raw(),
        }
    }

    /// Puts ops of libtorch and of ours into it.
    pub(super) fn run(
        &self,
        ops: impl FnOnce() -> Result<(), String> + Send + 'static,
    ) -> Result<(), String> {
        match self {
            Self::Gpu(_) => self.own(ops),
            #[cfg(test)]
            Self::Emulated(queue) => {
                queue.push(move || {
                    if let Err(reason) = ops() {
                        eprintln!("an op of a lane failed: {reason}");
                        std::process::abort();
                    }
                });
                Ok(())
            }
        }
    }

    /// Allocates memory that belongs to it: once freed, it is reused in its order.
    pub(super) fn allocate(
        &self,
        allocate: impl FnOnce() -> Result<Tensor, String>,
    ) -> Result<Tensor, String> {
        match self {
            Self::Gpu(_) => self.own(allocate),
            #[cfg(test)]
            Self::Emulated(_) => allocate(),
        }
    }

    /// Runs `body` with this as the current stream of the thread.
    fn own<T>(&self, body: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
        let own = self.stream()?;
        let before = Stream::current(own.device()).map_err(words)?;
        own.select().map_err(words)?;
        let done = body();
        before.select().map_err(words)?;
        done
    }

    /// Keeps the memory of `tensor`, once it is let go, from being reused before the work that it
    /// has by now is done.
    pub(super) fn uses(&self, tensor: &Tensor) -> Result<(), String> {
        match self {
            Self::Gpu(stream) => stream.uses(tensor).map_err(words),
            #[cfg(test)]
            Self::Emulated(queue) => {
                let kept = tensor.shallow_clone();
                queue.push(move || drop(kept));
                Ok(())
            }
        }
    }
}

/// A mark in a stream.
#[derive(Debug)]
pub(super) enum Mark {
    Gpu(Event),
    #[cfg(test)]
    Emulated(emulated::Mark),
}

impl Mark {
    /// Puts it where `queue` has got to.
    pub(super) fn record(&mut self, queue: &Queue) -> Result<(), String> {
        match self {
            Self::Gpu(event) => event.record(queue.stream()?).map_err(words),
            #[cfg(test)]
            Self::Emulated(mark) => {
                mark.record(queue.emulated()?);
                Ok(())
            }
        }
    }

    /// Lets the later work of `queue` wait for it.
    pub(super) fn hold_back(&self, queue: &Queue) -> Result<(), String> {
        match self {
            Self::Gpu(event) => event.hold_back(queue.stream()?).map_err(words),
            #[cfg(test)]
            Self::Emulated(mark) => {
                mark.hold_back(queue.emulated()?);
                Ok(())
            }
        }
    }

    /// Whether it is reached.
    pub(super) fn is_done(&self) -> Result<bool, String> {
        match self {
            Self::Gpu(event) => event.is_done().map_err(words),
            #[cfg(test)]
            Self::Emulated(mark) => Ok(mark.reached().is_some()),
        }
    }

    /// Seconds from `start` to this mark, both of which have been reached and tell the time.
    pub(super) fn seconds_since(&self, start: &Mark) -> Result<f64, String> {
        match (self, start) {
            (Self::Gpu(end), Self::Gpu(start)) => {
                let milliseconds = end.milliseconds_since(start).map_err(words)?;
                Ok(milliseconds / 1e3)
            }
            #[cfg(test)]
            (Self::Emulated(end), Self::Emulated(start)) => Ok(end.seconds_since(start)),
            #[cfg(test)]
            _ => Err("a GPU meets an emulated one".to_owned()),
        }
    }
}
