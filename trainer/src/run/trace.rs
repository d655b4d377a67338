//! Tracing a stretch of steps (`run.trace_steps`): who measures what, and what it is called.
//!
//! The step tells the [`Tracer`] of each action, the model's stopwatch of the operations inside,
//! and the clock of the collectives of what lanes did and what was waited for. In all other steps
//! nobody looks at a clock.

use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::config::TraceSteps;
use crate::metrics::{MetricsError, Span, TraceFile, Track};
use crate::model::Activations;
use crate::plan::{Action, Exchange, Role, ShardMap, Units};
use crate::zero::{CommClock, CommSpan, Zero};

/// Folder of the traces inside a run directory.
const FOLDER: &str = "trace";

/// Writes the trace of a rank.
#[derive(Debug)]
pub(super) struct Tracer {
    /// The steps still to be traced, if any.
    steps: Option<TraceSteps>,
    path: PathBuf,
    rank: usize,
    clock: Clock,
    names: Names,
    /// From the beginning of the first traced step to the end of the last.
    recording: Option<Recording>,
}

#[derive(Debug)]
struct Recording {
    file: TraceFile,
    /// Those of the step under way.
    spans: Vec<Span>,
}

/// What layers, units and pieces are called, by index.
#[derive(Debug)]
struct Names {
    layers: Vec<String>,
    units: Vec<String>,
    pieces: Vec<String>,
}

/// Turns this process's clock into nanoseconds since the origin.
#[derive(Debug)]
struct Clock {
    /// Nanoseconds since 1970-01-01 UTC.
    origin: u64,
    anchor: Instant,
    anchor_nanoseconds: i64,
}

impl Tracer {
    /// A tracer of `steps`. It writes nothing before the first of them. Times count from `origin`,
    /// [nanoseconds](unix_nanoseconds) that are the same on all ranks.
    pub(super) fn new(
        steps: Option<TraceSteps>,
        run_dir: &Path,
        (rank, attempt): (usize, u32),
        origin: u64,
        (units, map): (&Units, &ShardMap),
    ) -> Self {
        let name = match attempt {
            1 => format!("rank-{rank:04}.json"),
            _ => format!("rank-{rank:04}-attempt-{attempt}.json"),
        };
        Self {
            steps,
            path: run_dir.join(FOLDER).join(name),
            rank,
            clock: Clock::new(origin),
            names: Names::new(units, map),
            recording: None,
        }
    }

    /// Starts to measure when `step` is to be traced.
    pub(super) fn enter(&mut self, step: u64, zero: &mut Zero, activations: &mut Activations) {
        if !self.steps.is_some_and(|steps| steps.contains(step)) {
            return;
        }
        if self.recording.is_none() {
            let origin = self.clock.origin as f64 / 1e9;
            match TraceFile::create(&self.path, self.rank, origin) {
                Ok(file) => {
                    let spans = Vec::new();
                    self.recording = Some(Recording { file, spans });
                    zero.clock.spans = Some(Vec::new());
                }
                Err(error) => return self.give_up(&error),
            }
        }
        activations.stopwatch.switch(true);
    }

    /// When something began, for those who will tell that it is over; `None` outside of traces.
    pub(super) fn begin(&self) -> Option<Instant> {
        self.recording.is_some().then(Instant::now)
    }

    /// An action is over, with the operations in it.
    pub(super) fn action(
        &mut self,
        action: Action,
        began: Option<Instant>,
        activations: &mut Activations,
    ) {
        let (Some(recording), Some(began)) = (&mut self.recording, began) else {
            return;
        };
        let (category, name, args) = self.names.describe(action);
        let mut push = |category, name, began, ended, args| {
            recording.spans.push(Span {
                track: Track::Compute,
                name,
                category,
                begin: self.clock.nanoseconds(began),
                end: self.clock.nanoseconds(ended),
                args,
            });
        };
        push(category, name, began, Instant::now(), args);
        for span in activations.stopwatch.take() {
            let (name, args) = (span.operation.to_owned(), vec![("slot", json!(span.slot))]);
            push("operation", name, span.begun, span.ended, args);
        }
    }

    /// Something beside the actions is over: reading data, a replica check, a validation, a save.
    pub(super) fn note(&mut self, name: &'static str, began: Option<Instant>) {
        self.compute(name, name, began);
    }

    fn compute(&mut self, category: &'static str, name: impl Into<String>, began: Option<Instant>) {
        if let (Some(recording), Some(began)) = (&mut self.recording, began) {
            recording.spans.push(Span {
                track: Track::Compute,
                name: name.into(),
                category,
                begin: self.clock.nanoseconds(began),
                end: self.clock.nanoseconds(Instant::now()),
                args: Vec::new(),
            });
        }
    }

    /// Takes note of what the collectives have cost.
    pub(super) fn collectives(&mut self, cost: &CommClock) {
        let (Some(recording), Some(spans)) = (&mut self.recording, &cost.spans) else {
            return;
        };
        for span in spans {
            let name = match span.piece {
                Some(piece) => format!("{} {}", span.operation, self.names.pieces[piece]),
                None => span.operation.to_owned(),
            };
            let waited_from = self.clock.nanoseconds(span.waited_from);
            recording.spans.push(Span {
                track: Track::Waits,
                name: format!("wait for {name}"),
                category: "wait",
                begin: waited_from,
                end: waited_from + span.waited.as_nanos() as i64,
                args: self.names.collective(span),
            });
            // A lane of one rank has nothing to do.
            let Some(begun) = span.begun else { continue };
            let begin = self.clock.nanoseconds(begun);
            recording.spans.push(Span {
                track: lane(span),
                name,
                category: span.operation,
                begin,
                end: begin + span.busy.as_nanos() as i64,
                args: self.names.collective(span),
            });
        }
    }

    /// Step number `step` is over. Its spans go to the file; after the last one the file is whole,
    /// and nobody measures any more.
    pub(super) fn leave(
        &mut self,
        step: u64,
        began: Instant,
        cost: &CommClock,
        zero: &mut Zero,
        activations: &mut Activations,
    ) {
        if self.recording.is_none() {
            return;
        }
        self.collectives(cost);
        self.compute("step", format!("step {step}"), Some(began));
        if let Some(Recording { file, spans }) = &mut self.recording
            && let Err(error) = file.append(spans)
        {
            self.give_up(&error);
        }
        if self.steps.is_none_or(|steps| !steps.contains(step + 1)) {
            self.close();
        }
        if self.recording.is_none() {
            zero.clock.spans = None;
            activations.stopwatch.switch(false);
        }
    }

    /// Completes the file, if one has been begun.
    pub(super) fn close(&mut self) {
        let Some(mut recording) = self.recording.take() else {
            return;
        };
        let last = recording.file.append(&mut recording.spans);
        match last.and_then(|()| recording.file.finish()) {
            Ok(path) => tracing::info!("trace: {}", path.display()),
            Err(error) => self.give_up(&error),
        }
    }

    /// A trace is a look at the run, not a part of it: without room for the one, the other goes on.
    fn give_up(&mut self, error: &MetricsError) {
        tracing::warn!("no trace is written: {error}");
        self.steps = None;
        self.recording = None;
    }
}

impl Clock {
    fn new(origin: u64) -> Self {
        // A process that is put aside between the two clocks reads them apart: the closest of a few
        // readings counts.
        let read = || {
            let anchor = Instant::now();
            let now = unix_nanoseconds();
            (anchor.elapsed(), anchor, now)
        };
        let (_, anchor, now) = (0..8).map(|_| read()).fold(read(), std::cmp::min);
        Self {
            origin,
            anchor,
            anchor_nanoseconds: now as i64 - origin as i64,
        }
    }

    fn nanoseconds(&self, instant: Instant) -> i64 {
        let after = instant.saturating_duration_since(self.anchor).as_nanos() as i64;
        let before = self.anchor.saturating_duration_since(instant).as_nanos() as i64;
        self.anchor_nanoseconds + after - before
    }
}

/// Nanoseconds since 1970-01-01 UTC.
pub(super) fn unix_nanoseconds() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default().as_nanos() as u64
}

/// The lane that a collective ran on.
fn lane(span: &CommSpan) -> Track {
    match span.operation {
        "gather" | "reduce" => Track::ShardLane,
        "replicate" => Track::ReplicaLane,
        _ => Track::WorldLane,
    }
}

impl Names {
    fn new(units: &Units, map: &ShardMap) -> Self {
        Self {
            layers: units
                .layers
                .iter()
                .map(|layer| layer.name.clone())
                .collect(),
            units: units.units.iter().map(|unit| unit.name.clone()).collect(),
            pieces: (0..map.pieces().len())
                .map(|piece| map.name(units, piece))
                .collect(),
        }
    }

    /// Category, label and details of an action.
    fn describe(&self, action: Action) -> (&'static str, String, Vec<(&'static str, Value)>) {
        let of_layer = |category, micro_batch, layer: usize| {
            let name = &self.layers[layer];
            let args = vec![("layer", json!(name)), ("micro_batch", json!(micro_batch))];
            (category, format!("{category} {name}"), args)
        };
        let of_unit = |verb, unit: usize, role| {
            let name = &self.units[unit];
            let state = match role {
                Role::Weights => "weights",
                Role::Gradients => "gradients",
            };
            let args = vec![("unit", json!(name)), ("state", json!(state))];
            ("exchange", format!("{verb} {name}"), args)
        };
        let of_piece = |category, verb, piece: usize| {
            let name = &self.pieces[piece];
            (
                category,
                format!("{verb} {name}"),
                vec![("piece", json!(name))],
            )
        };
        match action {
            Action::Forward { micro_batch, layer } => of_layer("forward", micro_batch, layer),
            Action::Evaluate { micro_batch } => {
                of_layer("evaluate", micro_batch, self.layers.len() - 1)
            }
            Action::Recompute { micro_batch, layer } => of_layer("recompute", micro_batch, layer),
            Action::Backward { micro_batch, layer } => of_layer("backward", micro_batch, layer),
            Action::Exchange(exchange) => match exchange {
                Exchange::Hold { unit, role } => of_unit("hold", unit, role),
                Exchange::Drop { unit, role } => of_unit("drop", unit, role),
                Exchange::Gather { piece } => of_piece("exchange", "start gather", piece),
                Exchange::Reduce { piece, .. } => of_piece("exchange", "start reduce", piece),
                Exchange::Replicate { piece } => of_piece("exchange", "start replicate", piece),
                Exchange::Await { piece, .. } => of_piece("exchange", "await", piece),
            },
            Action::Norm { piece } => of_piece("norm", "norm", piece),
            Action::Control => ("control", "control".to_owned(), Vec::new()),
            Action::Update { piece } => of_piece("optimizer", "update", piece),
        }
    }

    /// Details of a collective.
    fn collective(&self, span: &CommSpan) -> Vec<(&'static str, Value)> {
        let piece = span.piece.map(|piece| json!(self.pieces[piece]));
        let mut args = vec![
            ("operation", json!(span.operation)),
            ("bytes_sent", json!(span.bytes_sent)),
        ];
        args.extend(piece.map(|piece| ("piece", piece)));
        args
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn clocks_with_one_origin_agree() {
        let origin = unix_nanoseconds() - 1_000_000_000;
        let clocks = [Clock::new(origin), Clock::new(origin)];
        let now = Instant::now();
        let [a, b] = [&clocks[0], &clocks[1]].map(|clock| clock.nanoseconds(now));
        // The anchors of two processes differ by what lies between two looks at two clocks.
        assert!((a - b).abs() < 10_000_000, "{a} and {b}");
        assert!(a > 900_000_000, "{a}");
        let earlier = clocks[0].nanoseconds(now - Duration::from_millis(500));
        assert_eq!(a - earlier, 500_000_000);
    }
}
