//! Streams and marks.

use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Instant;

use super::super::library::RawStream;

type Job = Box<dyn FnOnce() + Send>;

/// A stream.
#[derive(Clone, Debug)]
pub(in super::super::super) enum Queue {
    /// The calling thread.
    Caller,
    Worker(Arc<Worker>),
}

/// A thread that does one job after the other, until nobody can hand it any more.
#[derive(Debug)]
pub(in super::super::super) struct Worker(Sender<Job>);

impl Worker {
    pub(super) fn push(&self, job: impl FnOnce() + Send + 'static) {
        self.0.send(Box::new(job)).unwrap();
    }
}

impl Queue {
    pub(in super::super) fn worker() -> Self {
        let (jobs, received) = mpsc::channel::<Job>();
        std::thread::spawn(move || {
            oxitron_kernels::Threads::set(1).unwrap();
            received.into_iter().for_each(|job| job());
        });
        Self::Worker(Arc::new(Worker(jobs)))
    }

    pub(in super::super) fn push(&self, job: impl FnOnce() + Send + 'static) {
        match self {
            Self::Caller => job(),
            Self::Worker(worker) => worker.push(job),
        }
    }

    /// What the emulated functions take as a stream: the address of its worker.
    pub(in super::super) fn raw(&self) -> RawStream {
        match self {
            Self::Caller => std::ptr::null_mut(),
            Self::Worker(worker) => Arc::as_ptr(worker).cast_mut().cast(),
        }
    }
}

/// A mark in a stream; reached when it has the time.
#[derive(Debug, Default)]
pub(in super::super) struct Mark(Arc<Reached>);

#[derive(Debug, Default)]
struct Reached {
    at: Mutex<Option<Instant>>,
    changed: Condvar,
}

impl Reached {
    fn reach(&self) {
        *self.at.lock().unwrap() = Some(Instant::now());
        self.changed.notify_all();
    }

    fn wait(&self) {
        let mut at = self.at.lock().unwrap();
        while at.is_none() {
            at = self.changed.wait(at).unwrap();
        }
    }
}

impl Mark {
    pub(in super::super) fn record(&self, queue: &Queue) {
        let reached = Arc::clone(&self.0);
        queue.push(move || reached.reach());
    }

    pub(in super::super) fn hold_back(&self, queue: &Queue) {
        let reached = Arc::clone(&self.0);
        queue.push(move || reached.wait());
    }

    pub(in super::super) fn reached(&self) -> Option<Instant> {
        *self.0.at.lock().unwrap()
    }

    pub(in super::super) fn seconds_since(&self, start: &Mark) -> f64 {
        let [start, end] = [start, self].map(|mark| mark.reached().unwrap());
        end.saturating_duration_since(start).as_secs_f64()
    }
}
