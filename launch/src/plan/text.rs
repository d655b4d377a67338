//! A plan for people: who, how much memory, how many bytes, in which order.

use oxitron_trainer::config::Recompute;
use oxitron_trainer::metrics::units::{bytes, grouped};
use oxitron_trainer::metrics::{Align, Table};
use oxitron_trainer::plan::{Action, Holding};

use super::actions::{self, Line};
use super::summary::summary;
use super::{Report, Seconds, Stage, dtype_name};

/// The whole plan as lines.
pub fn describe(report: &Report) -> String {
    let mut text = head(report);
    text += &format!("\n{}\n", figures(report));
    text += &notes(report);
    let opening = report.plan.opening();
    if report.list_actions && !opening.is_empty() {
        text += "\nbefore the first step:\n";
        text += &indented(&actions::list(&lines(report, &opening)));
    }
    let mut before = None;
    for (index, stage) in report.config.stages.iter().enumerate() {
        let actions = report.plan.step(index);
        if before.as_ref() == Some(&actions) {
            text += &format!("\na step of stage \"{}\": the same\n", stage.name);
            continue;
        }
        let lines = lines(report, &actions);
        let counts = actions::counts(&lines);
        let counts = counts.iter().map(|(verb, count)| format!("{count} {verb}"));
        let counts = counts.collect::<Vec<_>>().join(", ");
        text += &format!("\na step of stage \"{}\": {counts}\n", stage.name);
        text += &indented(&if report.list_actions {
            actions::list(&lines)
        } else {
            summary(&lines)
        });
        before = Some(actions);
    }
    text
}

/// Model, ranks and groups.
fn head(report: &Report) -> String {
    let Report {
        config,
        plan,
        ranks,
        ..
    } = report;
    let (mesh, parallel) = (&plan.layout.mesh, &config.parallel);
    let reason = match &report.dtype_reason {
        Some(reason) => format!(" (auto, on this machine: {reason})"),
        None => String::new(),
    };
    let mut text = format!(
        "run       {}: {} parameters in {}{reason}, residual stream in {}\n",
        config.run.name,
        grouped(plan.units.parameters() as u64),
        dtype_name(report.dtype),
        dtype_name(config.model.residual_dtype),
    );
    text += &format!(
        "ranks     {ranks} on {}, {} per node; zero_stage {}, overlap {}, prefetch_units {}\n",
        if report.on_gpu() {
            "GPUs"
        } else {
            "processors"
        },
        report.ranks_per_node,
        parallel.zero_stage,
        if parallel.overlap { "on" } else { "off" },
        parallel.prefetch_units,
    );
    let group = |name: &str, count: usize, first: &[usize], what: &str| {
        let groups = if count == 1 { "group" } else { "groups" };
        let size = first.len();
        format!(
            "{name:<9} {count} {groups} of {size}, the first {}: {what}\n",
            shown(first)
        )
    };
    let (shard, replica) = (mesh.shard_group(0), mesh.replica_group(0));
    text += &group(
        "shard",
        mesh.replicate,
        &shard,
        "together one copy of the sharded state",
    );
    text += &group("replica", mesh.shard, &replica, "the same slices");
    if let Some(cluster) = &report.cluster {
        text += &format!(
            "cluster   {}: a rank sends {} inside a node, {} between nodes\n",
            cluster.name,
            rate(cluster.bytes_per_second_in_node),
            rate(cluster.bytes_per_second_between_nodes),
        );
    }
    text
}

/// A group of ranks, `0-7` or `0, 8 … 56`.
fn shown(group: &[usize]) -> String {
    match group {
        [only] => format!("rank {only}"),
        [first, .., last] if last - first + 1 == group.len() => format!("ranks {first}-{last}"),
        [first, second, .., last] if group.len() > 3 => format!("ranks {first}, {second} … {last}"),
        _ => {
            let ranks: Vec<String> = group.iter().map(usize::to_string).collect();
            format!("ranks {}", ranks.join(", "))
        }
    }
}

/// The table of all stages, a column for each.
fn figures(report: &Report) -> Table {
    let stages = &report.stages;
    let names = report.config.stages.iter().map(|stage| stage.name.as_str());
    let mut columns = vec![("stage", Align::Left), ("", Align::Left)];
    columns.extend(names.map(|name| (name, Align::Right)));
    let mut table = Table::new(&columns);
    let mut row = |name: &str, how: &str, cell: &dyn Fn(usize) -> String| {
        let cells = (0..stages.len()).map(cell);
        table.row([name.to_owned(), how.to_owned()].into_iter().chain(cells));
    };
    let size = |of: fn(&Stage) -> usize| move |index: usize| bytes(of(&stages[index]) as u64);
    let config = |index: usize| &report.config.stages[index];

    row("seq_len", "tokens", &|i| grouped(config(i).seq_len as u64));
    row("global batch", "samples", &|i| {
        grouped(config(i).samples_per_batch() as u64)
    });
    row("micro-batch", "samples", &|i| {
        grouped(stages[i].figures.micro_batch as u64)
    });
    row("accumulation", "a", &|i| {
        grouped(stages[i].figures.accumulation as u64)
    });

    let formulas = Formulas::new(report);
    row("", "", &|_| String::new());
    let offloaded = stages.iter().any(|stage| stage.figures.state.passing > 0);
    let place = if report.on_gpu() {
        "GPU memory of a rank"
    } else {
        "memory of a rank"
    };
    row(place, "", &|_| String::new());
    row(
        "  weights",
        &formulas.weights,
        &size(|stage| stage.figures.state.weights),
    );
    row(
        "  gradients",
        &formulas.gradients,
        &size(|stage| stage.figures.state.gradients),
    );
    let optimizer = |row: &mut Row<'_>| {
        row(
            "  master weights",
            &formulas.master,
            &size(|stage| stage.figures.state.master),
        );
        row(
            "  moments",
            &formulas.moments,
            &size(|stage| stage.figures.state.moments),
        );
    };
    let staging = |row: &mut Row<'_>| {
        row(
            "  staging",
            "saves, in the background",
            &size(|stage| stage.figures.staging),
        );
    };
    if !offloaded {
        optimizer(&mut row);
    }
    row(
        "  buffers",
        "units held for a while",
        &size(|stage| stage.figures.state.buffers),
    );
    if offloaded {
        row(
            "  buffers",
            "state that passes through",
            &size(|stage| stage.figures.state.passing),
        );
    }
    if !report.on_gpu() {
        staging(&mut row);
    }
    row("  tokens, RoPE", "", &size(|stage| stage.figures.inputs));
    if report.on_gpu() {
        row("  cuBLAS", "", &size(|stage| stage.figures.libraries));
    }
    let how = |recompute: Recompute| format!("recompute {recompute}");
    let chosen = report.config.parallel.recompute;
    row(
        "  activations",
        &how(chosen),
        &size(|stage| stage.figures.activations.total()),
    );
    row("  together", "", &size(|stage| stage.figures.device()));
    for (which, other) in Recompute::ALL.into_iter().enumerate() {
        if other != chosen {
            row("  (activations)", &how(other), &|i| {
                bytes(stages[i].figures.alternatives[which].total() as u64)
            });
        }
    }
    if let Some(memory) = report.memory {
        let memory = format!("in {}", bytes(memory as u64));
        row("  fits", &memory, &|i| match report.fits(&stages[i]) {
            Some(false) => "NO".to_owned(),
            _ => "yes".to_owned(),
        });
        for (which, recompute) in Recompute::ALL.into_iter().enumerate() {
            let name = if which == 0 {
                "  largest micro-batch"
            } else {
                ""
            };
            row(name, &how(recompute), &|i| {
                let fitting = stages[i].largest.and_then(|largest| largest[which]);
                fitting.map_or("none".to_owned(), |samples| grouped(samples as u64))
            });
        }
    }
    if report.on_gpu() {
        row("", "", &|_| String::new());
        row("host memory of a rank", "", &|_| String::new());
        if offloaded {
            optimizer(&mut row);
        }
        staging(&mut row);
        row("  together", "", &size(|stage| stage.figures.host()));
    }

    row("", "", &|_| String::new());
    row("sent by a rank in a step", "", &|_| String::new());
    row(
        "  reduce",
        &formulas.reduce,
        &size(|stage| stage.figures.traffic.reduce),
    );
    row(
        "  gather",
        &formulas.gather,
        &size(|stage| stage.figures.traffic.gather),
    );
    row(
        "  replicate",
        &formulas.replicate,
        &size(|stage| stage.figures.traffic.replicate),
    );
    row(
        "  control",
        "48 bytes, all ranks",
        &size(|stage| stage.figures.control),
    );
    row("  together", "", &size(|stage| stage.figures.sent()));
    row(
        "  floor",
        "nothing left to compute",
        &size(|stage| stage.figures.traffic.floor()),
    );
    if report.cluster.is_some() {
        let time = |i: usize, of: fn(Seconds) -> f64| {
            stages[i]
                .seconds
                .map_or(String::new(), |seconds| duration(of(seconds)))
        };
        row("", "", &|_| String::new());
        row("time on the wire", "", &|_| String::new());
        row("  shard lane", "reduce and gather", &|i| {
            time(i, |seconds| seconds.shard)
        });
        row("  replica lane", "replicate", &|i| {
            time(i, |seconds| seconds.replica)
        });
        row("  floor", "", &|i| time(i, |seconds| seconds.floor));
    }
    table
}

/// Adds a row: what, where it comes from, and a cell for each stage.
type Row<'a> = dyn FnMut(&str, &str, &dyn Fn(usize) -> String) + 'a;

/// Where the larger figures come from: P parameters, a micro-batches per step.
struct Formulas {
    weights: String,
    gradients: String,
    master: String,
    moments: String,
    reduce: String,
    gather: String,
    replicate: String,
}

impl Formulas {
    fn new(report: &Report) -> Self {
        let layout = &report.plan.layout;
        let (shard, replicas) = (layout.mesh.shard, layout.mesh.replicate);
        let width = |dtype| match dtype_name(dtype) {
            "bf16" => 2,
            _ => 4,
        };
        let weight = width(report.dtype);
        let gradient = width(report.config.parallel.grad_reduce_dtype);
        let slice = |bytes: usize, holding: Holding| match holding {
            Holding::Slices => format!("{bytes} P / {shard}"),
            Holding::Whole => format!("{bytes} P"),
        };
        let sent = |factor: String, members: usize| match members {
            1 => "a group of one".to_owned(),
            _ => factor,
        };
        let accumulated = match layout.gradients {
            Holding::Slices => " a",
            Holding::Whole => "",
        };
        let gathers = match layout.weights {
            Holding::Slices => " g",
            Holding::Whole => "",
        };
        let others = shard - 1;
        Self {
            weights: slice(weight, layout.weights),
            gradients: slice(4, layout.gradients),
            master: slice(4, Holding::Slices),
            moments: slice(2 * width(report.plan.moments), Holding::Slices),
            reduce: sent(
                format!("{gradient} P{accumulated} · {others}/{shard}"),
                shard,
            ),
            gather: sent(format!("{weight} P{gathers} · {others}/{shard}"), shard),
            replicate: sent(
                format!("4 P / {shard} · 2 · {}/{replicas}", replicas - 1),
                replicas,
            ),
        }
    }
}

/// What the table cannot say.
fn notes(report: &Report) -> String {
    let mut text = format!(
        "P = {} parameters; tensors are padded, so sizes are a little larger.",
        grouped(report.plan.units.parameters() as u64)
    );
    if report.plan.layout.weights == Holding::Slices {
        text += " g: gathers of each unit, about 2 a.";
    }
    let frozen: usize = {
        let tensors = report.plan.units.tensors();
        tensors
            .filter(|tensor| !tensor.trainable)
            .map(|tensor| tensor.len())
            .sum()
    };
    if frozen > 0 {
        text += &format!(
            " {} of them are frozen: only their\nweights are held, and travel with zero_stage 3 alone.",
            grouped(frozen as u64)
        );
    }
    text += if report.on_gpu() {
        "\nNot counted: the context of CUDA and its libraries' code (about half a GiB), NCCL's \
         buffers, what\nthe allocator keeps beside tensors (segments of 2 and 20 MiB; see Memory in \
         the book).\n"
    } else {
        "\nNot counted: the program and its libraries, the lanes' chunks under way.\n"
    };
    for (stage, config) in report.stages.iter().zip(&report.config.stages) {
        if report.fits(stage) == Some(false) {
            text += &format!(
                "Stage \"{}\" does not fit as it is configured: lower its micro_batch or set \
                 recompute = \"attention\" or \"full\".\n",
                config.name
            );
        }
    }
    text
}

/// Bytes per second in the decimal units of networks.
fn rate(bytes_per_second: f64) -> String {
    if bytes_per_second >= 1e9 {
        format!("{:.1} GB/s", bytes_per_second / 1e9)
    } else {
        format!("{:.1} MB/s", bytes_per_second / 1e6)
    }
}

/// Seconds, or thousandths of one where that is more readable.
fn duration(seconds: f64) -> String {
    if seconds >= 1.0 || seconds == 0.0 {
        format!("{seconds:.2} s")
    } else {
        format!("{:.2} ms", seconds * 1e3)
    }
}

fn lines(report: &Report, actions: &[Action]) -> Vec<Line> {
    let (units, map) = (&report.plan.units, &report.plan.map);
    let line = |&action: &Action| Line::new(action, units, map);
    actions.iter().map(line).collect()
}

fn indented(lines: &[String]) -> String {
    lines.iter().map(|line| format!("  {line}\n")).collect()
}
