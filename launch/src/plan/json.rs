//! A plan as one JSON object. Sizes are bytes of one rank, and keys say so.

use oxitron_trainer::plan::{Action, Mesh};
use serde_json::{Map, Value, json};

use super::actions::{self, Line};
use oxitron_trainer::config::Recompute;

use super::{Report, Stage, dtype_name};

/// Everything that is printed for people, and nothing else.
pub fn describe(report: &Report) -> Value {
    let Report { config, plan, .. } = report;
    let mesh = &plan.layout.mesh;
    let stages: Vec<Value> = (0..report.stages.len())
        .map(|index| stage(report, index))
        .collect();
    let mut object = json!({
        "name": config.run.name,
        "ranks": report.ranks,
        "ranks_per_node": report.ranks_per_node,
        "parameters": plan.units.parameters(),
        "dtype": dtype_name(report.dtype),
        "dtype_reason": report.dtype_reason,
        "residual_dtype": dtype_name(config.model.residual_dtype),
        "grad_reduce_dtype": dtype_name(config.parallel.grad_reduce_dtype),
        "zero_stage": config.parallel.zero_stage,
        "mesh": mesh_axes(mesh),
        "shard_groups": mesh.replicate,
        "first_shard_group": mesh.shard_group(0),
        "replica_groups": mesh.shard,
        "first_replica_group": mesh.replica_group(0),
        "device": if report.on_gpu() { "cuda" } else { "cpu" },
        "cluster": report.cluster.as_ref().map(|cluster| &cluster.name),
        "memory_bytes": report.memory,
        "floor_bytes": report.stages.first().map(|stage| stage.figures.traffic.floor()),
        "stages": stages,
    });
    if report.list_actions {
        object["opening_actions"] = list(report, &plan.opening());
    }
    object
}

fn mesh_axes(mesh: &Mesh) -> Value {
    json!({
        "replicate": mesh.replicate,
        "shard": mesh.shard,
        "cp": mesh.cp,
        "tp": mesh.tp,
        "pp": mesh.pp,
        "ep": mesh.ep,
    })
}

fn stage(report: &Report, index: usize) -> Value {
    let config = &report.config.stages[index];
    let stage = &report.stages[index];
    let Stage {
        figures, seconds, ..
    } = stage;
    let (state, activations, traffic) = (figures.state, figures.activations, figures.traffic);
    let actions = report.plan.step(index);
    let mut object = json!({
        "name": config.name,
        "seq_len": config.seq_len,
        "batch_tokens": config.batch_tokens,
        "batch_samples": config.samples_per_batch(),
        "micro_batch": figures.micro_batch,
        "micro_batch_tokens": figures.micro_batch * config.seq_len,
        "accumulation": figures.accumulation,
        "recompute": report.plan.shapes[index].recompute.name(),
        "weights_bytes": state.weights,
        "gradients_bytes": state.gradients,
        "master_bytes": state.master,
        "moments_bytes": state.moments,
        "buffers_bytes": state.buffers,
        "passing_bytes": state.passing,
        "state_bytes": state.total(),
        "staging_bytes": figures.staging,
        "inputs_bytes": figures.inputs,
        "libraries_bytes": figures.libraries,
        "activations_bytes": activations.total(),
        "activations_kept_bytes": activations.kept,
        "activations_shared_bytes": activations.shared,
        "activations_workspace_bytes": activations.workspace,
        "activations_by_recompute_bytes":
            by_recompute(|index| figures.alternatives[index].total().into()),
        "device_bytes": figures.device(),
        "host_bytes": figures.host(),
        "total_bytes": figures.total(),
        "fits": report.fits(stage),
        "reduce_bytes": traffic.reduce,
        "gather_bytes": traffic.gather,
        "replicate_bytes": traffic.replicate,
        "control_bytes": figures.control,
        "sent_bytes": figures.sent(),
        "floor_bytes": traffic.floor(),
        "shard_lane_seconds": seconds.map(|seconds| seconds.shard),
        "replica_lane_seconds": seconds.map(|seconds| seconds.replica),
        "floor_seconds": seconds.map(|seconds| seconds.floor),
        "action_counts": counts(report, &actions),
    });
    if let Some(largest) = stage.largest {
        object["largest_micro_batch"] = by_recompute(|index| largest[index].unwrap_or(0).into());
    }
    if report.list_actions {
        object["actions"] = list(report, &actions);
    }
    object
}

/// A value for each setting of `recompute`, by its position.
fn by_recompute(value: impl Fn(usize) -> Value) -> Value {
    let entry =
        |(index, recompute): (usize, Recompute)| (recompute.name().to_owned(), value(index));
    let entries = Recompute::ALL.into_iter().enumerate();
    Value::Object(entries.map(entry).collect())
}

fn lines(report: &Report, actions: &[Action]) -> Vec<Line> {
    let (units, map) = (&report.plan.units, &report.plan.map);
    let line = |&action: &Action| Line::new(action, units, map);
    actions.iter().map(line).collect()
}

fn counts(report: &Report, actions: &[Action]) -> Value {
    let counts = actions::counts(&lines(report, actions));
    let entry = |(verb, count): (&str, usize)| (verb.to_owned(), json!(count));
    Value::Object(counts.into_iter().map(entry).collect::<Map<_, _>>())
}

fn list(report: &Report, actions: &[Action]) -> Value {
    let line = |line: Line| {
        let mut object = Map::new();
        object.insert("action".to_owned(), json!(line.verb));
        if !line.object.is_empty() {
            object.insert("of".to_owned(), json!(line.object));
        }
        if let Some(micro_batch) = line.micro_batch {
            object.insert("micro_batch".to_owned(), json!(micro_batch));
        }
        if !line.remark.is_empty() {
            object.insert("remark".to_owned(), json!(line.remark));
        }
        Value::Object(object)
    };
    Value::Array(lines(report, actions).into_iter().map(line).collect())
}
