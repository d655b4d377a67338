//! What the page draws: which figures, over which axes, behind which bands and marks.

use oxitron_trainer::metrics::units::{compact, grouped};
use oxitron_trainer::metrics::{Event, EventRecord, History, StageSummary, StepRecord};

use super::chart::{Band, Chart, Curve, Frame, Look, Mark, MarkKind};
use super::curve::{Series, smoothed, smoothing_reach};
use super::events::describe;
use super::scale::Scale;

pub(super) fn frame(history: &History, stages: &[StageSummary]) -> Frame {
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

pub(super) fn marks_legend(frame: &Frame) -> String {
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

pub(super) fn charts(history: &History) -> [Chart<'static>; 4] {
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
