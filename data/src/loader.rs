//! Reading ahead: a thread prepares a rank's next batches while the current one trains.

use crate::assign::assign;
use crate::cursor::Cursor;
use crate::error::{Error, Result};
use crate::sample::Sample;
use crate::stream::Stream;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;
use std::time::Instant;

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

/// Prefetches the batches of one rank. Dropping it ends its thread.
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
    pub fn start(stream: Stream, options: LoaderOptions) -> Result<Self> {
        let (sender, batches) = sync_channel(options.ahead.max(1));
        let thread = std::thread::Builder::new()
            .name("data-loader".to_string())
            .spawn(move || {
                let mut stream = stream;
                for _ in 0..options.batches {
                    let batch = prepare(&mut stream, options);
                    let failed = batch.is_err();
                    if sender.send(batch).is_err() || failed {
                        return;
                    }
                }
            })
            .map_err(|reason| Error::Io {
                action: "start a thread for",
                path: "data loading".into(),
                reason,
            })?;
        Ok(Self {
            batches: Some(batches),
            thread: Some(thread),
        })
    }

    /// The next batch and the seconds that it was waited for; `None` after the last.
    ///
    /// # Errors
    /// What reading it met; nothing follows an error.
    pub fn next_batch(&mut self) -> Result<Option<(RankBatch, f64)>> {
        let asked = Instant::now();
        let Some(batches) = &self.batches else {
            return Ok(None);
        };
        match batches.recv() {
            Ok(batch) => Ok(Some((batch?, asked.elapsed().as_secs_f64()))),
            Err(_) => {
                self.batches = None;
                match self.thread.take().map(JoinHandle::join) {
                    Some(Err(_)) => Err(Error::Thread("data-loader")),
                    _ => Ok(None),
                }
            }
        }
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        // The thread notices at its next send that nobody listens.
        self.batches = None;
        if let Some(thread) = self.thread.take() {
            // A panic was already reported on its own thread.
            let _ = thread.join();
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
        first_sample,
        next_sample,
        left_out,
        cursor: stream.cursor(),
    })
}
