//! The page: heading, key figures, charts, stage table, events, config.

use oxitron_trainer::metrics::units::{bytes, compact, duration, grouped, percent};
use oxitron_trainer::metrics::{
    Align, Event, EventRecord, History, StageSummary, StepRecord, StopReason, Table, flops,
    stage_table,
};

use super::chart::{Band, Chart, Curve, Frame, Look, Mark, MarkKind};
use super::curve::{Series, smoothed, smoothing_reach};
use super::html::escape;
use super::scale::Scale;

const STYLE: &str = include_str!("report.css");
const SCRIPT: &str = include_str!("report.js");

/// Rows that the list of events may have; the file has them all.
const MAX_EVENTS: usize = 1000;

/// The whole page. `history` has at least one step; `config` is the text of the resolved config.
pub(super) fn page(
    name: &str,
    history: &History,
    stages: &[StageSummary],
    config: Option<&str>,
) -> String {
    let frame = frame(history, stages);
    let safe_name = escape(name);
    let mut html = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; \
         style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n<link rel=\"icon\" href=\"data:,\">\n\
         <title>{safe_name} · training report</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n\
         <header>\n<p class=\"kicker\">Training report</p>\n<h1>{safe_name}</h1>\n\
         <p class=\"status\">{}</p>\n</header>\n<main>\n",
        escape(&status(history))
    );
    html.push_str(&tiles(history, stages));
    html.push_str("<section aria-labelledby=\"stages\">\n<h2 id=\"stages\">Stages</h2>\n");
    html.push_str(&html_table(&stage_table(stages), "Stages"));
    html.push_str(
        "<p class=\"note\">Train loss is the mean of a stage’s last ten steps, validation loss its \
         last measurement, tokens/s the median of its steps. Wall time covers steps and \
         validations, not what a later attempt did over.</p>\n</section>\n",
    );
    html.push_str("<section aria-labelledby=\"curves\">\n<h2 id=\"curves\">Curves</h2>\n");
    html.push_str(&marks_legend(&frame));
    html.push_str("<div class=\"charts\">\n");
    for chart in charts(history) {
        html.push_str(&chart.html(&frame));
    }
    html.push_str("</div>\n</section>\n");
    html.push_str(&events(history));
    if let Some(config) = config {
        html.push_str(&format!(
            "<section aria-labelledby=\"config\">\n<h2 id=\"config\">Config</h2>\n\
             <details><summary>config.toml, every default written out</summary>\n\
             <pre tabindex=\"0\">{}</pre></details>\n</section>\n",
            escape(config)
        ));
    }
    html.push_str(&format!(
        "</main>\n<footer><p>Tokens count positions, padding included. MFU convention: {}. \
         Made by oxitron {} from metrics.jsonl and events.jsonl.</p></footer>\n\
         <script>\n{SCRIPT}</script>\n</body>\n</html>\n",
        escape(flops::CONVENTION),
        env!("CARGO_PKG_VERSION")
    ));
    html
}

/// How the run stands, on how many ranks, and how often it was started.
fn status(history: &History) -> String {
    let ranks = history
        .events
        .iter()
        .rev()
        .find_map(|record| match record.event {
            Event::Start { world, .. } | Event::Resume { world, .. } => Some(u64::from(world)),
            _ => None,
        });
    let ranks = ranks.map_or(String::new(), |ranks| {
        counted(ranks, " · 1 rank", " · {} ranks")
    });
    let attempts = counted(history.attempts().max(1).into(), "1 attempt", "{} attempts");
    format!("{}{ranks} · {attempts}", outcome(history))
}

/// `one`, or `many` with the count in place of its braces.
fn counted(count: u64, one: &str, many: &str) -> String {
    if count == 1 {
        one.to_owned()
    } else {
        many.replace("{}", &grouped(count))
    }
}

/// What the last attempt said last.
fn outcome(history: &History) -> String {
    let last = history.events.iter().max_by_key(|record| record.attempt);
    match last.map(|record| &record.event) {
        Some(Event::Stop {
            step,
            reason,
            detail,
        }) => {
            let what = match reason {
                StopReason::Finished => "Finished",
                StopReason::Requested => "Stopped on request",
                StopReason::Failed => "Failed",
            };
            let detail = detail
                .as_ref()
                .map_or(String::new(), |detail| format!(": {detail}"));
            format!("{what} after step {}{detail}", grouped(*step))
        }
        _ => "Not finished: still running, or killed without a word".into(),
    }
}

/// The key figures as a description list.
fn tiles(history: &History, stages: &[StageSummary]) -> String {
    let (Some(last), Some(stage)) = (history.steps.last(), stages.last()) else {
        return String::new();
    };
    let loss = |loss: Option<f64>| loss.map_or("–".into(), |loss| format!("{loss:.3}"));
    let seconds: f64 = stages.iter().map(|stage| stage.seconds).sum();
    let validation = stages.iter().rev().find_map(|stage| stage.validation_loss);
    let mut tiles = vec![
        ("Train loss", loss(stage.train_loss)),
        ("Validation loss", loss(validation)),
        ("Tokens", compact(last.tokens as f64)),
        ("Steps", grouped(last.step)),
        ("Tokens/s", compact(stage.tokens_per_second)),
        ("Wall time", duration(seconds)),
    ];
    tiles.extend(last.mfu.map(|mfu| ("MFU", percent(mfu))));
    let peak = history
        .steps
        .iter()
        .map(|record| record.peak_bytes)
        .max()
        .unwrap_or(0);
    if peak > 0 {
        tiles.push(("Peak memory", bytes(peak)));
    }
    let tile = |(name, value): (&str, String)| {
        format!("<div><dt>{name}</dt><dd>{}</dd></div>\n", escape(&value))
    };
    format!(
        "<dl class=\"tiles\">\n{}</dl>\n",
        tiles.into_iter().map(tile).collect::<String>()
    )
}

fn frame(history: &History, stages: &[StageSummary]) -> Frame {
    let last_tokens = history.steps.last().map_or(0, |record| record.tokens);
    let bands = stages.iter().map(|stage| Band {
        name: stage.stage.clone(),
        detail: format!(
            "Stage {}: {} positions per sample, {} to {} tokens",
            stage.stage,
            grouped(stage.seq_len),
            compact(stage.first_tokens as f64),
            compact(stage.last_tokens as f64),
        ),
        from: stage.first_tokens as f64,
        to: stage.last_tokens as f64,
    });
    let at = |step: u64| history.tokens_at(step) as f64;
    let mut marks: Vec<Mark> = Vec::new();
    for EventRecord { attempt, event, .. } in &history.events {
        let (kind, step) = match event {
            Event::SaveDurable { step, .. } => (MarkKind::Checkpoint, *step),
            Event::Resume { step, .. } => (MarkKind::Resume, *step),
            Event::Rollback { to_step, .. } => (MarkKind::Rollback, *to_step),
            _ => continue,
        };
        let detail = format!("Attempt {attempt}: {}", describe(event));
        marks.push(Mark {
            kind,
            x: at(step),
            detail,
        });
    }
    marks.extend(
        history
            .steps
            .iter()
            .filter(|record| record.skipped)
            .map(|record| Mark {
                kind: MarkKind::Skip,
                x: record.tokens as f64,
                detail: format!("Step {} was skipped", record.step),
            }),
    );
    Frame {
        x: Scale::exact(0.0, last_tokens as f64),
        bands: bands.collect(),
        marks,
    }
}

fn marks_legend(frame: &Frame) -> String {
    let mut html = String::from(
        "<p class=\"note legend\">The horizontal axis counts tokens; shaded bands are stages.",
    );
    for kind in MarkKind::ALL {
        if frame.marks.iter().any(|mark| mark.kind == kind) {
            html.push_str(&format!(
                " <span class=\"key {}\">{}</span>",
                kind.class(),
                kind.name()
            ));
        }
    }
    html + "</p>\n"
}

fn charts(history: &History) -> [Chart<'static>; 4] {
    let steps = &history.steps;
    let series = |figure: fn(&StepRecord) -> f64| -> Series {
        steps
            .iter()
            .map(|record| (record.tokens as f64, figure(record)))
            .collect()
    };
    let validation: Series = history
        .validations()
        .iter()
        .map(|point| (point.tokens as f64, point.loss))
        .collect();
    let losses = series(|record| record.loss);
    let norms = series(|record| record.grad_norm);
    let rates = series(|record| record.tokens_per_second);
    let lr = series(|record| record.lr);
    let ys = |series: &Series| series.iter().map(|(_, y)| *y).collect::<Vec<_>>();
    let both = [ys(&losses), ys(&validation)].concat();
    let mut loss_curves = with_mean(losses.clone());
    if !validation.is_empty() {
        let name = "validation".into();
        loss_curves.push(Curve {
            name,
            look: Look::Dots,
            series: validation,
        });
    }
    [
        Chart {
            id: "loss",
            title: "Loss",
            caption: "nats per target token",
            description: course("Train loss", &losses),
            legend: true,
            y: Scale::around(both.into_iter(), 3.0),
            curves: loss_curves,
        },
        Chart {
            id: "rate",
            title: "Learning rate",
            caption: "by schedule",
            description: course("Learning rate", &lr),
            legend: false,
            y: Scale::from_zero(ys(&lr).into_iter()),
            curves: vec![Curve {
                name: "learning rate".into(),
                look: Look::Line,
                series: lr,
            }],
        },
        Chart {
            id: "speed",
            title: "Tokens per second",
            caption: "all ranks",
            description: course("Tokens per second", &rates),
            legend: false,
            y: Scale::from_zero(ys(&rates).into_iter()),
            curves: with_mean(rates),
        },
        Chart {
            id: "norm",
            title: "Gradient norm",
            caption: "before clipping",
            description: course("Gradient norm", &norms),
            legend: false,
            y: Scale::around(ys(&norms).into_iter(), 20.0),
            curves: with_mean(norms),
        },
    ]
}

/// The values, and in front of them their moving mean where there are enough of them.
fn with_mean(series: Series) -> Vec<Curve> {
    let reach = smoothing_reach(series.len());
    if reach == 0 {
        return vec![Curve {
            name: "each step".into(),
            look: Look::Line,
            series,
        }];
    }
    let mean = smoothed(&series, reach);
    vec![
        Curve {
            name: "each step".into(),
            look: Look::Raw,
            series,
        },
        Curve {
            name: format!("mean of {} steps", 2 * reach + 1),
            look: Look::Line,
            series: mean,
        },
    ]
}

/// A curve in a sentence.
fn course(what: &str, series: &Series) -> String {
    let finite = || series.iter().map(|(_, y)| *y).filter(|y| y.is_finite());
    let (Some(first), Some(last)) = (finite().next(), finite().next_back()) else {
        return format!("{what}: no finite value.");
    };
    let (low, high) = (
        finite().fold(first, f64::min),
        finite().fold(first, f64::max),
    );
    let [first, last, low, high] = [first, last, low, high].map(compact_or_exponent);
    format!(
        "{what} goes from {first} to {last} over {} steps, between {low} and {high}.",
        series.len()
    )
}

fn compact_or_exponent(value: f64) -> String {
    if value != 0.0 && value.abs() < 1e-3 {
        format!("{value:.2e}")
    } else {
        compact(value)
    }
}

fn html_table(table: &Table, label: &str) -> String {
    let class = |column: usize| match table.align()[column] {
        Align::Left => "",
        Align::Right => " class=\"number\"",
    };
    let mut html = format!(
        "<div class=\"scroll\" role=\"region\" aria-label=\"{label}\" tabindex=\"0\">\n<table>\n\
         <thead><tr>"
    );
    for (column, name) in table.heading().iter().enumerate() {
        html.push_str(&format!(
            "<th scope=\"col\"{}>{}</th>",
            class(column),
            escape(name)
        ));
    }
    html.push_str("</tr></thead>\n<tbody>\n");
    for row in table.rows() {
        html.push_str("<tr>");
        for (column, cell) in row.iter().enumerate() {
            let (tag, scope) = if column == 0 {
                ("th", " scope=\"row\"")
            } else {
                ("td", "")
            };
            let class = class(column);
            html.push_str(&format!("<{tag}{scope}{class}>{}</{tag}>", escape(cell)));
        }
        html.push_str("</tr>\n");
    }
    html + "</tbody>\n</table>\n</div>\n"
}

/// The events, folded away.
fn events(history: &History) -> String {
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
fn describe(event: &Event) -> String {
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
        Event::SaveStaged { step, seconds } => {
            format!(
                "state of step {} copied aside in {}",
                grouped(*step),
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
        Event::Skip { reason, .. } => format!("skipped an update: {reason}"),
        Event::Rollback {
            to_step, reason, ..
        } => {
            format!("rolled back to step {}: {reason}", grouped(*to_step))
        }
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
