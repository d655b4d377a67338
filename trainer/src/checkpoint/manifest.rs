//! What a manifest says: the types that `manifest.json` is made of.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::Region;
use super::dtype::Dtype;
use crate::guard::{BadStepsState, SpikeState};
pub(super) use crate::zero::StateKind;

/// The name of the manifest in a checkpoint folder.
pub(super) const MANIFEST: &str = "manifest.json";
/// The `format` key of every manifest.
pub(super) const FORMAT: &str = "oxitron-checkpoint";

/// The limits of the format, for documentation and for writers of other tools.
#[derive(Debug)]
pub struct FormatLimits;

impl FormatLimits {
    /// The format version this build writes. 2 has the purpose of the
    /// checkpoint, the samples left out and the memory of the guard.
    pub const VERSION: u32 = 2;
    /// The oldest format version this build reads.
    pub const OLDEST: u32 = 1;
    /// The largest chunk with one checksum, in bytes: 16 MiB.
    pub const MAX_CHUNK_BYTES: u64 = 16 << 20;
    /// The chunk size this build writes. Smaller than allowed, because a read of one norm vector
    /// costs a chunk.
    pub const CHUNK_BYTES: u64 = 4 << 20;
    /// The largest manifest that is read, in bytes: 256 MiB, some millions of pieces.
    pub const MAX_MANIFEST_BYTES: u64 = 256 << 20;
}

/// Everything a run needs beside its tensors to go on where the checkpoint was taken.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ManifestMeta {
    /// The run, the same for all its attempts.
    pub run_id: String,
    /// Which start of the run wrote this, from 1. Zero for a checkpoint no run has written.
    pub attempt: u32,
    /// The checkpoint folder the attempt started from, if any.
    pub parent: Option<String>,
    /// What it was saved for. A manifest of format 1 has none and is of a regular one.
    #[serde(default)]
    pub purpose: Purpose,
    /// Optimizer steps taken, skipped ones included.
    pub step: u64,
    /// Positions trained on so far.
    pub tokens: u64,
    /// Samples trained on so far.
    pub samples: u64,
    /// The context stage of the last step taken; `None` before the first.
    pub stage: Option<StageMark>,
    /// Index of the context stage that the next step belongs to; `None` when training is done.
    pub next_stage: Option<usize>,
    /// Where each source of the mixture goes on.
    pub cursor: serde_json::Value,
    /// Fingerprint of the dataset lock.
    pub dataset_lock: Option<String>,
    /// Counters that the learning rate and Adam depend on.
    pub schedule: ScheduleState,
    /// What the run chose by its machine: kept, or compared, when it is resumed.
    pub choices: BTreeMap<String, serde_json::Value>,
    /// Token ids that an exported model states.
    pub special_tokens: SpecialTokens,
    /// Samples whose steps were skipped.
    pub skipped: Vec<SkippedRange>,
    /// Samples that are left out because the run went back to before them: `[first, end]` by index
    /// in the run.
    #[serde(default)]
    pub left_out: Vec<[u64; 2]>,
    /// What is remembered of the steps before, to tell bad ones.
    #[serde(default)]
    pub guard: GuardState,
    /// The resolved config as TOML. Its `[model]` table describes the tensors.
    pub config: String,
}

/// What a checkpoint was saved for. It decides how long it stays: see
/// [`Retention`](super::Retention).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    /// It was due by the number of steps.
    #[default]
    Regular,
    /// It was due in between, to lose little if the run dies.
    Ephemeral,
    /// A context stage has ended.
    StageEnd,
    /// The run was told to stop.
    Stop,
}

impl fmt::Display for Purpose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Regular => "regular",
            Self::Ephemeral => "ephemeral",
            Self::StageEnd => "stage_end",
            Self::Stop => "stop",
        })
    }
}

impl ManifestMeta {
    /// The stages that are done: the index of the one that the next step belongs to. Behind the
    /// last stage of a run that had no more, others may have been added.
    pub fn stages_done(&self) -> usize {
        let after_last = || self.stage.as_ref().map_or(0, |stage| stage.index + 1);
        self.next_stage.unwrap_or_else(after_last)
    }

    /// The last stage of which a step was taken; the first before any.
    pub fn last_stage_begun(&self) -> usize {
        self.stage.as_ref().map_or(0, |stage| stage.index)
    }
}

/// What a run remembers of its steps, to tell bad ones.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuardState {
    /// The window that steps are compared with.
    pub spikes: SpikeState,
    /// What has been done about bad steps so far.
    pub bad_steps: BadStepsState,
}

/// A context stage, as far as a checkpoint needs to tell it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StageMark {
    /// Index in the config's list of stages.
    pub index: usize,
    /// Its name.
    pub name: String,
    /// Tokens of a sample.
    pub seq_len: usize,
    /// Base of the rotary embedding.
    pub rope_base: f64,
}

/// Counters of the schedule.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScheduleState {
    /// Steps taken in the stage that the next step belongs to.
    pub step_in_stage: u64,
    /// Steps taken in the stage of the last step, which may be done.
    #[serde(default)]
    pub steps_of_last_stage: u64,
    /// Adam's time: updates applied since its moments were last reset.
    pub adam_step: u64,
}

/// Token ids with a meaning for whoever samples from the model.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SpecialTokens {
    /// Begin of text.
    pub bos: Option<u32>,
    /// End of text; some models have several.
    pub eos: Vec<u32>,
    /// Padding.
    pub pad: Option<u32>,
}

/// A range of samples whose step was skipped.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SkippedRange {
    /// The step.
    pub step: u64,
    /// Index of the first sample.
    pub first_sample: u64,
    /// Number of samples.
    pub samples: u64,
}

/// The whole manifest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Always `oxitron-checkpoint`.
    pub format: String,
    /// Version of the format.
    pub format_version: u32,
    /// The save that wrote the files.
    pub save_id: String,
    /// The state of the run.
    pub run: ManifestMeta,
    /// Every tensor, by name.
    pub tensors: Vec<TensorEntry>,
    /// Every file but the manifest.
    pub files: Vec<FileEntry>,
    /// xxh3-128 of the manifest's bytes before this key.
    #[serde(default, skip_serializing)]
    pub(super) checksum: String,
}

/// A tensor: its canonical name and shape, and what is stored of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorEntry {
    /// Name in a Hugging Face folder.
    pub name: String,
    /// Shape in Hugging Face orientation, without padding.
    pub shape: Vec<usize>,
    /// The stored states, at most one of each kind.
    pub states: Vec<StateEntry>,
}

/// One stored state of a tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StateEntry {
    /// Which.
    pub state: StateKind,
    /// Element type on disk.
    pub dtype: Dtype,
    /// Where its elements lie; together they are the tensor, each element once.
    pub pieces: Vec<Piece>,
}

/// Elements of a tensor that lie together in a file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Piece {
    /// Which elements.
    #[serde(rename = "box")]
    pub region: Region,
    /// Index of the file in the manifest's list.
    pub file: usize,
    /// Byte offset of the first element from the start of the file.
    pub offset: u64,
}

/// A file of the checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Its plain name in the checkpoint folder.
    pub name: String,
    /// What it is.
    pub kind: FileKind,
    /// Its size.
    pub bytes: u64,
    /// Bytes per checksum; the last chunk may be shorter.
    pub chunk_bytes: u64,
    /// xxh3-128 of each chunk, 32 lower-case hexadecimal digits.
    pub chunks: Vec<String>,
}

/// What a file of a checkpoint is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileKind {
    /// A safetensors file that pieces point into.
    Payload,
    /// A file that is carried along, as the tokenizer is.
    Attachment,
}

/// Whether a name may stand for a file in a checkpoint folder: no separators, no leading dot, only
/// letters, digits and `._-`.
pub(crate) fn is_plain_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 200
        && !name.starts_with('.')
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
}
