//! Everything that happened between the steps, in words and as a list.

use oxitron_trainer::metrics::units::{bytes, duration, grouped};
use oxitron_trainer::metrics::{Align, Event, History, StopReason, Table};

use super::page::{counted, html_table};

/// Rows that the list of events may have; the file has them all.
const MAX_EVENTS: usize = 1000;

/// The events, folded away.
pub(super) fn events(history: &History) -> String {
    let Some(first) = history.events.first() else {
        return String::new();
    };
    let mut table = Table::new(&[
        ("after", Align::Right),
        ("attempt", Align::Right),
        ("step", Align::Right),
        ("event", Align::Left),
    ]);
    for record in history.events.iter().take(MAX_EVENTS) {
        table.row([
            duration((record.unix_seconds - first.unix_seconds).max(0.0)),
            record.attempt.to_string(),
            record.event.step().map_or(String::new(), grouped),
            describe(&record.event),
        ]);
    }
    let count = history.events.len();
    let rest = count.saturating_sub(MAX_EVENTS);
    let more = if rest > 0 {
        format!(
            "<p class=\"note\">{} more are in events.jsonl.</p>\n",
            grouped(rest as u64)
        )
    } else {
        String::new()
    };
    format!(
        "<section aria-labelledby=\"events\">\n<h2 id=\"events\">Events</h2>\n\
         <details><summary>{}: starts, stages, validations, saves</summary>\n{}{more}</details>\n\
         </section>\n",
        counted(count as u64, "1 event", "{} events"),
        html_table(&table, "Events")
    )
}

/// An event in words.
pub(super) fn describe(event: &Event) -> String {
    match event {
        Event::Start {
            run_id,
            world,
            version,
        } => {
            format!("started run {run_id} on {world} ranks, version {version}")
        }
        Event::Resume {
            step,
            checkpoint,
            world,
            ..
        } => {
            format!(
                "resumed on {world} ranks from step {}, {checkpoint}",
                grouped(*step)
            )
        }
        Event::StageSwitch {
            from,
            to,
            seq_len,
            rope_base,
            ..
        } => {
            let from = from
                .as_ref()
                .map_or(String::new(), |from| format!("{from} → "));
            let seq_len = grouped(*seq_len);
            format!("stage {from}{to}: {seq_len} positions per sample, RoPE base {rope_base}")
        }
        Event::Validation { loss, seconds, .. } => {
            format!("validation loss {loss:.4} in {}", duration(*seconds))
        }
        Event::SaveStaged {
            step,
            bytes: size,
            seconds,
        } => {
            format!(
                "state of step {} copied aside, {} per rank in {}",
                grouped(*step),
                bytes(*size),
                duration(*seconds)
            )
        }
        Event::SaveDurable {
            checkpoint,
            bytes: size,
            seconds,
            ..
        } => {
            format!(
                "saved {checkpoint}, {} in {}",
                bytes(*size),
                duration(*seconds)
            )
        }
        Event::SaveFailed { step, reason } => {
            format!("could not save step {}: {reason}", grouped(*step))
        }
        Event::SaveSkipped { step } => format!(
            "left out the save of step {}: the one before was being written",
            grouped(*step)
        ),
        Event::CheckpointRejected { step, reason } => {
            format!("checkpoint of step {} is damaged: {reason}", grouped(*step))
        }
        Event::DataChanged { difference, .. } => {
            format!("goes on with changed token data: {difference}")
        }
        Event::ConfigChanged { difference, .. } => {
            format!("goes on with a changed configuration: {difference}")
        }
        Event::Skip {
            reason,
            first_sample,
            end_sample,
            ..
        } => format!("skipped an update (samples {first_sample}..{end_sample}): {reason}"),
        Event::Rollback {
            to_step,
            reason,
            first_sample,
            end_sample,
            ..
        } => {
            format!(
                "rolled back to step {}, without samples {first_sample}..{end_sample}: {reason}",
                grouped(*to_step)
            )
        }
        Event::SlowRank {
            rank,
            seconds,
            median_seconds,
            ..
        } => format!(
            "rank {rank} computes {} per step, the median rank {}",
            duration(*seconds),
            duration(*median_seconds)
        ),
        Event::Restart {
            restarts,
            failed_rank,
            reason,
        } => {
            let rank = failed_rank.map_or(String::new(), |rank| format!(", rank {rank} failed"));
            format!("restart {restarts}{rank}: {reason}")
        }
        Event::ChoiceChanged {
            choice,
            before,
            after,
            ..
        } => {
            format!("choice {choice} changed from {before} to {after}")
        }
        Event::Stop { reason, detail, .. } => {
            let what = match reason {
                StopReason::Finished => "finished",
                StopReason::Requested => "stopped on request",
                StopReason::Failed => "failed",
            };
            detail
                .as_ref()
                .map_or(what.into(), |detail| format!("{what}: {detail}"))
        }
    }
}
