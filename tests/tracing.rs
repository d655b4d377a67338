//! Traces of steps (`run.trace_steps`), as a run on two ranks leaves them behind.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use oxitron_trainer::config::{Config, Dtype};
use oxitron_trainer::run::RunPlan;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use support::{Fixture, ONE_STAGE, run, start};

const RANKS: usize = 2;

/// A trace as its viewer reads it.
struct Trace {
    /// Tracks by thread number.
    tracks: BTreeMap<u64, String>,
    spans: Vec<Span>,
}

struct Span {
    track: String,
    name: String,
    category: String,
    /// Microseconds.
    begin: f64,
    end: f64,
    args: Value,
}

impl Trace {
    fn read(path: &Path, rank: u64) -> Self {
        let trace: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        let events = trace["traceEvents"].as_array().unwrap();
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let mut tracks = BTreeMap::new();
        let mut spans = Vec::new();
        for event in events {
            assert_eq!(event["pid"], rank);
            let thread = event["tid"].as_u64().unwrap();
            match (event["ph"].as_str().unwrap(), event["name"].as_str()) {
                ("M", Some("process_name")) => {
                    assert_eq!(event["args"]["name"], format!("rank {rank}"));
                }
                ("M", Some("thread_name")) => {
                    tracks.insert(thread, text(&event["args"]["name"]));
                }
                ("M", _) => {}
                ("X", Some(name)) => {
                    let begin = event["ts"].as_f64().unwrap();
                    spans.push(Span {
                        track: tracks[&thread].clone(),
                        name: name.to_owned(),
                        category: text(&event["cat"]),
                        begin,
                        end: begin + event["dur"].as_f64().unwrap(),
                        args: event["args"].clone(),
                    });
                }
                (phase, _) => panic!("an event of phase {phase}"),
            }
        }
        Self { tracks, spans }
    }

    fn of_category<'a>(&'a self, category: &'a str) -> impl Iterator<Item = &'a Span> {
        let is_wanted = move |span: &&Span| span.category == category;
        self.spans.iter().filter(is_wanted)
    }

    /// Names of the steps.
    fn steps(&self) -> Vec<&str> {
        let steps = self.of_category("step");
        steps.map(|span| span.name.as_str()).collect()
    }

    /// Every span lies inside the one around it or apart from it; operations lie in actions.
    fn assert_nested(&self) {
        for track in self.tracks.values() {
            let mut spans: Vec<_> = self.spans.iter().filter(|s| s.track == *track).collect();
            // A stable sort: of spans that coincide the outer one comes first in the file.
            spans.sort_by(|a, b| a.begin.total_cmp(&b.begin).then(b.end.total_cmp(&a.end)));
            let mut around: Vec<&Span> = Vec::new();
            for span in spans {
                while around.last().is_some_and(|outer| outer.end <= span.begin) {
                    around.pop();
                }
                let outer = around.last();
                if let Some(outer) = outer {
                    assert!(
                        span.end <= outer.end,
                        "{}: {} ends after {}",
                        track,
                        span.name,
                        outer.name
                    );
                }
                if span.category == "operation" {
                    let outer = outer.map_or("nothing", |outer| &outer.category);
                    assert!(
                        ["forward", "recompute", "backward", "evaluate"].contains(&outer),
                        "{} in {outer}",
                        span.name
                    );
                }
                around.push(span);
            }
        }
    }
}

fn launch(fixture: &Fixture, extra: &str, sets: &[&str]) {
    let config = fixture.config(extra);
    let ranks = RANKS.to_string();
    let mut args = vec!["launch", config.to_str().unwrap(), "--ranks", &ranks];
    for set in sets {
        args.extend(["--set", set]);
    }
    run(&args).done();
}

/// The figure of each step, as its text stands in the file.
fn figures(fixture: &Fixture, key: &str) -> Vec<Value> {
    let records = fixture.metrics();
    records.iter().map(|record| record[key].clone()).collect()
}

#[test]
fn every_rank_traces_the_steps_that_were_asked_for() {
    let fixture = Fixture::new();
    launch(&fixture, ONE_STAGE, &["stage.0.micro_batch=1"]);
    let untraced = [figures(&fixture, "loss"), figures(&fixture, "grad_norm")];
    let folder = fixture.path("run/trace");
    assert!(!folder.exists(), "a trace that nobody asked for");

    fs::remove_dir_all(fixture.run_dir()).unwrap();
    let sets = [
        "stage.0.micro_batch=1",
        "run.trace_steps=[2,3]",
        "parallel.recompute=full",
    ];
    launch(&fixture, ONE_STAGE, &sets);
    let traced = [figures(&fixture, "loss"), figures(&fixture, "grad_norm")];
    assert_eq!(untraced, traced, "tracing has changed the results");

    let sets = sets.map(str::to_owned);
    let config = Config::load(&fixture.path("config.toml"), &sets).unwrap();
    let plan = RunPlan::new(&config, RANKS, RANKS).unwrap();
    let steps = 2;
    let micro_batches = steps * plan.shapes[0].accumulation;
    assert_eq!(micro_batches, 4);
    let wire = config.parallel.grad_reduce_dtype;
    let planned = plan.traffic(0, Dtype::Fp32, wire).total() * steps;

    for rank in 0..RANKS {
        let trace = Trace::read(&folder.join(format!("rank-{rank:04}.json")), rank as u64);
        let tracks: Vec<_> = trace.tracks.values().collect();
        assert_eq!(
            tracks,
            [
                "compute",
                "waits",
                "shard lane",
                "replica lane",
                "world lane"
            ]
        );
        assert_eq!(trace.steps(), ["step 2", "step 3"]);
        trace.assert_nested();

        let count = |category, layer: &str| {
            let spans = trace.of_category(category);
            let of_layer = spans.filter(|span| span.args["layer"] == layer);
            of_layer.count()
        };
        for layer in ["embedding", "block.0", "block.1", "head"] {
            assert_eq!(count("forward", layer), micro_batches, "forward {layer}");
            assert_eq!(count("backward", layer), micro_batches, "backward {layer}");
        }
        assert!(count("recompute", "block.0") > 0);

        // Every block has four linear operations, each with two gradients.
        let named = |name: &str| {
            trace
                .of_category("operation")
                .filter(|s| s.name == name)
                .count()
        };
        assert_eq!(named("linear dgrad"), micro_batches * 8);
        assert_eq!(named("linear wgrad"), micro_batches * 8);
        assert_eq!(named("attention backward"), micro_batches * 2);
        assert_eq!(named("head"), micro_batches);
        assert_eq!(
            trace.of_category("optimizer").count(),
            steps * plan.map.pieces().len()
        );
        assert_eq!(
            trace.of_category("control").count(),
            steps * 2,
            "action and collective"
        );

        let bytes: u64 = ["gather", "reduce", "replicate"]
            .into_iter()
            .flat_map(|category| trace.of_category(category))
            .map(|span| span.args["bytes_sent"].as_u64().unwrap())
            .sum();
        assert_eq!(bytes as usize, planned, "bytes of rank {rank}");

        if rank == 0 {
            let waited: f64 = trace
                .of_category("wait")
                .map(|span| (span.end - span.begin) / 1e6)
                .sum();
            let exposed: f64 = figures(&fixture, "exposed_comm_seconds")[1..3]
                .iter()
                .map(|seconds| seconds.as_f64().unwrap())
                .sum();
            assert!(
                (waited - exposed).abs() <= 1e-4,
                "waits of {waited} s, exposed {exposed} s"
            );
        }
    }
    assert_eq!(fs::read_dir(&folder).unwrap().count(), RANKS);

    // Ranks of one machine share a time: their control reductions overlap.
    let [first, second] = [0, 1].map(|rank| {
        let path = folder.join(format!("rank-{rank:04}.json"));
        let trace = Trace::read(&path, rank);
        let mut world = trace.spans.iter().filter(|s| s.track == "world lane");
        let span = world.next().unwrap();
        (span.begin, span.end)
    });
    let apart = first.0.max(second.0) - first.1.min(second.1);
    assert!(apart < 1e3, "{apart} µs apart");
}

/// A run that is stopped before the last step to be traced leaves a whole file, and a later attempt
/// leaves its own beside it.
#[test]
fn a_trace_ends_with_its_run_and_attempts_do_not_share_a_file() {
    let fixture = Fixture::new();
    let config = fixture.config(ONE_STAGE);
    let train = ["train", config.to_str().unwrap()];
    let long = ["--set", "stage.0.steps=200", "--set"];
    let running = start(&[&train[..], &long, &["run.trace_steps=[2,1000]"]].concat());
    let began = Instant::now();
    let folder = fixture.path("run/trace");
    while fs::read_dir(&folder).is_err() {
        assert!(began.elapsed() < Duration::from_secs(60), "no trace begins");
        std::thread::sleep(Duration::from_millis(1));
    }
    let stopped = Pid::from_raw(running.child.id() as i32).unwrap();
    kill_process(stopped, Signal::TERM).unwrap();
    assert_eq!(running.wait().code, Some(75));
    run(&[&train[..], &long, &["run.trace_steps=[199,200]"]].concat()).done();

    let read = |name: &str| {
        let trace = Trace::read(&folder.join(name), 0);
        trace.assert_nested();
        trace
    };
    let first = read("rank-0000.json");
    let steps = first.steps();
    assert!(!steps.is_empty() && steps.len() < 190, "{steps:?}");
    assert_eq!(steps[0], "step 2");
    let second = read("rank-0000-attempt-2.json");
    assert_eq!(second.steps(), ["step 199", "step 200"]);
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 2);
    // A rank alone has nothing to send.
    assert_eq!(first.of_category("reduce").count(), 0);
}

#[test]
fn what_happens_between_traced_steps_is_traced_too() {
    let fixture = Fixture::new();
    let between = "[validation]\nfraction = 0.1\nevery_steps = 2\nbatches = 1\n\
                   [checkpoint]\nevery_steps = 2\n[guard]\nreplica_check_steps = 2\n";
    launch(
        &fixture,
        &format!("{between}{ONE_STAGE}"),
        &["run.trace_steps=[2,3]"],
    );
    let trace = Trace::read(&fixture.path("run/trace/rank-0001.json"), 1);
    trace.assert_nested();
    let notes = ["replica check", "validation", "save", "data"];
    let counts = notes.map(|kind| trace.of_category(kind).count());
    assert_eq!(counts, [1, 1, 1, 2]);
    assert!(trace.of_category("evaluate").count() > 0);
}
