//! The configuration of a run: strict TOML in, typed and validated structs out.
//!
//! # The way of a config
//!
//! ```text
//! config file ─┐ parse        ┌ check against the key table: unknown keys, types, ranges
//! --set a.b=c ─┴─▶ one tree ──┤ fill: preset, defaults, inherited and derived values, paths
//!                             └ typed structs ─▶ checks across keys ─▶ Config
//! ```
//!
//! The tree (`tree`) knows where each value was written, so that every error, also one found
//! after merging, shows file, line, column, the line with a caret, and what to do. The key table
//! (`keys`) declares each key once: name, type, range, default, unit and meaning. The check, the
//! defaults and the reference page read it. Typed structs carry no defaults of their own.
//!
//! # Invariants
//!
//! - A [`Config`] is complete: nothing is looked up or defaulted later. Its only open question is
//!   `dtype = "auto"`, which the trainer answers ([`DtypeChoice::resolve`]) and records
//!   ([`Config::record_dtype`]).
//! - [`Config::resolved_toml`] loads back to an equal [`Config`], from any folder: its paths are
//!   absolute.
//! - Precedence: `--set` over the file over the preset over defaults.
//! - A feature that does not exist has no key.
//! - This module is pure: it reads the config file and nothing else, and knows neither ranks nor
//!   devices. Whether paths exist is found by whoever opens them.

mod data;
mod derive;
mod difference;
mod error;
mod guard;
mod keys;
mod model;
mod optimizer;
mod overrides;
mod parallel;
mod patterns;
mod presets;
mod reference;
mod resolve;
mod root;
mod run;
pub mod schedule;
mod schema;
mod source;
mod stage;
mod time_span;
mod tree;
mod validate;

#[cfg(test)]
mod tests;

pub use data::{DataConfig, Packing, SourceConfig};
pub use difference::Difference;
pub use error::{ConfigError, Place, Problem};
pub use guard::{GuardConfig, SampleRange, SpikePolicy};
pub use model::{Dtype, DtypeChoice, Family, ModelConfig};
pub use optimizer::OptimizerConfig;
pub use parallel::{ParallelConfig, Recompute, ShardSize};
pub use patterns::Patterns;
pub use presets::{PRESETS, Preset};
pub use reference::reference;
pub use root::Config;
pub use run::{CheckpointConfig, Device, RunConfig, TraceSteps, ValidationConfig, WhenBusy};
pub use schedule::{DecayShape, Schedule, ScheduleKind};
pub use stage::{StageConfig, StageOptimizer};
pub use time_span::TimeSpan;
