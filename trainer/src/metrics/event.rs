//! What happens to a run between its steps.

use serde::{Deserialize, Serialize};

use super::record::nan_if_null;

/// One line of `events.jsonl`: an [`Event`] with when, and in which attempt, it happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EventRecord {
    /// Seconds since 1970-01-01 UTC.
    pub unix_seconds: f64,
    /// How often the run had been started when this happened.
    pub attempt: u32,
    /// What happened; its fields stand beside the two above, its kind under the key `event`.
    #[serde(flatten)]
    pub event: Event,
}

/// Something that happened to a run. `step` always means updates made when it happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A new run began.
    Start {
        /// Identity of the run, as in its checkpoints.
        run_id: String,
        /// Ranks.
        world: u32,
        /// Version of the program.
        version: String,
    },
    /// The run continues from a checkpoint; the next record has `step + 1`.
    Resume {
        /// Step of the checkpoint.
        step: u64,
        /// Positions trained on up to that step.
        tokens: u64,
        /// Folder of the checkpoint, relative to the run directory where it lies inside.
        checkpoint: String,
        /// Ranks.
        world: u32,
    },
    /// A context stage begins. The first stage has this event too, with no `from`.
    StageSwitch {
        /// Updates made before the stage.
        step: u64,
        /// Positions trained on before the stage.
        tokens: u64,
        /// The stage that ended.
        from: Option<String>,
        /// The stage that begins.
        to: String,
        /// Its positions per sample.
        seq_len: u64,
        /// Its RoPE base.
        rope_base: f64,
    },
    /// The validation loss was measured.
    Validation {
        /// Updates made by the model that was measured.
        step: u64,
        /// Positions trained on by then.
        tokens: u64,
        /// Name of the stage whose sequence length and RoPE base were used.
        stage: String,
        /// Mean loss over the valid targets of the validation set, in nats.
        #[serde(deserialize_with = "nan_if_null")]
        loss: f64,
        /// Those targets.
        target_tokens: u64,
        /// Time it took.
        seconds: f64,
    },
    /// The state of a checkpoint has been copied aside and training goes on.
    SaveStaged {
        /// Step of the checkpoint.
        step: u64,
        /// Bytes that one rank copied.
        bytes: u64,
        /// Time the step loop stood still for it.
        seconds: f64,
    },
    /// A checkpoint is complete on disk.
    SaveDurable {
        /// Step of the checkpoint.
        step: u64,
        /// Its folder, relative to the run directory where it lies inside.
        checkpoint: String,
        /// Bytes written, over all ranks.
        bytes: u64,
        /// Time from the request to the manifest on disk.
        seconds: f64,
    },
    /// A save could not be written. Earlier checkpoints are as they were, and the run goes on.
    SaveFailed {
        /// Step of the checkpoint that there is not.
        step: u64,
        /// Why.
        reason: String,
    },
    /// A save was left out, because the one before was still being written.
    SaveSkipped {
        /// Step at which it was due.
        step: u64,
    },
    /// A checkpoint that should have been used is damaged; an older one is tried.
    CheckpointRejected {
        /// Its step.
        step: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// The run goes on with token data that differ from those it began with, as it was told to.
    DataChanged {
        /// Step of the checkpoint it continues from.
        step: u64,
        /// What differs.
        difference: String,
    },
    /// The run goes on with a changed configuration, as it was told to.
    ConfigChanged {
        /// Step of the checkpoint it continues from.
        step: u64,
        /// What differs.
        difference: String,
    },
    /// An update was skipped.
    Skip {
        /// The step that was skipped.
        step: u64,
        /// Why.
        reason: String,
        /// Index of the first sample of its batch in the run's stream of samples.
        first_sample: u64,
        /// Index after the last.
        end_sample: u64,
    },
    /// The run went back to a checkpoint by itself; the next record has `to_step + 1`.
    Rollback {
        /// The step at which it gave up.
        step: u64,
        /// Step of the checkpoint it went back to.
        to_step: u64,
        /// Why.
        reason: String,
        /// Index of the first of the samples that are left out from now on.
        first_sample: u64,
        /// Index after the last of them.
        end_sample: u64,
    },
    /// A rank computes more slowly than the others.
    SlowRank {
        /// Steps taken by then.
        step: u64,
        /// The rank.
        rank: u32,
        /// Median time it computes in a step.
        seconds: f64,
        /// The same over all ranks.
        median_seconds: f64,
    },
    /// The launcher starts the ranks again after a failure.
    Restart {
        /// Restarts so far, this one included.
        restarts: u32,
        /// The rank that failed first, where that is known.
        failed_rank: Option<u32>,
        /// What the launcher saw.
        reason: String,
    },
    /// A choice that was made by measurement differs from the one recorded before.
    ChoiceChanged {
        /// Updates made.
        step: u64,
        /// Name of the choice.
        choice: String,
        /// Its value before.
        before: String,
        /// Its value now.
        after: String,
    },
    /// The ranks leave.
    Stop {
        /// Updates made.
        step: u64,
        /// Why.
        reason: StopReason,
        /// The error or the signal, where there is one.
        detail: Option<String>,
    },
}

/// Why a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopReason {
    /// Every stage is done.
    Finished,
    /// Somebody asked for it, by a signal or a time limit, and the state is saved.
    Requested,
    /// An error.
    Failed,
}

impl Event {
    /// The step the event belongs to; none for what happens before a model exists.
    pub fn step(&self) -> Option<u64> {
        match self {
            Self::Start { .. } | Self::Restart { .. } => None,
            Self::Resume { step, .. }
            | Self::StageSwitch { step, .. }
            | Self::Validation { step, .. }
            | Self::SaveStaged { step, .. }
            | Self::SaveDurable { step, .. }
            | Self::SaveFailed { step, .. }
            | Self::SaveSkipped { step }
            | Self::CheckpointRejected { step, .. }
            | Self::DataChanged { step, .. }
            | Self::ConfigChanged { step, .. }
            | Self::SlowRank { step, .. }
            | Self::Skip { step, .. }
            | Self::Rollback { step, .. }
            | Self::ChoiceChanged { step, .. }
            | Self::Stop { step, .. } => Some(*step),
        }
    }

    /// The step from which the run continues, where the event sends it back to one.
    pub fn continues_from(&self) -> Option<u64> {
        match self {
            Self::Resume { step, .. } => Some(*step),
            Self::Rollback { to_step, .. } => Some(*to_step),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn an_event_is_one_flat_object() {
        let record = EventRecord {
            unix_seconds: 1.5,
            attempt: 2,
            event: Event::Resume {
                step: 50,
                tokens: 1000,
                checkpoint: "checkpoints/step-00000050".into(),
                world: 2,
            },
        };
        let text = serde_json::to_string(&record).unwrap();
        assert_eq!(
            text,
            "{\"unix_seconds\":1.5,\"attempt\":2,\"event\":\"resume\",\"step\":50,\"tokens\":1000,\
             \"checkpoint\":\"checkpoints/step-00000050\",\"world\":2}"
        );
        assert_eq!(serde_json::from_str::<EventRecord>(&text).unwrap(), record);
    }

    #[test]
    fn a_validation_loss_that_is_not_finite_survives_as_nan() {
        let event = Event::Validation {
            step: 1,
            tokens: 2,
            stage: "4k".into(),
            loss: f64::NAN,
            target_tokens: 3,
            seconds: 0.1,
        };
        let record = EventRecord {
            unix_seconds: 0.0,
            attempt: 1,
            event,
        };
        let text = serde_json::to_string(&record).unwrap();
        let back: EventRecord = serde_json::from_str(&text).unwrap();
        assert!(matches!(back.event, Event::Validation { loss, .. } if loss.is_nan()));
    }
}
