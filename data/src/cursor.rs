//! Where training stands in the data.
//!
//! A cursor knows neither sample length nor ranks: per source an epoch, a window of that epoch and
//! the number of tokens taken from the window. Together with the dataset lock and the seed it
//! decides everything that comes after.

use crate::dataset::Dataset;
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

/// Place in one source's stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceCursor {
    /// The source's name in the config.
    pub name: String,
    /// Passes over the source that are complete.
    pub epoch: u64,
    /// Window of this epoch, from 0; the number of windows means that the epoch is over.
    pub window: u64,
    /// Tokens taken from the window.
    pub offset: u64,
    /// Tokens taken since the stage began; what the mixture balances.
    pub stage_tokens: u64,
}

/// Place in all sources' streams, in the order of the config.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cursor {
    /// One place per source.
    pub sources: Vec<SourceCursor>,
}

/// What a stage left unread in the windows that it had begun.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dropped {
    /// Documents of which at least one token was not read.
    pub documents: u64,
    /// Tokens not read.
    pub tokens: u64,
}

impl SourceCursor {
    pub(crate) fn start(name: &str) -> Self {
        Self {
            name: name.to_string(),
            epoch: 0,
            window: 0,
            offset: 0,
            stage_tokens: 0,
        }
    }
}

impl Cursor {
    /// This place in a dataset that is not the one it was taken in ([`Dataset::open_changed`]): the
    /// same numbers where the dataset has such a window, the beginning of the next epoch where it
    /// does not. Answers, one line each, what had to be moved.
    pub fn fitted(&self, dataset: &Dataset) -> (Cursor, Vec<String>) {
        let mut moved = Vec::new();
        let mut sources = Vec::new();
        for mut place in self.sources.iter().cloned() {
            let Some(number) = dataset.source_number(&place.name) else {
                moved.push(format!("source \"{}\" is left: it is gone", place.name));
                continue;
            };
            let windows = dataset.plan(number, place.epoch).windows.len() as u64;
            // At its end an epoch is over, which is a place like others.
            if place.window > windows || (place.window == windows && place.offset > 0) {
                moved.push(format!(
                    "source \"{}\" goes on with epoch {}, because epoch {} has {windows} windows \
                     now and the run was in window {}",
                    place.name,
                    place.epoch + 1,
                    place.epoch,
                    place.window
                ));
                place.window = windows;
                place.offset = 0;
            }
            sources.push(place);
        }
        (Cursor { sources }, moved)
    }

    /// The place where a new stage begins: the next window edge of every source, so that it
    /// repeats no document of this stage. Answers what is dropped thereby.
    ///
    /// # Errors
    /// A cursor of another dataset, or shards that cannot be read.
    pub fn next_stage(&self, dataset: &Dataset) -> Result<(Cursor, Dropped)> {
        let mut next = self.clone();
        let mut dropped = Dropped::default();
        for cursor in &mut next.sources {
            cursor.stage_tokens = 0;
            if cursor.offset == 0 {
                continue;
            }
            let source = dataset.source_number(&cursor.name).ok_or_else(|| {
                Error::Cursor(format!(
                    "it names a source \"{}\" that is not there",
                    cursor.name
                ))
            })?;
            let window = dataset.window(source, cursor.epoch, cursor.window)?;
            dropped.tokens += window.tokens().saturating_sub(cursor.offset);
            dropped.documents += window.documents_after(cursor.offset);
            cursor.window += 1;
            cursor.offset = 0;
        }
        Ok((next, dropped))
    }
}
