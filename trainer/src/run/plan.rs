//! The plan of a run: what it will hold, send and do, from its configuration alone.

use oxitron_kernels::{Threads, cpu_prefers_bf16};
use tch::Kind;

use super::RunError;
use crate::comm::Wire;
use crate::config::{Config, Dtype};
use crate::model::describe;
use crate::plan::{
    Action, ElementBytes, Home, Layout, ShardMap, StateBytes, StepShape, StepTraffic, Units,
    WireBytes, emit_evaluation, emit_opening, emit_step, staging_bytes, state_bytes, step_traffic,
};

/// What a run does on a number of ranks.
#[derive(Clone, Debug)]
pub struct RunPlan {
    /// Parameters and layers.
    pub units: Units,
    /// The ranks, and what each holds.
    pub layout: Layout,
    /// Who owns what.
    pub map: ShardMap,
    /// The shape of a step, by stage.
    pub shapes: Vec<StepShape>,
    /// The dtype of AdamW's moments.
    pub moments: Dtype,
    /// Where master weights and moments lie.
    pub home: Home,
}

impl RunPlan {
    /// Plans `config` on `ranks` ranks, of which `ranks_per_node` share a node.
    ///
    /// # Errors
    /// [`RunError::Plan`] when a stage cannot give every rank a sample, [`RunError::Config`] when
    /// shard groups do not divide the ranks; a model that cannot be described.
    pub fn new(config: &Config, ranks: usize, ranks_per_node: usize) -> Result<Self, RunError> {
        let parallel = &config.parallel;
        let shard = parallel.shard_ranks(ranks, ranks_per_node)?;
        check_samples(config, ranks)?;
        let layout = Layout::new(parallel.zero_stage, ranks, shard);
        let decay = |name: &str| !config.optimizer.no_decay.matches(name);
        let trainable = |name: &str| !config.model.freeze.matches(name);
        let units = describe(&config.model, trainable, decay)?;
        let shape = |stage: &crate::config::StageConfig| StepShape {
            accumulation: stage.accumulation(ranks),
            overlap: parallel.overlap,
            recompute: parallel.recompute,
            prefetch_units: parallel.prefetch_units,
        };
        Ok(Self {
            map: ShardMap::new(&units, layout.mesh.shard),
            shapes: config.stages.iter().map(shape).collect(),
            units,
            layout,
            moments: config.optimizer.moments_dtype,
            home: if config.optimizer.offload {
                Home::Host
            } else {
                Home::Device
            },
        })
    }

    /// What every step of stage `stage` does.
    pub fn step(&self, stage: usize) -> Vec<Action> {
        emit_step(&self.units, &self.map, &self.layout, self.shapes[stage])
    }

    /// What the validation of a micro-batch does.
    pub fn evaluation(&self, stage: usize) -> Vec<Action> {
        emit_evaluation(&self.units, &self.map, &self.layout, self.shapes[stage])
    }

    /// What must be under way before the first list. It is the same for all stages.
    pub fn opening(&self) -> Vec<Action> {
        emit_opening(&self.units, &self.map, &self.layout, self.shapes[0])
    }

    /// Bytes of state on each rank during stage `stage`, with weights of `dtype`.
    pub fn state_bytes(&self, stage: usize, dtype: Dtype) -> StateBytes {
        let actions = self.step(stage);
        state_bytes(
            &self.units,
            &self.map,
            &self.layout,
            &actions,
            ElementBytes {
                weight: bytes_of(dtype),
                moment: bytes_of(self.moments),
            },
            self.home,
        )
    }

    /// Bytes of host memory that each rank keeps to copy its share of a save to.
    pub fn staging_bytes(&self, config: &Config) -> usize {
        if config.checkpoint.asynchronous {
            staging_bytes(&self.units, &self.map, &self.layout)
        } else {
            0
        }
    }

    /// Bytes that a rank sends in a step of stage `stage`, with weights of `dtype` and gradients
    /// that travel as `reduce`.
    pub fn traffic(&self, stage: usize, dtype: Dtype, reduce: Dtype) -> StepTraffic {
        let wire = WireBytes {
            weight: bytes_of(dtype),
            gradient: bytes_of(reduce),
        };
        step_traffic(&self.map, &self.layout, &self.step(stage), wire)
    }
}

/// Sets the compute threads of the calling rank, which shares this machine with others: all in all
/// `local_ranks`. What operations need for their threads is counted for this number, too.
///
/// # Errors
/// [`RunError::Kernel`] for a number that libtorch does not take.
pub fn set_threads(config: &Config, local_ranks: usize) -> Result<(), RunError> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let share = (cores / local_ranks.max(1)).max(1);
    Threads::set(config.run.threads.unwrap_or(share))?;
    Ok(())
}

/// What `dtype = "auto"` means on this machine, and why.
pub fn dtype_of_this_machine() -> (Dtype, String) {
    let preference = cpu_prefers_bf16();
    let dtype = if preference.prefer {
        Dtype::Bf16
    } else {
        Dtype::Fp32
    };
    (dtype, preference.reason)
}

fn bytes_of(dtype: Dtype) -> usize {
    match dtype {
        Dtype::Bf16 => 2,
        Dtype::Fp32 => 4,
    }
}

/// The name of a dtype in a manifest's choices.
pub(super) fn dtype_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::Bf16 => "bf16",
        Dtype::Fp32 => "fp32",
    }
}

/// The dtype of a tensor.
pub(super) fn kind(dtype: Dtype) -> Kind {
    match dtype {
        Dtype::Bf16 => Kind::BFloat16,
        Dtype::Fp32 => Kind::Float,
    }
}

/// The dtype in which gradients travel.
pub(super) fn wire(dtype: Dtype) -> Wire {
    match dtype {
        Dtype::Bf16 => Wire::Bf16,
        Dtype::Fp32 => Wire::F32,
    }
}

/// Refuses stages that cannot give every rank a sample.
fn check_samples(config: &Config, ranks: usize) -> Result<(), RunError> {
    for stage in &config.stages {
        let samples = stage.samples_per_batch();
        if samples < ranks {
            return Err(RunError::Plan(format!(
                "stage \"{}\": a global batch of {} tokens holds {samples} samples of {} tokens, \
                 fewer than the {ranks} ranks; start at most {samples} ranks, or raise \
                 batch_tokens to {} or more (context parallelism over {} ranks would split the \
                 samples; it is not built yet)",
                stage.name,
                stage.batch_tokens,
                stage.seq_len,
                ranks * stage.seq_len,
                ranks.div_ceil(samples),
            )));
        }
    }
    Ok(())
}
