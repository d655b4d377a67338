//! The time of calls, taken on the GPU.
//!
//! Each sample begins behind a copy of memory: it leaves nothing of an earlier op in the L2 cache,
//! and while the GPU is at it, the host issues the calls that are timed. So a call that takes the
//! host longer than the GPU does not wait between the marks, up to what a copy takes.

use std::time::{Duration, Instant};

use oxitron_kernels::Error;
use oxitron_kernels::cuda::{Event, Stream};

use crate::floors::Copy;

/// Most calls of a sample: the host issues them in about the time of the copy before them.
const MOST_CALLS: usize = 100;

/// Calls of a sample that is taken to find out how long one takes.
const TRIAL_CALLS: usize = 3;

/// Seconds of one call, on average.
#[derive(Clone, Copy)]
pub struct Sample {
    /// On the GPU.
    pub seconds: f64,
    /// Of the host, to issue it.
    pub issue_seconds: f64,
}

pub struct Clock {
    stream: Stream,
    start: Event,
    end: Event,
    ahead: Copy,
}

impl Clock {
    /// A clock of the first GPU, on this thread's stream.
    ///
    /// # Errors
    /// [`Error::Shim`] where the GPU cannot be used; so for all others.
    pub fn new(ahead: &Copy) -> Result<Clock, Error> {
        Ok(Clock {
            stream: Stream::current(0)?,
            start: Event::new(true)?,
            end: Event::new(true)?,
            ahead: ahead.share(),
        })
    }

    /// Calls once and waits: what fails on the GPU is then known to be this call's doing.
    pub fn try_call(&self, call: impl FnOnce() -> Result<(), Error>) -> Result<(), Error> {
        call()?;
        self.stream.synchronize()
    }

    /// How many calls come to such a slice of time.
    pub fn calls_in(
        &mut self,
        slice: Duration,
        call: impl FnMut() -> Result<(), Error>,
    ) -> Result<usize, Error> {
        let one = self.sample(TRIAL_CALLS, call)?.seconds;
        let calls = (slice.as_secs_f64() / one.max(1e-9)) as usize;
        Ok(calls.clamp(1, MOST_CALLS))
    }

    /// Takes the time of some calls.
    pub fn sample(
        &mut self,
        calls: usize,
        mut call: impl FnMut() -> Result<(), Error>,
    ) -> Result<Sample, Error> {
        self.ahead.run()?;
        self.start.record(self.stream)?;
        let begun = Instant::now();
        for _ in 0..calls {
            call()?;
        }
        let issued = begun.elapsed();
        self.end.record(self.stream)?;
        self.end.synchronize()?;
        Ok(Sample {
            seconds: 1e-3 * self.end.milliseconds_since(&self.start)? / calls as f64,
            issue_seconds: issued.as_secs_f64() / calls as f64,
        })
    }
}
