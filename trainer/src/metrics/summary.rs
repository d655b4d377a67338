//! A run in one row per context stage.

use super::units::{compact, duration, grouped};
use super::{Align, History, StepRecord, Table};

/// Steps at the end of a stage whose losses are averaged: the loss of one batch is noise.
const FINAL_STEPS: usize = 10;

/// What one context stage did.
#[derive(Debug, Clone, PartialEq)]
pub struct StageSummary {
    /// Name of the stage.
    pub stage: String,
    /// Positions per sample.
    pub seq_len: u64,
    /// RoPE base; absent when no event tells it.
    pub rope_base: Option<f64>,
    /// Steps done, skipped ones included.
    pub steps: u64,
    /// Steps whose update was skipped.
    pub skipped: u64,
    /// Positions trained on before the stage.
    pub first_tokens: u64,
    /// Positions trained on by its end.
    pub last_tokens: u64,
    /// Median over the steps.
    pub tokens_per_second: f64,
    /// Mean loss of the last (up to) ten steps that were not skipped; absent when all were.
    pub train_loss: Option<f64>,
    /// The last validation loss measured in this stage.
    pub validation_loss: Option<f64>,
    /// Wall time of its steps and validations. Waiting between two attempts does not count, nor
    /// do steps that a later attempt did over.
    pub seconds: f64,
}

impl StageSummary {
    /// Positions trained on in this stage.
    pub fn tokens(&self) -> u64 {
        self.last_tokens.saturating_sub(self.first_tokens)
    }
}

/// One summary per run of consecutive steps of one stage.
pub fn stage_summaries(history: &History) -> Vec<StageSummary> {
    let validations = history.validations();
    let mut first_tokens = 0;
    let mut summaries = Vec::new();
    for steps in history.steps.chunk_by(|a, b| a.stage == b.stage) {
        let (first, last) = match steps {
            [] => continue,
            [only] => (only, only),
            [first, .., last] => (first, last),
        };
        // A validation at a switch belongs to the stage that ends; one before the first step of a
        // run has no stage behind it.
        let inside = validations
            .iter()
            .filter(|point| (first.step..=last.step).contains(&point.step));
        let applied: Vec<f64> = steps
            .iter()
            .filter(|r| !r.skipped)
            .map(|r| r.loss)
            .collect();
        let tail = &applied[applied.len().saturating_sub(FINAL_STEPS)..];
        summaries.push(StageSummary {
            stage: first.stage.clone(),
            seq_len: first.seq_len,
            rope_base: history.rope_base(&first.stage),
            steps: steps.len() as u64,
            skipped: (steps.len() - applied.len()) as u64,
            first_tokens,
            last_tokens: last.tokens,
            tokens_per_second: median_tokens_per_second(steps),
            train_loss: (!tail.is_empty()).then(|| tail.iter().sum::<f64>() / tail.len() as f64),
            validation_loss: inside.clone().next_back().map(|point| point.loss),
            seconds: steps.iter().map(|record| record.step_seconds).sum::<f64>()
                + inside.map(|point| point.seconds).sum::<f64>(),
        });
        first_tokens = last.tokens;
    }
    summaries
}

/// The closing table: one row per stage.
pub fn stage_table(summaries: &[StageSummary]) -> Table {
    let mut table = Table::new(&[
        ("stage", Align::Left),
        ("seq_len", Align::Right),
        ("RoPE base", Align::Right),
        ("steps", Align::Right),
        ("tokens", Align::Right),
        ("tokens/s", Align::Right),
        ("train loss", Align::Right),
        ("val. loss", Align::Right),
        ("wall time", Align::Right),
    ]);
    let loss = |loss: Option<f64>| loss.map_or("-".into(), |loss| format!("{loss:.4}"));
    for summary in summaries {
        table.row([
            summary.stage.clone(),
            grouped(summary.seq_len),
            summary.rope_base.map_or("-".into(), plain),
            grouped(summary.steps),
            compact(summary.tokens() as f64),
            grouped(summary.tokens_per_second.max(0.0).round() as u64),
            loss(summary.train_loss),
            loss(summary.validation_loss),
            duration(summary.seconds),
        ]);
    }
    table
}

/// A RoPE base: whole ones in full, for they are compared digit by digit.
fn plain(base: f64) -> String {
    if base.fract() == 0.0 && (0.0..1e15).contains(&base) {
        grouped(base as u64)
    } else {
        format!("{base}")
    }
}

fn median_tokens_per_second(steps: &[StepRecord]) -> f64 {
    let mut rates: Vec<f64> = steps
        .iter()
        .map(|record| record.tokens_per_second)
        .collect();
    rates.sort_by(f64::total_cmp);
    match rates.len() {
        0 => 0.0,
        odd if odd % 2 == 1 => rates[odd / 2],
        even => (rates[even / 2 - 1] + rates[even / 2]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::metrics::{Event, MetricsWriter};

    fn record(step: u64, stage: &str, loss: f64) -> StepRecord {
        StepRecord {
            step,
            stage: stage.into(),
            seq_len: if stage == "4k" { 4096 } else { 8192 },
            loss,
            tokens: step * 1_000_000,
            tokens_per_second: 1000.0 * step as f64,
            step_seconds: 2.0,
            ..StepRecord::default()
        }
    }

    #[test]
    fn a_row_per_stage_with_what_it_did() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = MetricsWriter::open(folder.path(), 1).unwrap();
        let switch = |step, from: Option<&str>, to: &str, rope_base| Event::StageSwitch {
            step,
            tokens: step * 1_000_000,
            from: from.map(Into::into),
            to: to.into(),
            seq_len: 0,
            rope_base,
        };
        let validation = |step, stage: &str, loss| Event::Validation {
            step,
            tokens: step * 1_000_000,
            stage: stage.into(),
            loss,
            target_tokens: 1,
            seconds: 1.5,
        };
        writer.event(switch(0, None, "4k", 10_000.0));
        for k in 1..=12 {
            writer.step(&record(k, "4k", k as f64));
        }
        writer.event(validation(6, "4k", 9.0));
        writer.event(validation(12, "4k", 8.0));
        writer.event(switch(12, Some("4k"), "8k", 500_000.0));
        writer.step(&StepRecord {
            skipped: true,
            ..record(13, "8k", f64::NAN)
        });
        let summaries = stage_summaries(&History::read(folder.path()).unwrap());
        assert_eq!(summaries.len(), 2);
        let first = &summaries[0];
        assert_eq!(
            (first.steps, first.tokens(), first.rope_base),
            (12, 12_000_000, Some(1e4))
        );
        assert_eq!(first.tokens_per_second, 6500.0);
        assert_eq!(first.train_loss, Some(7.5), "mean of steps 3 to 12");
        assert_eq!((first.validation_loss, first.seconds), (Some(8.0), 27.0));
        let second = &summaries[1];
        assert_eq!(
            (second.skipped, second.train_loss, second.validation_loss),
            (1, None, None)
        );
        assert_eq!(second.tokens(), 1_000_000);
        assert_eq!(
            stage_table(&summaries).to_string(),
            "stage  seq_len  RoPE base  steps  tokens  tokens/s  train loss  val. loss  wall time\n\
             -----  -------  ---------  -----  ------  --------  ----------  ---------  ---------\n\
             4k       4,096     10,000     12   12.0M     6,500      7.5000     8.0000     27.0 s\n\
             8k       8,192    500,000      1   1.00M    13,000           -          -     2.00 s"
        );
    }

    #[test]
    fn nothing_done_is_no_row() {
        assert!(stage_summaries(&History::default()).is_empty());
    }
}
