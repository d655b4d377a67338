//! Bytes that a rank sends.

use super::action::{Action, Exchange};
use super::layout::Layout;
use super::shards::ShardMap;

/// Bytes per element on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WireBytes {
    /// Of a weight: the compute dtype.
    pub weight: usize,
    /// Of a gradient, into slices and between replicas: `grad_reduce_dtype`.
    pub gradient: usize,
}

/// Bytes that one rank sends in a step, by lane.
///
/// With P parameters in shard groups of S with R replicas, a micro-batches where gradients are held
/// as slices (else a = 1) and g gathers of each weight (1; about 2a where weights are held as
/// slices) these are (S-1)/S · P · a · gradient, (S-1)/S · P · g · weight and
/// 2(R-1)/R · P/S · gradient.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepTraffic {
    /// Reduce-scatters in the shard group.
    pub reduce: usize,
    /// All-gathers in the shard group.
    pub gather: usize,
    /// All-reduces in the replica group.
    pub replicate: usize,
    /// Of the reduce-scatters, those of gradients that are complete only when nothing is left to
    /// compute: what no schedule can hide behind the backward pass.
    pub floor_reduce: usize,
    /// The same of the all-reduces.
    pub floor_replicate: usize,
}

impl StepTraffic {
    /// What the shard group's lane carries.
    pub fn shard_lane(&self) -> usize {
        self.reduce + self.gather
    }

    /// All of it.
    pub fn total(&self) -> usize {
        self.shard_lane() + self.replicate
    }

    /// What no schedule can hide behind the backward pass.
    pub fn floor(&self) -> usize {
        self.floor_reduce + self.floor_replicate
    }
}

/// The traffic of `actions`.
pub fn step_traffic(
    map: &ShardMap,
    layout: &Layout,
    actions: &[Action],
    wire: WireBytes,
) -> StepTraffic {
    let (shard, replicate) = (layout.mesh.shard, layout.mesh.replicate);
    let computes = |action: &Action| {
        matches!(
            action,
            Action::Forward { .. } | Action::Recompute { .. } | Action::Backward { .. }
        )
    };
    let last_compute = actions.iter().rposition(computes).unwrap_or(0);
    let mut traffic = StepTraffic::default();
    for (index, action) in actions.iter().enumerate() {
        let Action::Exchange(exchange) = *action else {
            continue;
        };
        let exposed = index > last_compute;
        match exchange {
            Exchange::Gather { piece } => {
                traffic.gather += map.slice(piece, 0).len() * (shard - 1) * wire.weight;
            }
            Exchange::Reduce { piece, .. } => {
                let bytes = map.slice(piece, 0).len() * (shard - 1) * wire.gradient;
                traffic.reduce += bytes;
                if exposed {
                    traffic.floor_reduce += bytes;
                }
            }
            Exchange::Replicate { piece } => {
                // Sent once to be summed and once as the sum.
                let slice = map.slice(piece, 0).len();
                let bytes = 2 * slice * (replicate - 1) / replicate * wire.gradient;
                traffic.replicate += bytes;
                if exposed {
                    traffic.floor_replicate += bytes;
                }
            }
            _ => {}
        }
    }
    traffic
}
