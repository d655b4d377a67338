//! The page: heading, key figures, stage table, charts, events, config.

use oxitron_trainer::metrics::units::{bytes, compact, duration, grouped, percent};
use oxitron_trainer::metrics::{
    Align, Event, History, StageSummary, StopReason, Table, flops, stage_table,
};

use super::events::events;
use super::figures::{charts, frame, marks_legend};
use super::html::escape;

const STYLE: &str = include_str!("report.css");
const SCRIPT: &str = include_str!("report.js");

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
pub(super) fn counted(count: u64, one: &str, many: &str) -> String {
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
    tiles.extend(
        last.mfu_full
            .map(|mfu| ("MFU, full attention", percent(mfu))),
    );
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

pub(super) fn html_table(table: &Table, label: &str) -> String {
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
