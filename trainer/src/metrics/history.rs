//! Reading a run's figures back.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::jsonl::{self, JsonLines};
use super::{EVENTS_FILE, Event, EventRecord, METRICS_FILE, MetricsError, StepRecord};

const STEP_LINE: &str = "the record of a step";
const EVENT_LINE: &str = "an event";

/// What a run did, with everything left out that a later attempt did over.
#[derive(Debug, Clone, Default)]
pub struct History {
    /// One record per step, in rising order of steps.
    pub steps: Vec<StepRecord>,
    /// Every event of every attempt, in the order of the file.
    pub events: Vec<EventRecord>,
    /// What is odd about the files though they could be read.
    pub warnings: Vec<String>,
}

/// One measurement of the validation loss.
#[derive(Debug, Clone, PartialEq)]
pub struct ValidationPoint {
    /// Updates made by the model that was measured.
    pub step: u64,
    /// Positions trained on by then.
    pub tokens: u64,
    /// Stage whose sequence length was used.
    pub stage: String,
    /// Mean loss over the valid targets, in nats.
    pub loss: f64,
    /// Time it took.
    pub seconds: f64,
}

impl History {
    /// Reads `run_dir`.
    ///
    /// A run that has not finished a step yet gives an empty history. A torn last line is left out
    /// with a warning.
    ///
    /// # Errors
    /// A folder that is not a run directory, files that cannot be read, a damaged line.
    pub fn read(run_dir: &Path) -> Result<Self, MetricsError> {
        let (metrics, events) = (run_dir.join(METRICS_FILE), run_dir.join(EVENTS_FILE));
        if !run_dir.is_dir() {
            let found = if run_dir.exists() {
                "this is not a folder"
            } else {
                "no such folder"
            };
            return Err(MetricsError::NotARun {
                path: run_dir.to_owned(),
                found,
            });
        }
        if !metrics.exists() && !events.exists() {
            let found = "the folder holds neither metrics.jsonl nor events.jsonl";
            return Err(MetricsError::NotARun {
                path: run_dir.to_owned(),
                found,
            });
        }
        let mut history = Self::default();
        if metrics.exists() {
            let JsonLines { records, warning } = jsonl::read(&metrics, STEP_LINE)?;
            history.steps = surviving(records);
            history.warnings.extend(warning);
        }
        if events.exists() {
            let JsonLines { records, warning } = jsonl::read(&events, EVENT_LINE)?;
            history.events = records;
            history.warnings.extend(warning);
        } else {
            let warning = "is missing: no validation, saves or resumes to show";
            history
                .warnings
                .push(format!("{}: {warning}", events.display()));
        }
        Ok(history)
    }

    /// The measurements of the validation loss that still count, in rising order of steps.
    ///
    /// A resume or a rollback voids what was measured after the step it went back to.
    pub fn validations(&self) -> Vec<ValidationPoint> {
        let mut points: Vec<ValidationPoint> = Vec::new();
        for event in self.events_by_attempt() {
            if let Some(step) = event.continues_from() {
                points.truncate(points.partition_point(|point| point.step <= step));
            }
            if let Event::Validation {
                step,
                tokens,
                stage,
                loss,
                seconds,
                ..
            } = event
            {
                points.truncate(points.partition_point(|point| point.step < *step));
                points.push(ValidationPoint {
                    step: *step,
                    tokens: *tokens,
                    stage: stage.clone(),
                    loss: *loss,
                    seconds: *seconds,
                });
            }
        }
        points
    }

    /// The RoPE base of a stage, by the last event that began it.
    pub fn rope_base(&self, stage: &str) -> Option<f64> {
        self.events_by_attempt()
            .into_iter()
            .rev()
            .find_map(|event| match event {
                Event::StageSwitch { to, rope_base, .. } if to == stage => Some(*rope_base),
                _ => None,
            })
    }

    /// Positions trained on by the end of `step`, as far as the records go.
    pub fn tokens_at(&self, step: u64) -> u64 {
        match self.steps.partition_point(|record| record.step <= step) {
            0 => 0,
            past => self.steps[past - 1].tokens,
        }
    }

    /// The highest attempt that any record or event belongs to.
    pub fn attempts(&self) -> u32 {
        let steps = self.steps.iter().map(|record| record.attempt);
        steps
            .chain(self.events.iter().map(|record| record.attempt))
            .max()
            .unwrap_or(0)
    }

    fn events_by_attempt(&self) -> Vec<&Event> {
        let mut records: Vec<&EventRecord> = self.events.iter().collect();
        records.sort_by_key(|record| record.attempt);
        records.into_iter().map(|record| &record.event).collect()
    }
}

/// What is left when every record replaces the earlier ones of its own and of later steps.
fn surviving(mut records: Vec<StepRecord>) -> Vec<StepRecord> {
    // Stable: within an attempt the order of the lines stays.
    records.sort_by_key(|record| record.attempt);
    let mut steps: Vec<StepRecord> = Vec::with_capacity(records.len());
    for record in records {
        while steps.last().is_some_and(|last| last.step >= record.step) {
            steps.pop();
        }
        steps.push(record);
    }
    steps
}

/// The number of the attempt that starts now: one more than the highest that left a trace.
///
/// Lines that cannot be read are passed over: a damaged figure must not keep a run from resuming.
///
/// # Errors
/// A file that exists and cannot be read.
pub fn next_attempt(run_dir: &Path) -> Result<u32, MetricsError> {
    #[derive(Deserialize)]
    struct Trace {
        attempt: u32,
    }
    let mut highest = 0;
    for name in [METRICS_FILE, EVENTS_FILE] {
        let path = run_dir.join(name);
        if !path.exists() {
            continue;
        }
        let file = File::open(&path).map_err(MetricsError::io(&path, "open"))?;
        for line in BufReader::with_capacity(1 << 20, file).split(b'\n') {
            let line = line.map_err(MetricsError::io(&path, "read"))?;
            if let Ok(Some(Trace { attempt })) = jsonl::parse(&line) {
                highest = highest.max(attempt);
            }
        }
    }
    Ok(highest.saturating_add(1))
}

/// Follows `metrics.jsonl` while a run writes it, for a progress bar.
#[derive(Debug)]
pub struct StepFollower {
    path: PathBuf,
    /// The file that the rest is about: if it is removed, a new one begins.
    file: Option<(u64, u64)>,
    /// Bytes of whole lines handed out so far.
    offset: u64,
    lines: usize,
}

impl StepFollower {
    /// Follows the records of `run_dir` from the first one; the file need not exist yet.
    pub fn new(run_dir: &Path) -> Self {
        Self {
            path: run_dir.join(METRICS_FILE),
            file: None,
            offset: 0,
            lines: 0,
        }
    }

    /// The records of the lines that were finished since the last call, as they stand in the file.
    ///
    /// # Errors
    /// A file that cannot be read, a damaged line.
    pub fn poll(&mut self) -> Result<Vec<StepRecord>, MetricsError> {
        if !self.path.exists() {
            return Ok(Vec::new());
        }
        let fresh = self
            .fresh_lines()
            .map_err(MetricsError::io(&self.path, "read"))?;
        self.offset += fresh.len() as u64;
        let mut records = Vec::new();
        for line in fresh.split_inclusive(|byte| *byte == b'\n') {
            self.lines += 1;
            match jsonl::parse(line) {
                Ok(record) => records.extend(record),
                Err(source) => {
                    let (path, lines) = (&self.path, self.lines);
                    return Err(jsonl::malformed(path, lines, STEP_LINE, line, source));
                }
            }
        }
        Ok(records)
    }

    /// The bytes past the offset, up to the last line break.
    fn fresh_lines(&mut self) -> std::io::Result<Vec<u8>> {
        let mut file = File::open(&self.path)?;
        let identity = jsonl::identity(&file.metadata()?);
        if self.file.replace(identity) != Some(identity) {
            self.offset = 0;
            self.lines = 0;
        }
        file.seek(SeekFrom::Start(self.offset))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        bytes.truncate(
            bytes
                .iter()
                .rposition(|byte| *byte == b'\n')
                .map_or(0, |last| last + 1),
        );
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests;
