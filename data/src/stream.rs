//! From a cursor onwards: packed samples, batch by batch.
//!
//! Every sample is cut from one source: the next `seq_len` tokens of its current window, documents
//! end to end (`concat` packing). At the window's edge the rest becomes a sample that ends in
//! padding, so that a window begins at a sample's first position whatever `seq_len` is, and any
//! place can be sought without replaying what came before. The mixture decides per sample which
//! source is next.
//!
//! Samples that are to be left out ([`SkipRanges`]) are cut like all others and then dropped, so the
//! samples after them are those that would have come after them anyway.

use crate::cursor::{Cursor, SourceCursor};
use crate::dataset::Dataset;
use crate::error::{Error, Result};
use crate::mixture;
use crate::order::{EpochPlan, WindowIndex};
use crate::sample::{BatchIndex, SampleIndex};
use crate::skip::SkipRanges;
use std::sync::Arc;

/// Batches of packed samples from a place in the data on. Reads document lengths, never tokens.
#[derive(Debug)]
pub struct Stream {
    dataset: Dataset,
    seq_len: usize,
    sources: Vec<SourceStream>,
    /// Index in the run of the sample that is drawn next.
    next_sample: u64,
    skip: SkipRanges,
}

/// One source of a stream.
#[derive(Debug)]
struct SourceStream {
    number: usize,
    weight: f64,
    max_epochs: f64,
    cursor: SourceCursor,
    /// Layout of the epoch last used.
    plan: Option<(u64, Arc<EpochPlan>)>,
    /// Documents of the window last used, by (epoch, window).
    window: Option<((u64, u64), Arc<WindowIndex>)>,
}

impl Stream {
    pub(crate) fn new(
        dataset: &Dataset,
        cursor: &Cursor,
        seq_len: usize,
        weights: &[f64],
    ) -> Result<Self> {
        let names = dataset.source_names();
        if weights.len() != names.len() {
            return Err(Error::Option {
                option: "mixture weights",
                problem: format!("{} weights for {} sources", weights.len(), names.len()),
            });
        }
        if seq_len == 0 || u32::try_from(seq_len).is_err() {
            return Err(Error::Option {
                option: "seq_len",
                problem: format!("{seq_len} is no sample length; 1 to 2^32 - 1 are"),
            });
        }
        let valid = weights.iter().all(|w| w.is_finite() && *w >= 0.0);
        if !valid || weights.iter().sum::<f64>() <= 0.0 {
            return Err(Error::Option {
                option: "mixture weights",
                problem: format!("{weights:?}: all must be at least 0 and one above 0"),
            });
        }
        if let Some(stranger) = cursor
            .sources
            .iter()
            .find(|c| !names.contains(&c.name.as_str()))
        {
            let name = &stranger.name;
            return Err(Error::Cursor(format!(
                "it names a source \"{name}\" that is not there"
            )));
        }
        let mut sources = Vec::new();
        for (number, (&weight, name)) in weights.iter().zip(&names).enumerate() {
            // A source that the cursor does not know was added since: it starts at its beginning.
            let place = cursor.sources.iter().find(|c| c.name == *name);
            let mut source = SourceStream {
                number,
                weight,
                max_epochs: dataset.max_epochs(number),
                cursor: place.cloned().unwrap_or_else(|| SourceCursor::start(name)),
                plan: None,
                window: None,
            };
            source.check(dataset, seq_len)?;
            sources.push(source);
        }
        Ok(Self {
            dataset: dataset.clone(),
            seq_len,
            sources,
            next_sample: 0,
            skip: SkipRanges::default(),
        })
    }

    /// Says that the next sample has the index `next_sample` in the run, and leaves out the samples
    /// of `skip`. Without this the next sample has the index 0 and none is left out.
    pub fn leaving_out(mut self, next_sample: u64, skip: SkipRanges) -> Self {
        self.next_sample = next_sample;
        self.skip = skip;
        self
    }

    /// The next `samples` samples that are not left out. After an error the stream stands where it stood before.
    ///
    /// # Errors
    /// [`Error::Exhausted`] when `max_epochs` of all sources leave fewer samples; shards that
    /// cannot be read.
    pub fn next_batch(&mut self, samples: usize) -> Result<BatchIndex> {
        let before = (self.cursor(), self.next_sample);
        let mut batch = Vec::with_capacity(samples);
        while batch.len() < samples {
            let problem = match self.draw() {
                Ok(Some(sample)) => {
                    if !self.skip.contains(self.next_sample) {
                        batch.push(sample);
                    }
                    self.next_sample += 1;
                    continue;
                }
                Ok(None) => Error::Exhausted {
                    wanted: samples,
                    available: batch.len(),
                    seq_len: self.seq_len,
                },
                Err(error) => error,
            };
            for (source, place) in self.sources.iter_mut().zip(before.0.sources) {
                source.cursor = place;
            }
            self.next_sample = before.1;
            return Err(problem);
        }
        Ok(BatchIndex { samples: batch })
    }

    /// Where the stream stands: a stream from here continues with exactly the same samples.
    pub fn cursor(&self) -> Cursor {
        Cursor {
            sources: self
                .sources
                .iter()
                .map(|source| source.cursor.clone())
                .collect(),
        }
    }

    /// Index in the run of the sample after the last one drawn: where the cursor stands, counted
    /// in samples.
    pub fn next_sample(&self) -> u64 {
        self.next_sample
    }

    /// Samples of the run that this stream leaves out.
    pub fn skip(&self) -> &SkipRanges {
        &self.skip
    }

    /// How many samples are left within `max_epochs`, counted up to `enough`. Those that are left
    /// out do not count.
    ///
    /// # Errors
    /// Shards that cannot be read.
    pub fn samples_left(&mut self, enough: u64) -> Result<u64> {
        let draws = self.draws_left(self.skip.draws_for(self.next_sample, enough))?;
        let drawn = self.next_sample..self.next_sample.saturating_add(draws);
        Ok(draws - self.skip.count_within(drawn))
    }

    /// The same with those that are left out.
    fn draws_left(&mut self, enough: u64) -> Result<u64> {
        let mut left = 0u64;
        for source in self.sources.iter_mut().filter(|source| source.weight > 0.0) {
            left += source.samples_left(&self.dataset, self.seq_len as u64, enough - left)?;
            if left >= enough {
                return Ok(enough);
            }
        }
        Ok(left)
    }

    /// Sample length in tokens.
    pub fn seq_len(&self) -> usize {
        self.seq_len
    }

    /// The data that the stream reads.
    pub fn dataset(&self) -> &Dataset {
        &self.dataset
    }

    /// Cuts the next sample; `None` when the data are used up.
    fn draw(&mut self) -> Result<Option<SampleIndex>> {
        let mut weights: Vec<Option<f64>> = self
            .sources
            .iter()
            .map(|s| (s.weight > 0.0).then_some(s.weight))
            .collect();
        // Being used up is a property of the place, so it must be known for all sources before
        // the mixture chooses; otherwise the choice would depend on when it was noticed.
        for (source, weight) in self.sources.iter_mut().zip(&mut weights) {
            if weight.is_some() && !source.settle(&self.dataset)? {
                *weight = None;
            }
        }
        let taken: Vec<u64> = self.sources.iter().map(|s| s.cursor.stage_tokens).collect();
        let Some(chosen) = mixture::choose(&weights, &taken, self.seq_len as u64) else {
            return Ok(None);
        };
        self.sources[chosen]
            .take(&self.dataset, self.seq_len)
            .map(Some)
    }
}

impl SourceStream {
    /// Refuses a source that cannot give a single full sample.
    fn check(&mut self, dataset: &Dataset, seq_len: usize) -> Result<()> {
        if self.weight <= 0.0 {
            return Ok(());
        }
        dataset.check_not_empty(self.number)?;
        let plan = self.plan(dataset, self.cursor.epoch);
        let largest = plan
            .windows
            .iter()
            .map(|window| window.tokens)
            .max()
            .unwrap_or(0);
        if largest < seq_len as u64 {
            return Err(Error::SequenceTooLong {
                seq_len,
                source_name: self.cursor.name.clone(),
                window_tokens: largest,
            });
        }
        let windows = plan.windows.len() as u64;
        if self.cursor.window > windows || (self.cursor.window == windows && self.cursor.offset > 0)
        {
            return Err(Error::Cursor(format!(
                "source \"{}\" is at window {} of {windows}",
                self.cursor.name, self.cursor.window
            )));
        }
        Ok(())
    }

    /// Moves past ended windows and epochs; false if the source is used up.
    fn settle(&mut self, dataset: &Dataset) -> Result<bool> {
        loop {
            let plan = self.plan(dataset, self.cursor.epoch);
            let Some(window) = plan.windows.get(self.cursor.window as usize) else {
                if !self.may_begin(dataset, self.cursor.epoch + 1, 0) {
                    return Ok(false);
                }
                self.cursor.epoch += 1;
                self.cursor.window = 0;
                continue;
            };
            if self.cursor.offset >= window.tokens {
                self.cursor.window += 1;
                self.cursor.offset = 0;
                continue;
            }
            let before = plan.tokens_before(self.cursor.window);
            // A window that was begun may be finished.
            return Ok(self.cursor.offset > 0 || self.may_begin(dataset, self.cursor.epoch, before));
        }
    }

    /// Whether `max_epochs` allow a window that begins after `tokens_before` tokens of `epoch`.
    fn may_begin(&self, dataset: &Dataset, epoch: u64, tokens_before: u64) -> bool {
        let whole = dataset.epoch_tokens(self.number) as f64;
        epoch as f64 + tokens_before as f64 / whole < self.max_epochs
    }

    /// Cuts the next sample; the source must be settled.
    fn take(&mut self, dataset: &Dataset, seq_len: usize) -> Result<SampleIndex> {
        let place = (self.cursor.epoch, self.cursor.window);
        let window = match &self.window {
            Some((at, window)) if *at == place => window.clone(),
            _ => {
                let window = dataset.window(self.number, place.0, place.1)?;
                self.window = Some((place, window.clone()));
                window
            }
        };
        let pieces = window.pieces(self.cursor.offset, seq_len as u64);
        let source = self.number as u32;
        let sample = SampleIndex {
            source,
            seq_len: seq_len as u32,
            pieces,
        };
        self.cursor.offset += sample.tokens();
        self.cursor.stage_tokens += sample.tokens();
        if self.cursor.offset >= window.tokens() {
            self.cursor.window += 1;
            self.cursor.offset = 0;
        }
        Ok(sample)
    }

    fn samples_left(&mut self, dataset: &Dataset, seq_len: u64, enough: u64) -> Result<u64> {
        let mut left = 0;
        let (mut epoch, mut number) = (self.cursor.epoch, self.cursor.window);
        let mut offset = self.cursor.offset;
        while left < enough {
            let plan = dataset.plan(self.number, epoch);
            let mut before = plan.tokens_before(number);
            if number as usize >= plan.windows.len() && !self.may_begin(dataset, epoch + 1, 0) {
                break;
            }
            for window in plan.windows.iter().skip(number as usize) {
                if offset == 0 && !self.may_begin(dataset, epoch, before) {
                    return Ok(left);
                }
                left += (window.tokens - offset.min(window.tokens)).div_ceil(seq_len);
                before += window.tokens;
                offset = 0;
            }
            epoch += 1;
            number = 0;
        }
        Ok(left.min(enough))
    }

    fn plan(&mut self, dataset: &Dataset, epoch: u64) -> Arc<EpochPlan> {
        match &self.plan {
            Some((at, plan)) if *at == epoch => plan.clone(),
            _ => {
                let plan = dataset.plan(self.number, epoch);
                self.plan = Some((epoch, plan.clone()));
                plan
            }
        }
    }
}
