//! `oxitron plan`: what a run will hold, send and do, without running it.
//!
//! All figures come from the trainer's plan, which is a pure function of the config and the ranks:
//! no rank is started, no data is opened, no model is allocated. This folder reads the command line
//! and the [`cluster`] file and presents the figures, as [`text`] for people or as [`json`] for
//! scripts.

mod actions;
mod cluster;
mod json;
mod size;
mod summary;
mod text;

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::Result;
use oxitron_trainer::config::{Config, Device, Dtype, Recompute};
use oxitron_trainer::plan::Mesh;
use oxitron_trainer::run::{
    RunPlan, StageFigures, check_memory, dtype_of_this_machine, set_threads,
};

use cluster::Cluster;

/// Print what a run will hold, send and do, without starting it
///
/// Refuses (exit code 2) what cannot run: a stage that cannot give every rank a sample, shard groups
/// that do not divide the ranks, a model that does not fit into the memory of a rank.
#[derive(Debug, clap::Args)]
pub struct PlanArgs {
    /// The config of the run (TOML)
    config: PathBuf,
    /// Number of ranks
    #[arg(long, value_name = "N", default_value_t = 1,
        value_parser = clap::value_parser!(u32).range(1..))]
    ranks: u32,
    /// Ranks that share a node; without it those of the cluster file, else all ranks
    #[arg(long, value_name = "M", value_parser = clap::value_parser!(u32).range(1..))]
    ranks_per_node: Option<u32>,
    /// What the machines offer (TOML): ranks and memory per node, bandwidths
    #[arg(long, value_name = "FILE")]
    cluster: Option<PathBuf>,
    /// Memory of a rank, for instance 24GiB; wins over the cluster file
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    memory: Option<u64>,
    /// List every action of a step
    #[arg(long)]
    actions: bool,
    /// Print one JSON object, sizes in bytes
    #[arg(long)]
    json: bool,
    /// Override a config value, for instance `--set parallel.zero_stage=3`; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
}

/// A plan and everything that is said about it.
struct Report {
    config: Config,
    dtype: Dtype,
    /// Why this dtype, where the config leaves the choice.
    dtype_reason: Option<String>,
    plan: RunPlan,
    ranks: usize,
    ranks_per_node: usize,
    cluster: Option<Cluster>,
    memory: Option<usize>,
    stages: Vec<Stage>,
    /// Whether to list every action.
    list_actions: bool,
}

/// A stage of context.
struct Stage {
    figures: StageFigures,
    /// Where the memory of a rank is known: the largest micro-batch in it with each setting of
    /// `recompute`, in the order of [`Recompute::ALL`]; `None` when not even one sample fits.
    largest: Option<[Option<usize>; Recompute::ALL.len()]>,
    /// Where bandwidths are known.
    seconds: Option<Seconds>,
}

/// How long the lanes of a rank move the bytes of a step.
#[derive(Clone, Copy)]
struct Seconds {
    shard: f64,
    replica: f64,
    floor: f64,
}

/// Runs the command.
///
/// # Errors
/// A config or cluster file that is refused, and a plan that cannot run.
pub fn run(args: &PlanArgs) -> Result<()> {
    let report = Report::new(args)?;
    let printed = if args.json {
        serde_json::to_string_pretty(&json::describe(&report))? + "\n"
    } else {
        text::describe(&report)
    };
    match io::stdout().write_all(printed.as_bytes()) {
        // A reader that has seen enough (`| head`) is no error.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => Ok(other?),
    }
}

impl Report {
    fn new(args: &PlanArgs) -> Result<Self> {
        let mut config = Config::load(&args.config, &args.sets)?;
        let cluster = args.cluster.as_deref().map(Cluster::read).transpose()?;
        if let (Device::Auto, Some(cluster)) = (config.run.device, &cluster) {
            config.run.device = cluster.device;
        }
        let ranks = args.ranks as usize;
        let per_node = args.ranks_per_node.map(|ranks| ranks as usize);
        let per_node = per_node.or(cluster.as_ref().map(|cluster| cluster.ranks_per_node));
        let ranks_per_node = per_node.unwrap_or(ranks).min(ranks);
        let memory = args
            .memory
            .or(cluster.as_ref().map(|cluster| cluster.memory));
        let memory = memory.map(|bytes| bytes as usize);

        let mut dtype_reason = None;
        let on_gpu = config.run.device == Device::Cuda;
        let dtype = config.model.dtype.resolve(|| {
            if on_gpu {
                return Dtype::Bf16;
            }
            let (dtype, reason) = dtype_of_this_machine();
            dtype_reason = Some(reason);
            dtype
        });
        let plan = RunPlan::new(&config, ranks, ranks_per_node)?;
        set_threads(&config, ranks_per_node)?;
        if let Some(memory) = memory {
            check_memory(&config, &plan, ranks_per_node, dtype, memory)?;
        }
        let stages = (0..config.stages.len())
            .map(|index| {
                let figures = plan.figures(&config, index, dtype);
                let largest = |memory: usize| {
                    Recompute::ALL.map(|recompute| {
                        plan.largest_micro_batch(&config, index, dtype, memory, recompute)
                    })
                };
                Stage {
                    largest: memory.map(largest),
                    seconds: cluster.as_ref().map(|cluster| {
                        Seconds::new(&figures, cluster, &plan.layout.mesh, ranks_per_node)
                    }),
                    figures,
                }
            })
            .collect();
        Ok(Self {
            config,
            dtype,
            dtype_reason,
            plan,
            ranks,
            ranks_per_node,
            cluster,
            memory,
            stages,
            list_actions: args.actions,
        })
    }

    /// Whether a stage fits as it is configured; `None` when the memory of a rank is not known.
    fn fits(&self, stage: &Stage) -> Option<bool> {
        self.memory.map(|memory| stage.figures.device() <= memory)
    }

    /// Whether ranks compute on GPUs.
    fn on_gpu(&self) -> bool {
        self.config.run.device == Device::Cuda
    }
}

impl Seconds {
    /// A lane is as fast as the slowest part of the way between its ranks.
    fn new(figures: &StageFigures, cluster: &Cluster, mesh: &Mesh, ranks_per_node: usize) -> Self {
        let bandwidth = |groups: Vec<Vec<usize>>| {
            let node = |rank: &usize| rank / ranks_per_node;
            let inside = |group: &Vec<usize>| group.first().map(node) == group.last().map(node);
            if groups.iter().all(inside) {
                cluster.bytes_per_second_in_node
            } else {
                cluster.bytes_per_second_between_nodes
            }
        };
        let shard_group = |group: usize| mesh.shard_group(group * mesh.shard);
        let shard = bandwidth((0..mesh.replicate).map(shard_group).collect());
        let replica = bandwidth(
            (0..mesh.shard)
                .map(|rank| mesh.replica_group(rank))
                .collect(),
        );
        let traffic = &figures.traffic;
        Self {
            shard: traffic.shard_lane() as f64 / shard,
            replica: traffic.replicate as f64 / replica,
            floor: traffic.floor_reduce as f64 / shard + traffic.floor_replicate as f64 / replica,
        }
    }
}

/// The name of a dtype in configs.
fn dtype_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::Bf16 => "bf16",
        Dtype::Fp32 => "fp32",
    }
}
