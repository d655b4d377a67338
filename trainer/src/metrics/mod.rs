//! What a run says about itself: figures, events, log lines, and how to read them back.
//!
//! A run directory holds three views of the same facts. `metrics.jsonl` has one object per step
//! ([`StepRecord`]), `events.jsonl` has everything that happens between steps ([`Event`]), and
//! `tensorboard/` repeats the figures as TensorBoard event files. The JSON files are the record;
//! TensorBoard is a copy for people's eyes and nothing reads it back.
//!
//! **Appending.** One process (rank 0) writes through [`MetricsWriter`]. A line is appended by a
//! single `write` of the whole line, so a reader sees whole lines and one possibly torn line at
//! the end. After a crash the writer drops a torn tail before it appends, so a malformed line in
//! the middle of a file can only be damage, and reading refuses it by file and line.
//!
//! **History.** Steps count from 1: the record of step *k* describes the update that made *k*
//! updates in all, and a checkpoint "at step *k*" holds the state after it. A run that died at step
//! 80 and resumed from the checkpoint at step 50 writes step 51 again, with a higher `attempt`.
//! [`History`] therefore reads the records like a stack, ordered by attempt and then by line: a
//! record of step *k* replaces every earlier record of step *k* **and of later steps**, because
//! those belong to a future that the run abandoned. TensorBoard's reader applies the same rule to
//! the session marks that the writer leaves.
//!
//! **Honest figures.** Tokens per second count positions; valid targets are counted apart. MFU and
//! HFU follow the conventions named in [`flops`], and are absent where the peak of the device is
//! neither stated nor in the table of [`peaks`].
//!
//! Nothing here knows tensors, ranks or devices: the module is files, text and arithmetic.

pub mod flops;
pub mod logging;
pub mod peaks;
pub mod units;

mod event;
mod history;
mod jsonl;
mod record;
mod summary;
mod table;
mod tensorboard;
mod trace;
mod writer;

pub use event::{Event, EventRecord, StopReason};
pub use history::{History, StepFollower, ValidationPoint, next_attempt};
pub use jsonl::MetricsError;
pub use record::StepRecord;
pub use summary::{StageSummary, stage_summaries, stage_table};
pub use table::{Align, Table};
pub use trace::{Span, TraceFile, Track};
pub use writer::{EventLog, MetricsWriter};

/// File of the step records inside a run directory.
pub const METRICS_FILE: &str = "metrics.jsonl";
/// File of the events inside a run directory.
pub const EVENTS_FILE: &str = "events.jsonl";
/// Folder of the TensorBoard event files inside a run directory.
pub const TENSORBOARD_FOLDER: &str = "tensorboard";
