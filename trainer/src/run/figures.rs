//! What a rank needs and sends in a stage, in bytes, and what of it fits into a given memory.

use super::{RunError, RunPlan, control::control_bytes, device::planned};
use crate::config::{Config, Dtype, Recompute, ShardSize};
use crate::metrics::units::bytes;
use crate::model::{ActivationBytes, activation_bytes};
use crate::plan::{StateBytes, StepTraffic};

/// Tokens, targets and positions of a micro-batch, `i64` each.
const BATCH_BYTES: usize = 3 * 8;

/// What a GPU needs of each token beside: its place among those of its id, `i32`, and at most another
/// number where those begin.
const OCCURRENCE_BYTES: usize = 2 * 4;

/// Micro-batches after which a step needs nothing that it has not needed before: there is a first,
/// one in between, and a last.
const DISTINCT_MICRO_BATCHES: usize = 3;

/// Workspace that libtorch gives cuBLAS on the stream that computes, on Hopper and newer; 8 MiB on
/// older GPUs.
const CUBLAS_BYTES: usize = 32 << 20;

/// A rank in one stage of context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StageFigures {
    /// Samples that a rank computes at once.
    pub micro_batch: usize,
    /// Micro-batches per rank and step.
    pub accumulation: usize,
    /// Weights, gradients, optimizer state.
    pub state: StateBytes,
    /// Memory that saves are copied to before they are written; 0 when they are not written in the
    /// background.
    pub staging: usize,
    /// Tokens of a step and the table of RoPE.
    pub inputs: usize,
    /// What libraries take from libtorch's allocator for themselves.
    pub libraries: usize,
    /// As configured.
    pub activations: ActivationBytes,
    /// With each setting of `recompute`, in the order of [`Recompute::ALL`].
    pub alternatives: [ActivationBytes; Recompute::ALL.len()],
    /// Whether a GPU computes, whose memory is not the host's.
    pub on_gpu: bool,
    /// What a rank sends per step in its shard group and in its replica group.
    pub traffic: StepTraffic,
    /// What a rank sends at most per step to agree with all ranks.
    pub control: usize,
}

impl StageFigures {
    /// All bytes of tensors on a rank.
    pub fn total(&self) -> usize {
        self.state.total() + self.staging + self.inputs + self.libraries + self.activations.total()
    }

    /// What of it lies in host memory beside a GPU; nothing where the host's memory is all there is.
    pub fn host(&self) -> usize {
        if self.on_gpu {
            self.staging + self.state.offloaded()
        } else {
            0
        }
    }

    /// What of it lies where the rank computes: this must fit into the memory of a rank.
    pub fn device(&self) -> usize {
        self.total() - self.host()
    }

    /// All bytes that a rank sends per step.
    pub fn sent(&self) -> usize {
        self.traffic.total() + self.control
    }
}

impl RunPlan {
    /// The figures of stage `stage` as configured, computed in `dtype`.
    pub fn figures(&self, config: &Config, stage: usize, dtype: Dtype) -> StageFigures {
        let micro_batch = config.stages[stage].micro_batch;
        let ranks = self.layout.mesh.world();
        let tokens = micro_batch * config.stages[stage].seq_len;
        let device = planned(config);
        let activations = |again| activation_bytes(&config.model, dtype, tokens, again, device);
        StageFigures {
            micro_batch,
            accumulation: self.shapes[stage].accumulation,
            state: self.state_bytes(stage, dtype),
            staging: self.staging_bytes(config),
            inputs: inputs(config, stage, micro_batch, ranks),
            libraries: if device.is_cuda() { CUBLAS_BYTES } else { 0 },
            activations: activations(self.shapes[stage].recompute),
            alternatives: Recompute::ALL.map(activations),
            on_gpu: device.is_cuda(),
            traffic: self.traffic(stage, dtype, config.parallel.grad_reduce_dtype),
            control: control_bytes(ranks),
        }
    }

    /// Bytes that a rank needs where it computes in stage `stage`, with micro-batches of
    /// `micro_batch` samples of which `recompute` says what is computed again.
    fn needed(
        &self,
        config: &Config,
        stage: usize,
        dtype: Dtype,
        micro_batch: usize,
        recompute: Recompute,
    ) -> usize {
        let ranks = self.layout.mesh.world();
        let tokens = micro_batch * config.stages[stage].seq_len;
        let mut other = self.clone();
        let shape = &mut other.shapes[stage];
        shape.recompute = recompute;
        shape.accumulation =
            accumulation(config, stage, micro_batch, ranks).min(DISTINCT_MICRO_BATCHES);
        let device = planned(config);
        let state = other.state_bytes(stage, dtype);
        let beside = match device.is_cuda() {
            true => state.total() - state.offloaded() + CUBLAS_BYTES,
            false => state.total() + self.staging_bytes(config),
        };
        beside
            + inputs(config, stage, micro_batch, ranks)
            + activation_bytes(&config.model, dtype, tokens, recompute, device).total()
    }

    /// The most samples that a rank can compute at once in `memory` bytes, no more than it has to
    /// compute in a step; `None` when not even one fits.
    pub fn largest_micro_batch(
        &self,
        config: &Config,
        stage: usize,
        dtype: Dtype,
        memory: usize,
        recompute: Recompute,
    ) -> Option<usize> {
        let fits = |samples| self.needed(config, stage, dtype, samples, recompute) <= memory;
        if !fits(1) {
            return None;
        }
        let samples = config.stages[stage].samples_per_batch();
        let most = samples.div_ceil(self.layout.mesh.world());
        // `low` fits, `high` does not or is not wanted.
        let (mut low, mut high) = (1, most + 1);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if fits(middle) {
                low = middle;
            } else {
                high = middle;
            }
        }
        Some(low)
    }

    /// The stage that needs most when it is asked for as little as possible, one sample at a time
    /// with recomputation, and what it needs.
    fn least(&self, config: &Config, dtype: Dtype) -> (usize, usize) {
        let needed = |stage| self.needed(config, stage, dtype, 1, Recompute::Full);
        // The first of equals: the last maximum from the other end.
        let stages = (0..config.stages.len()).rev();
        let stages = stages.map(|stage| (stage, needed(stage)));
        stages.max_by_key(|&(_, needed)| needed).unwrap_or((0, 0))
    }
}

fn accumulation(config: &Config, stage: usize, micro_batch: usize, ranks: usize) -> usize {
    let samples = config.stages[stage].samples_per_batch();
    samples.div_ceil(ranks.saturating_mul(micro_batch).max(1))
}

fn inputs(config: &Config, stage: usize, micro_batch: usize, ranks: usize) -> usize {
    let seq_len = config.stages[stage].seq_len;
    let samples = micro_batch * accumulation(config, stage, micro_batch, ranks);
    // A cosine and a sine for each pair of a head's elements.
    let rope = seq_len * config.model.head_dim * size_of::<f32>();
    let token = match planned(config).is_cuda() {
        true => BATCH_BYTES + OCCURRENCE_BYTES,
        false => BATCH_BYTES,
    };
    samples * seq_len * token + rope
}

/// Refuses a plan that does not fit into `memory` bytes per rank, however small its micro-batches.
///
/// # Errors
/// [`RunError::Plan`] with what is needed and the nearest settings that would fit.
pub fn check_memory(
    config: &Config,
    plan: &RunPlan,
    ranks_per_node: usize,
    dtype: Dtype,
    memory: usize,
) -> Result<(), RunError> {
    let (stage, needed) = plan.least(config, dtype);
    if needed <= memory {
        return Ok(());
    }
    let shown = |count: usize| bytes(count as u64);
    let state = plan.state_bytes(stage, dtype);
    let state = match planned(config).is_cuda() {
        true => state.total() - state.offloaded(),
        false => state.total(),
    };
    let fitting = fitting(
        config,
        plan.layout.mesh.world(),
        ranks_per_node,
        dtype,
        memory,
    );
    let help = if fitting.is_empty() {
        "neither zero_stage = 3 nor more ranks (as many as this batch has samples) would do; it \
         takes more memory or a smaller model"
            .to_owned()
    } else {
        let ways = fitting
            .into_iter()
            .map(|(way, bytes)| format!("{way} ({})", shown(bytes)));
        format!("what would fit: {}", ways.collect::<Vec<_>>().join(", or "))
    };
    Err(RunError::Plan(format!(
        "stage \"{}\": a rank needs {} ({} of state) even with micro_batch = 1 and recompute = \
         \"full\", and has {}; {help}",
        config.stages[stage].name,
        shown(needed),
        shown(state),
        shown(memory),
    )))
}

/// The nearest settings that fit, with what a rank then needs: saves that are not staged or
/// optimizer state in host memory, more sharding on as many ranks, and more ranks.
fn fitting(
    config: &Config,
    ranks: usize,
    ranks_per_node: usize,
    dtype: Dtype,
    memory: usize,
) -> Vec<(String, usize)> {
    let parallel = &config.parallel;
    let needed = |zero_stage: u8, shard_size: ShardSize, ranks: usize| {
        let mut other = config.clone();
        other.parallel.zero_stage = zero_stage;
        other.parallel.shard_size = shard_size;
        other.parallel.recompute = Recompute::Full;
        let plan = RunPlan::new(&other, ranks, ranks_per_node.min(ranks)).ok()?;
        let (_, needed) = plan.least(&other, dtype);
        (needed <= memory).then_some(needed)
    };
    let sharding = |zero_stage: u8, shard_size: ShardSize| {
        let mut text = format!("zero_stage = {zero_stage}");
        if shard_size != parallel.shard_size {
            text += " with shard_size = \"world\"";
        }
        text
    };
    let stages = parallel.zero_stage..=3;
    let sizes = [parallel.shard_size, ShardSize::World];
    let shardings = || {
        sizes
            .into_iter()
            .flat_map(|size| stages.clone().map(move |zero| (zero, size)))
    };

    let same_ranks = shardings()
        .find_map(|(zero, size)| Some((sharding(zero, size), needed(zero, size, ranks)?)));
    let samples = config.stages.iter().map(|stage| stage.samples_per_batch());
    let most = samples.min().unwrap_or(ranks);
    let doubled =
        std::iter::successors(Some(ranks.saturating_mul(2)), |ranks| ranks.checked_mul(2))
            .take_while(|&ranks| ranks <= most);
    let more_ranks = doubled.clone().find_map(|ranks| {
        let (zero, size) = (parallel.zero_stage, parallel.shard_size);
        Some((format!("{ranks} ranks"), needed(zero, size, ranks)?))
    });
    let both = || {
        doubled.clone().find_map(|ranks| {
            let (zero, size) = (3, ShardSize::World);
            let way = format!("{ranks} ranks with {}", sharding(zero, size));
            Some((way, needed(zero, size, ranks)?))
        })
    };
    let changed = |way: &str, change: fn(&mut Config)| {
        let mut other = config.clone();
        change(&mut other);
        let plan = RunPlan::new(&other, ranks, ranks_per_node.min(ranks)).ok()?;
        let (_, needed) = plan.least(&other, dtype);
        (needed <= memory).then(|| (way.to_owned(), needed))
    };
    let direct = match planned(config).is_cuda() {
        true => changed("optimizer.offload = true", |config| {
            config.optimizer.offload = true;
        }),
        false => changed("checkpoint.async = false", |config| {
            config.checkpoint.asynchronous = false;
        }),
    };
    let others = match (same_ranks, more_ranks) {
        (None, None) if direct.is_none() => both().into_iter().collect::<Vec<_>>(),
        (same, more) => same.into_iter().chain(more).collect(),
    };
    direct.into_iter().chain(others).collect()
}
