//! Traces: what a rank did when, in the trace-event format that Perfetto and `chrome://tracing`
//! show.
//!
//! Format: "Trace Event Format", the object form with `traceEvents`; a span is a complete event
//! (`"ph": "X"`) with `ts` and `dur` in microseconds, a process is a rank, a thread is a [`Track`].
//! Spans of one track must lie apart or inside one another, which is what a viewer stacks.

use std::cmp::Reverse;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::MetricsError;

/// A row of the timeline of a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Track {
    /// What the step does: steps, actions in them, operations in those.
    Compute,
    /// When the step waited for a lane and did nothing else, and for what.
    Waits,
    /// Collectives of the shard group.
    ShardLane,
    /// Collectives of the replica group.
    ReplicaLane,
    /// Collectives of all ranks.
    WorldLane,
}

impl Track {
    /// All of them, from top to bottom.
    pub const ALL: [Self; 5] = [
        Self::Compute,
        Self::Waits,
        Self::ShardLane,
        Self::ReplicaLane,
        Self::WorldLane,
    ];

    /// What the viewer calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Compute => "compute",
            Self::Waits => "waits",
            Self::ShardLane => "shard lane",
            Self::ReplicaLane => "replica lane",
            Self::WorldLane => "world lane",
        }
    }

    /// Thread number in the file. Viewers give number 0 a meaning of its own.
    fn thread(self) -> u32 {
        self as u32 + 1
    }
}

/// Something that took time.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// Where it is shown.
    pub track: Track,
    /// Its label. Viewers add up spans of one name.
    pub name: String,
    /// What kind of thing it is, for filters and colours.
    pub category: &'static str,
    /// Nanoseconds since the origin of the trace.
    pub begin: i64,
    /// Nanoseconds since the origin of the trace, not before `begin`.
    pub end: i64,
    /// What the viewer shows beside it.
    pub args: Vec<(&'static str, Value)>,
}

/// The trace of one rank while it is written.
///
/// It has a temporary name until it is whole, and holds nothing in memory but a write buffer.
#[derive(Debug)]
pub struct TraceFile {
    path: PathBuf,
    part: PathBuf,
    out: BufWriter<File>,
    rank: usize,
}

#[derive(Serialize)]
struct CompleteEvent<'a> {
    name: &'a str,
    cat: &'a str,
    ph: &'static str,
    ts: f64,
    dur: f64,
    pid: usize,
    tid: u32,
    args: Map<String, Value>,
}

impl TraceFile {
    /// Begins the trace of `rank`, which will be at `path` when it is finished. Folders are made
    /// where needed. Spans count from `origin_unix_seconds`.
    ///
    /// # Errors
    /// A folder or file that cannot be made or written.
    pub fn create(
        path: &Path,
        rank: usize,
        origin_unix_seconds: f64,
    ) -> Result<Self, MetricsError> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(MetricsError::io(folder, "create the folder"))?;
        }
        let mut part = path.as_os_str().to_owned();
        part.push(".part");
        let part = PathBuf::from(part);
        let file = File::create(&part).map_err(MetricsError::io(&part, "create the trace"))?;
        let mut trace = Self {
            path: path.to_owned(),
            part,
            out: BufWriter::new(file),
            rank,
        };
        let head = trace.write_head(origin_unix_seconds);
        head.map_err(MetricsError::io(&trace.part, "write the trace"))?;
        Ok(trace)
    }

    fn write_head(&mut self, origin_unix_seconds: f64) -> io::Result<()> {
        let about = json!({ "rank": self.rank, "origin_unix_seconds": origin_unix_seconds });
        write!(self.out, "{{\"displayTimeUnit\":\"ms\",\"otherData\":")?;
        serde_json::to_writer(&mut self.out, &about)?;
        writeln!(self.out, ",\"traceEvents\":[")?;
        let name = |tid: u32, what: &str, args: Value| json!({ "name": what, "ph": "M", "pid": self.rank, "tid": tid, "args": args });
        let mut lines = vec![
            name(
                0,
                "process_name",
                json!({ "name": format!("rank {}", self.rank) }),
            ),
            name(0, "process_sort_index", json!({ "sort_index": self.rank })),
        ];
        for track in Track::ALL {
            let tid = track.thread();
            lines.push(name(tid, "thread_name", json!({ "name": track.name() })));
            lines.push(name(tid, "thread_sort_index", json!({ "sort_index": tid })));
        }
        // Events are separated in front of each but the first.
        for (index, line) in lines.iter().enumerate() {
            self.out.write_all(if index == 0 { b"" } else { b",\n" })?;
            serde_json::to_writer(&mut self.out, line)?;
        }
        Ok(())
    }

    /// Writes spans, in whatever order they come, and leaves `spans` empty.
    ///
    /// # Errors
    /// A file that cannot be written, for instance because the disk is full.
    pub fn append(&mut self, spans: &mut Vec<Span>) -> Result<(), MetricsError> {
        // Of spans that begin together the outer one comes first, or a viewer would take it for
        // the inner one. The sort keeps the order of equals.
        spans.sort_by_key(|span| (span.track, span.begin, Reverse(span.end)));
        let mut write = || {
            for span in spans.drain(..) {
                let (ts, end) = (microseconds(span.begin), microseconds(span.end));
                let args = span.args.into_iter();
                let event = CompleteEvent {
                    name: &span.name,
                    cat: span.category,
                    ph: "X",
                    ts,
                    dur: end - ts,
                    pid: self.rank,
                    tid: span.track.thread(),
                    args: args.map(|(key, value)| (key.to_owned(), value)).collect(),
                };
                self.out.write_all(b",\n")?;
                serde_json::to_writer(&mut self.out, &event)?;
            }
            Ok(())
        };
        write().map_err(MetricsError::io(&self.part, "write the trace"))
    }

    /// Ends the file and gives it its name.
    ///
    /// # Errors
    /// A file that cannot be written or renamed.
    pub fn finish(mut self) -> Result<PathBuf, MetricsError> {
        let ended = self
            .out
            .write_all(b"\n]}\n")
            .and_then(|()| self.out.flush());
        ended.map_err(MetricsError::io(&self.part, "write the trace"))?;
        fs::rename(&self.part, &self.path)
            .map_err(MetricsError::io(&self.path, "name the trace"))?;
        Ok(self.path)
    }
}

/// Microseconds in whole eighths, rounded down: exact in binary, so that a span that ends with
/// another still does so after a viewer has added `ts` and `dur`.
fn microseconds(nanoseconds: i64) -> f64 {
    nanoseconds.div_euclid(125) as f64 / 8.0
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    fn span(track: Track, name: &str, begin: i64, end: i64) -> Span {
        Span {
            track,
            name: name.to_owned(),
            category: "test",
            begin,
            end,
            args: vec![("piece", json!("head 1/4"))],
        }
    }

    fn written(batches: Vec<Vec<Span>>) -> Value {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace/rank-0003.json");
        let mut file = TraceFile::create(&path, 3, 1.5).unwrap();
        for mut batch in batches {
            file.append(&mut batch).unwrap();
            assert!(batch.is_empty());
        }
        assert!(!path.exists(), "it has its name only when it is whole");
        assert_eq!(file.finish().unwrap(), path);
        let trace = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        trace
    }

    fn events<'a>(trace: &'a Value, phase: &str) -> Vec<&'a Value> {
        let events = trace["traceEvents"].as_array().unwrap().iter();
        events.filter(|event| event["ph"] == phase).collect()
    }

    #[test]
    fn a_trace_names_its_rank_and_tracks() {
        let trace = written(vec![]);
        assert_eq!(trace["otherData"]["origin_unix_seconds"], 1.5);
        assert!(events(&trace, "X").is_empty());
        let names: Vec<_> = events(&trace, "M")
            .into_iter()
            .filter(|event| event["name"] == "process_name" || event["name"] == "thread_name")
            .map(|event| event["args"]["name"].as_str().unwrap())
            .collect();
        assert_eq!(
            names,
            [
                "rank 3",
                "compute",
                "waits",
                "shard lane",
                "replica lane",
                "world lane"
            ]
        );
    }

    #[test]
    fn spans_come_back_with_the_outer_one_first() {
        let inner = span(Track::Compute, "rope", 1_000, 2_000);
        let outer = span(Track::Compute, "forward", 1_000, 3_125);
        let wait = span(Track::Waits, "wait", -250, 0);
        let trace = written(vec![vec![inner, outer], vec![wait]]);
        let found: Vec<_> = events(&trace, "X")
            .into_iter()
            .map(|event| {
                let number = |key: &str| event[key].as_f64().unwrap();
                assert_eq!(event["pid"], 3);
                assert_eq!(event["args"]["piece"], "head 1/4");
                (event["name"].as_str().unwrap(), number("ts"), number("dur"))
            })
            .collect();
        assert_eq!(
            found,
            [
                ("forward", 1.0, 2.125),
                ("rope", 1.0, 1.0),
                ("wait", -0.25, 0.25)
            ]
        );
    }

    proptest! {
        #[test]
        fn rounding_keeps_spans_inside_each_other(
            start in 0i64..1 << 60,
            cuts in prop::collection::vec(0i64..100_000, 3),
        ) {
            // An outer span with two inner ones back to back that fill it.
            let mut at: Vec<i64> = cuts.iter().map(|cut| start + cut).collect();
            at.sort_unstable();
            let [begin, middle, end] = [at[0], at[1], at[2]].map(microseconds);
            prop_assert!(begin + (middle - begin) <= middle);
            prop_assert!(middle + (end - middle) <= begin + (end - begin));
        }
    }
}
