//! Reading ahead: a thread prepares a rank's next batches while the current one trains.

use crate::assign::assign;
use crate::cursor::Cursor;
use crate::error::{Error, Result};
use crate::sample::Sample;
use crate::stream::Stream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// What one rank trains on in one step.
#[derive(Debug, Clone, PartialEq)]
pub struct RankBatch {
    /// `[accumulation step][slot]` samples of this rank; `None` is a slot to run fully masked.
    pub micro_batches: Vec<Vec<Option<Sample>>>,
    /// Samples of the whole global batch.
    pub samples: usize,
    /// Tokens of the whole global batch that are not padding.
    pub tokens: u64,
    /// Positions of the whole global batch that predict a token.
    pub target_tokens: u64,
    /// What attention costs in the whole global batch: the sum of the squared lengths of the
    /// stretches that attend to each other.
    pub attention_cost: u128,
    /// Index in the run of the first sample of the global batch. Not before where the stream stood:
    /// samples that were left out may lie in between.
    pub first_sample: u64,
    /// Index in the run after the last sample of the global batch, where the next batch begins to
    /// draw. The batch has `next_sample - first_sample` samples, less those in between that were
    /// left out.
    pub next_sample: u64,
    /// Samples that were drawn for this batch and left out.
    pub left_out: u64,
    /// Where the data stand after this batch, at `next_sample`: what a checkpoint stores once it is
    /// trained on.
    pub cursor: Cursor,
}

/// Which share of every batch a [`Loader`] reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoaderOptions {
    /// Samples of a global batch.
    pub samples_per_batch: usize,
    /// Number of ranks, and which of them this is.
    pub ranks: usize,
    /// This rank.
    pub rank: usize,
    /// Samples of a micro-batch.
    pub micro_batch: usize,
    /// Batches after which to stop.
    pub batches: u64,
    /// Batches to read ahead, at least 1.
    pub ahead: usize,
}

/// What a [`Loader`] has next.
#[derive(Debug)]
pub enum Next {
    /// A batch, and how long it was waited for.
    Batch(RankBatch, Duration),
    /// There is none after the last.
    End,
    /// Nobody wanted to wait any longer.
    GivenUp,
}

/// How often the one who waits is asked whether to go on waiting.
const ASK: Duration = Duration::from_millis(100);

/// Prefetches the batches of one rank.
///
/// Its thread ends after it is dropped, at the latest when the read under way returns. Nobody waits
/// for that: a disk that does not answer must not keep a run from ending.
#[derive(Debug)]
pub struct Loader {
    batches: Option<Receiver<Result<RankBatch>>>,
    thread: Option<JoinHandle<()>>,
}

impl Loader {
    /// Starts to read from where `stream` stands.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start(mut stream: Stream, options: LoaderOptions) -> Result<Self> {
        let batches = (0..options.batches).map(move |_| prepare(&mut stream, options));
        Self::read_ahead(batches, options.ahead)
    }

    /// A thread that works through `batches`, up to the first error.
    fn read_ahead(
        batches: impl Iterator<Item = Result<RankBatch>> + Send + 'static,
        ahead: usize,
    ) -> Result<Self> {
        let (sender, receiver) = sync_channel(ahead.max(1));
        let work = move || {
            for batch in batches {
                let failed = batch.is_err();
                // It fails when nobody listens any more.
                if sender.send(batch).is_err() || failed {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new()
            .name("data-loader".to_string())
            .spawn(work)
            .map_err(|reason| Error::Io {
                action: "start a thread for",
                path: "data loading".into(),
                reason,
            })?;
        Ok(Self {
            batches: Some(receiver),
            thread: Some(thread),
        })
    }

    /// Waits for the next batch, unless `given_up`, which is asked now and again.
    ///
    /// # Errors
    /// What reading it met; nothing follows an error.
    pub fn next_batch(&mut self, given_up: &dyn Fn() -> bool) -> Result<Next> {
        let asked = Instant::now();
        let Some(batches) = &self.batches else {
            return Ok(Next::End);
        };
        loop {
            if given_up() {
                return Ok(Next::GivenUp);
            }
            match batches.recv_timeout(ASK) {
                Ok(batch) => return Ok(Next::Batch(batch?, asked.elapsed())),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        self.batches = None;
        match self.thread.take().map(JoinHandle::join) {
            Some(Err(_)) => Err(Error::Thread("data-loader")),
            _ => Ok(Next::End),
        }
    }
}

fn prepare(stream: &mut Stream, options: LoaderOptions) -> Result<RankBatch> {
    let stood_at = stream.next_sample();
    let index = stream.next_batch(options.samples_per_batch)?;
    let next_sample = stream.next_sample();
    // Of the samples that a batch draws, those before its first are all left out.
    let left_out = stream.skip().count_within(stood_at..next_sample);
    let first_sample = (stood_at..next_sample)
        .find(|&sample| !stream.skip().contains(sample))
        .unwrap_or(next_sample);
    let assignment = assign(&index, options.ranks, options.micro_batch);
    let read = |slot: &Option<usize>| {
        slot.map(|sample| stream.dataset().read(&index.samples[sample]))
            .transpose()
    };
    let micro_batches = assignment
        .rank(options.rank)
        .iter()
        .map(|slots| slots.iter().map(read).collect())
        .collect::<Result<_>>()?;
    Ok(RankBatch {
        micro_batches,
        samples: index.samples.len(),
        tokens: index.tokens(),
        target_tokens: index.target_tokens(),
        attention_cost: index.attention_cost(),
        first_sample,
        next_sample,
        left_out,
        cursor: stream.cursor(),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn a_read_that_does_not_return_is_given_up() {
        let (_hold, held) = channel::<()>();
        let stuck = std::iter::once_with(move || {
            // As long as the test holds its end.
            let _ = held.recv();
            Err(Error::Thread("a disk that answers in the end"))
        });
        let mut loader = Loader::read_ahead(stuck, 1).unwrap();
        let (began, limit) = (Instant::now(), Duration::from_millis(250));
        let next = loader.next_batch(&|| began.elapsed() > limit).unwrap();
        assert!(matches!(next, Next::GivenUp));
        assert!(began.elapsed() >= limit);
        // Would wait for ever if it waited for the thread.
        drop(loader);
    }

    #[test]
    fn a_dropped_loader_ends_its_thread() {
        let (hold, held) = channel::<()>();
        let endless = std::iter::from_fn(move || {
            let _lives_as_long_as_the_thread = &hold;
            Some(Err(Error::Thread("any")))
        });
        drop(Loader::read_ahead(endless, 1).unwrap());
        assert!(held.recv_timeout(Duration::from_secs(60)) == Err(RecvTimeoutError::Disconnected));
    }

    #[test]
    fn a_thread_that_panics_is_an_error() {
        let batches = std::iter::once_with(|| panic!("on purpose"));
        let mut loader = Loader::read_ahead(batches, 1).unwrap();
        let error = loader.next_batch(&|| false).unwrap_err();
        assert!(matches!(error, Error::Thread("data-loader")), "{error}");
    }
}
