//! The record of one step, and the log line that says it.

use serde::{Deserialize, Deserializer, Serialize};

use super::units::{compact, percent};

/// One line of `metrics.jsonl`: what one optimizer step did.
///
/// Figures that JSON cannot hold (a loss that is not finite) are written as `null` and read back
/// as NaN.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Updates made so far, this one included: the first record has step 1.
    pub step: u64,
    /// How often this run has been started; [`MetricsWriter`](super::MetricsWriter) fills it in.
    pub attempt: u32,
    /// Name of the context stage.
    pub stage: String,
    /// Positions per sample in this stage.
    pub seq_len: u64,
    /// Mean loss over the valid targets of the whole global batch, in nats.
    #[serde(deserialize_with = "nan_if_null")]
    pub loss: f64,
    /// Global gradient norm before clipping.
    #[serde(deserialize_with = "nan_if_null")]
    pub grad_norm: f64,
    /// Learning rate of this step, before per-tensor multipliers.
    pub lr: f64,
    /// Positions trained on since the run began, padding included, this step included.
    pub tokens: u64,
    /// Valid targets of this step: the positions whose loss counted.
    pub target_tokens: u64,
    /// Samples of this step over all ranks.
    pub samples: u64,
    /// Positions of this step per second, over all ranks.
    pub tokens_per_second: f64,
    /// The same per rank.
    pub tgs: f64,
    /// Model FLOPs utilisation between 0 and 1, attention counted causally inside documents; absent
    /// when the peak is not known.
    pub mfu: Option<f64>,
    /// The same with every pair of a sample's positions counted, as most published figures have it.
    pub mfu_full: Option<f64>,
    /// Hardware FLOPs utilisation (recomputation counted) between 0 and 1.
    pub hfu: Option<f64>,
    /// Wall time of the step, from the end of the step before it.
    pub step_seconds: f64,
    /// Time the step waited for data.
    pub data_wait_seconds: f64,
    /// Time the lanes were busy, summed over lanes.
    pub comm_seconds: f64,
    /// Time the step stood still waiting for a collective.
    pub exposed_comm_seconds: f64,
    /// Time of the optimizer update.
    pub optimizer_seconds: f64,
    /// Highest number of bytes allocated for tensors so far, on this rank.
    pub peak_bytes: u64,
    /// The update was skipped (a gradient was not finite, or the guard refused the step).
    pub skipped: bool,
}

impl StepRecord {
    /// The one line per step for people: no line breaks, fields in a fixed order.
    ///
    /// `last_step` is the step at which the run ends, when that is known.
    pub fn log_line(&self, last_step: Option<u64>) -> String {
        let step = match last_step {
            Some(last) => {
                let width = last.to_string().len();
                format!("step {:>width$}/{last}", self.step)
            }
            None => format!("step {}", self.step),
        };
        let share = |seconds: f64| {
            if self.step_seconds > 0.0 {
                seconds / self.step_seconds
            } else {
                0.0
            }
        };
        let mut line = format!(
            "{step} | {} | loss {:.4} | grad norm {:.3} | lr {:.2e} | {} tok/s",
            self.stage,
            self.loss,
            self.grad_norm,
            self.lr,
            compact(self.tokens_per_second),
        );
        if let Some(mfu) = self.mfu {
            line.push_str(&format!(" | mfu {}", percent(mfu)));
        }
        if let Some(mfu) = self.mfu_full {
            line.push_str(&format!(" (full attention {})", percent(mfu)));
        }
        line.push_str(&format!(
            " | {:.2} s (exposed comm {}, data {}) | {} tokens",
            self.step_seconds,
            percent(share(self.exposed_comm_seconds)),
            percent(share(self.data_wait_seconds)),
            compact(self.tokens as f64),
        ));
        if self.skipped {
            line.push_str(" | SKIPPED");
        }
        line
    }
}

/// Reads `null`, which is how JSON shows a number that is not finite, as NaN.
pub(super) fn nan_if_null<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn record() -> StepRecord {
        StepRecord {
            step: 12,
            attempt: 1,
            stage: "4k".into(),
            seq_len: 4096,
            loss: 3.45214,
            grad_norm: 0.8123,
            lr: 3e-4,
            tokens: 786_432,
            target_tokens: 65_000,
            samples: 16,
            tokens_per_second: 12_345.0,
            tgs: 6172.5,
            mfu: Some(0.412),
            mfu_full: Some(0.5),
            hfu: None,
            step_seconds: 2.0,
            data_wait_seconds: 0.01,
            comm_seconds: 0.5,
            exposed_comm_seconds: 0.06,
            optimizer_seconds: 0.1,
            peak_bytes: 1 << 30,
            skipped: false,
        }
    }

    #[test]
    fn keys_are_those_of_the_format_in_order() {
        let value = serde_json::to_value(record()).unwrap();
        let keys: Vec<&str> = value
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        let expected = "step attempt stage seq_len loss grad_norm lr tokens target_tokens samples \
                        tokens_per_second tgs mfu mfu_full hfu step_seconds data_wait_seconds comm_seconds \
                        exposed_comm_seconds optimizer_seconds peak_bytes skipped";
        assert_eq!(keys, expected.split_whitespace().collect::<Vec<_>>());
    }

    #[test]
    fn every_bit_of_a_figure_survives_the_file() {
        let mut before = record();
        before.loss = 0.1 + 0.2;
        before.grad_norm = f64::MIN_POSITIVE;
        let text = serde_json::to_string(&before).unwrap();
        let after: StepRecord = serde_json::from_str(&text).unwrap();
        assert_eq!(before, after);
    }

    #[test]
    fn a_loss_that_is_not_finite_becomes_null_and_comes_back_as_nan() {
        let mut before = record();
        before.loss = f64::INFINITY;
        let text = serde_json::to_string(&before).unwrap();
        assert!(text.contains("\"loss\":null"), "{text}");
        let after: StepRecord = serde_json::from_str(&text).unwrap();
        assert!(after.loss.is_nan());
    }

    #[test]
    fn the_log_line_says_what_people_look_for() {
        assert_eq!(
            record().log_line(Some(400)),
            "step  12/400 | 4k | loss 3.4521 | grad norm 0.812 | lr 3.00e-4 | 12.3k tok/s | \
             mfu 41.2% (full attention 50.0%) | 2.00 s (exposed comm 3.0%, data 0.5%) | 786k tokens"
        );
        let skipped = StepRecord {
            skipped: true,
            mfu: None,
            mfu_full: None,
            ..record()
        };
        let line = skipped.log_line(None);
        assert!(
            line.starts_with("step 12 |") && line.ends_with("| SKIPPED"),
            "{line}"
        );
        assert!(!line.contains("mfu") && !line.contains("full"), "{line}");
    }
}
