//! Writing a run's figures.

use std::fs;
use std::path::Path;

use super::TENSORBOARD_FOLDER;
use super::jsonl::JsonLog;
use super::tensorboard::{EventFile, unix_seconds};
use super::{EVENTS_FILE, Event, EventRecord, METRICS_FILE, MetricsError, StepRecord};

/// The one writer of a run's figures: `metrics.jsonl`, `events.jsonl` and `tensorboard/`.
///
/// Every call appends whole records with one `write` each and leaves nothing in a buffer, so a
/// killed process loses at most the record it was writing. Surviving a power cut needs
/// [`sync`](Self::sync), which belongs beside a save.
///
/// A run does not end because its figures cannot be written. Once the files are open, trouble with
/// them is said in the log, once; records are kept in memory and written when there is room again
/// (TensorBoard's copy of them is left out).
#[derive(Debug)]
pub struct MetricsWriter {
    attempt: u32,
    steps: JsonLog,
    events: EventLog,
    tensorboard: EventFile,
    in_trouble: bool,
}

impl MetricsWriter {
    /// Opens the files of `run_dir`, creating folder and files that are not there yet.
    ///
    /// `attempt` counts the starts of this run from 1 ([`next_attempt`](super::next_attempt)).
    ///
    /// # Errors
    /// A folder or file that cannot be made, read or appended to.
    pub fn open(run_dir: &Path, attempt: u32) -> Result<Self, MetricsError> {
        let folder = run_dir.join(TENSORBOARD_FOLDER);
        fs::create_dir_all(&folder).map_err(MetricsError::io(&folder, "create the folder"))?;
        Ok(Self {
            attempt,
            steps: JsonLog::open(&run_dir.join(METRICS_FILE))?,
            events: EventLog::open(run_dir, attempt)?,
            tensorboard: EventFile::create(&folder, attempt)?,
            in_trouble: false,
        })
    }

    /// The attempt that every record is stamped with.
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// Appends the record of a step; its `attempt` is set to the writer's.
    pub fn step(&mut self, record: &StepRecord) {
        let written = self.write_step(record);
        self.tolerate(written);
    }

    /// Appends an event.
    pub fn event(&mut self, event: Event) {
        let written = self.write_event(event);
        self.tolerate(written);
    }

    /// Waits until everything written so far is on disk.
    pub fn sync(&mut self) {
        let synced = self.write_through();
        self.tolerate(synced);
    }

    /// Says what is wrong with the files when it begins and when it is over.
    fn tolerate(&mut self, result: Result<(), MetricsError>) {
        match result {
            Ok(()) if self.in_trouble => {
                self.in_trouble = false;
                tracing::info!("the run's figures can be written again");
            }
            Err(error) if !self.in_trouble => {
                self.in_trouble = true;
                tracing::error!("the run goes on, but its figures cannot be written: {error}");
            }
            _ => {}
        }
    }

    fn write_step(&mut self, record: &StepRecord) -> Result<(), MetricsError> {
        let record = StepRecord {
            attempt: self.attempt,
            ..record.clone()
        };
        self.steps.append(&record)?;
        let mut scalars = vec![
            ("train/loss", record.loss),
            ("train/grad_norm", record.grad_norm),
            ("train/lr", record.lr),
            ("train/tokens", record.tokens as f64),
            ("train/target_tokens", record.target_tokens as f64),
            ("train/skipped", f64::from(u8::from(record.skipped))),
            ("throughput/tokens_per_second", record.tokens_per_second),
            ("throughput/tgs", record.tgs),
            ("seconds/step", record.step_seconds),
            ("seconds/data_wait", record.data_wait_seconds),
            ("seconds/comm", record.comm_seconds),
            ("seconds/exposed_comm", record.exposed_comm_seconds),
            ("seconds/optimizer", record.optimizer_seconds),
            ("memory/peak_bytes", record.peak_bytes as f64),
        ];
        scalars.extend(record.mfu.map(|mfu| ("throughput/mfu", mfu)));
        scalars.extend(record.mfu_full.map(|mfu| ("throughput/mfu_full", mfu)));
        scalars.extend(record.hfu.map(|hfu| ("throughput/hfu", hfu)));
        self.tensorboard
            .scalars(unix_seconds(), record.step, &scalars)
    }

    fn write_event(&mut self, event: Event) -> Result<(), MetricsError> {
        let of_tensorboard = self.tensorboard_event(&event);
        self.events.append(event)?;
        of_tensorboard
    }

    fn tensorboard_event(&mut self, event: &Event) -> Result<(), MetricsError> {
        if let Event::Validation { step, loss, .. } = event {
            self.tensorboard
                .scalars(unix_seconds(), *step, &[("validation/loss", *loss)])?;
        }
        if let Some(step) = event.continues_from() {
            self.tensorboard.session_start(unix_seconds(), step + 1)?;
        }
        Ok(())
    }

    fn write_through(&mut self) -> Result<(), MetricsError> {
        for log in [&mut self.steps, &mut self.events.log] {
            log.reopen_if_removed()?;
            log.write_pending()?;
        }
        self.steps.sync()?;
        self.events.log.sync()?;
        self.tensorboard.sync()
    }
}

/// `events.jsonl` alone, for the launcher, which has something to say while no rank lives.
#[derive(Debug)]
pub struct EventLog {
    attempt: u32,
    log: JsonLog,
}

impl EventLog {
    /// Opens the events of `run_dir`, a folder that exists.
    ///
    /// # Errors
    /// A file that cannot be made, read or appended to.
    pub fn open(run_dir: &Path, attempt: u32) -> Result<Self, MetricsError> {
        Ok(Self {
            attempt,
            log: JsonLog::open(&run_dir.join(EVENTS_FILE))?,
        })
    }

    /// Appends an event with the time of now.
    ///
    /// # Errors
    /// A file that cannot be appended to.
    pub fn append(&mut self, event: Event) -> Result<(), MetricsError> {
        let attempt = self.attempt;
        self.log.append(&EventRecord {
            unix_seconds: unix_seconds(),
            attempt,
            event,
        })
    }
}
