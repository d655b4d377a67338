//! Opening a run: a new one with initial values, or one that has begun from its newest checkpoint.

use oxitron_data::{Dataset, DatasetSpec, SourceSpec};
use oxitron_kernels::{cuda::is_gpu, memory, simd};
use tch::Device;

use super::{
    RunError,
    choices::{choose_dtype, choose_products},
    control::{self, Control},
    device,
    folder::RunFolder,
    origin::Origin,
    plan::{RunPlan, kind, set_threads, wire},
    progress::Progress,
    ranks::Ranks,
    restore::{initial_values, read_state, set_aside, weights_alone},
    saver::Saver,
    stops::Stops,
    trace::{self, Tracer},
    trainer::{Options, Trainer},
    watch::Watch,
};
use crate::checkpoint;
use crate::comm::Comm;
use crate::config::{Config, Dtype, ShardSize, SourceConfig, TimeSpan};
use crate::faults;
use crate::guard::{BadSteps, Spikes, watchdog::Phase};
use crate::metrics::units::{bytes, grouped};
use crate::metrics::{self, Event, MetricsWriter};
use crate::model::Decoder;
use crate::zero::{CommClock, Groups, StateForm, StateKind, Zero};

impl<'a> Trainer<'a> {
    /// Checks the plan, takes hold of the run directory, opens the data and fills the state.
    pub(super) fn open(
        config: &'a Config,
        comm: &Comm,
        watch: &'a Watch,
        options: &Options,
    ) -> Result<Self, RunError> {
        let ranks = Ranks::new(comm)?;
        ranks.together(simd::requested().map_err(RunError::Plan))?;
        let plan = RunPlan::new(config, ranks.ranks, comm.local_world())?;
        check_nodes(config, &ranks, comm)?;
        set_threads(config, comm.local_world())?;
        memory::install()?;
        let device = device::open(config, comm, &ranks)?;
        let ranks = match device {
            Device::Cpu => ranks,
            // Its lane reaches the GPUs now.
            _ => Ranks::new(comm)?,
        };

        let lock = || RunFolder::lock(&config.run.dir);
        let folder = ranks.together(if ranks.leads() {
            lock().map(Some)
        } else {
            Ok(None)
        })?;
        faults::set_rank(ranks.rank);
        if ranks.leads()
            && let Err(error) = checkpoint::remove_stale(&config.checkpoint.dir, None)
        {
            tracing::warn!("saves that did not finish cannot be removed: {error}");
        }
        let Begun {
            origin,
            dtype,
            dataset,
            decoder,
            zero,
            rejected,
            config_change,
            data_change,
        } = Begun::new(config, comm, watch, &ranks, &plan, options, device)?;
        if device == Device::Cpu {
            choose_products(config, &ranks, &plan, &origin, dtype)?;
        }
        let (run_id, attempt, began) = identify(config, &ranks, &origin)?;
        let open_metrics = |folder: &RunFolder| {
            folder.write_config(&config.resolved_toml()?)?;
            Ok(MetricsWriter::open(&config.run.dir, attempt)?)
        };
        let metrics = ranks.together(folder.as_ref().map(open_metrics).transpose())?;
        let saver = saver(config, &zero);
        let tracer = Tracer::new(
            config.run.trace_steps,
            &config.run.dir,
            (ranks.rank, attempt),
            began,
            (&plan.units, &plan.map),
        );
        let time_limit = config.run.time_limit.map(TimeSpan::duration);
        let limit = (watch.began(), time_limit);
        let stops = Stops::new(&options.stop, &config.run.dir, ranks.leads(), limit);
        let stops = stops.map_err(RunError::io(
            &config.run.dir,
            "start a thread that looks for requests to stop in",
        ));
        let progress = Progress::start(dataset.start());
        let control = Control::new(progress.adam_step, device);
        let mut trainer = Self {
            config,
            watch,
            progress,
            device,
            dtype,
            peak_flops: device::peak_flops(config, device, dtype),
            plan,
            decoder,
            zero,
            control: ranks.together(control)?,
            runs_ahead: is_gpu(device),
            taken: None,
            concluded: None,
            dataset,
            run_id,
            attempt,
            parent: None,
            stops: ranks.together(stops)?,
            saver: ranks.together(saver)?,
            saves: 0,
            save_failed: false,
            last_saved: None,
            torn: false,
            allow_data_change: options.allow_data_change,
            spikes: Spikes::new(&config.guard),
            bad_steps: BadSteps::new(&config.guard),
            ranks,
            _folder: folder,
            metrics,
            tracer,
        };
        if let Origin::Resume(checkpoint) = &origin {
            trainer.take_over(checkpoint)?;
            trainer.bad_steps.restore(checkpoint.meta().guard.bad_steps);
        }
        trainer.open_exchanges()?;
        watch.begin(trainer.progress.step)?;
        trainer.announce(&origin);
        if let Some(difference) = config_change {
            trainer.event(Event::ConfigChanged {
                step: trainer.progress.step,
                difference,
            });
        }
        trainer.tell_changed_choices(&origin)?;
        trainer.take_changed_data(data_change);
        for (step, reason) in rejected {
            trainer.reject(step, reason);
        }
        Ok(trainer)
    }

    /// Says what the run is, what it needs, and where it begins.
    fn announce(&mut self, origin: &Origin) {
        let last = self.config.stages.len() - 1;
        let stage = self.progress.stage.min(last);
        let figures = self.plan.figures(self.config, stage, self.dtype);
        let (mesh, traffic) = (&self.plan.layout.mesh, &figures.traffic);
        let shown = |count: usize| bytes(count as u64);
        tracing::info!(
            "{} parameters ({}) on {} ranks: zero_stage {}, {} shard groups of {}",
            grouped(self.plan.units.parameters() as u64),
            device::described(self.device, self.dtype),
            self.ranks.ranks,
            self.config.parallel.zero_stage,
            mesh.replicate,
            mesh.shard,
        );
        tracing::info!(
            "a rank holds {} of state and {} of activations, {} in all, and sends {} per step \
             (reduce {}, gather {}, replicate {})",
            shown(figures.state.total()),
            shown(figures.activations.total()),
            match figures.host() {
                0 => shown(figures.device()),
                host => format!(
                    "{} on the GPU and {} in host memory",
                    shown(figures.device()),
                    shown(host)
                ),
            },
            shown(figures.sent()),
            shown(traffic.reduce),
            shown(traffic.gather),
            shown(traffic.replicate),
        );
        let event = match origin {
            Origin::Resume(checkpoint) => {
                tracing::info!("resuming from {}", checkpoint.dir().display());
                Event::Resume {
                    step: self.progress.step,
                    tokens: self.progress.tokens,
                    checkpoint: self.shown(checkpoint.dir()),
                    world: self.ranks.ranks as u32,
                }
            }
            _ => Event::Start {
                run_id: self.run_id.clone(),
                world: self.ranks.ranks as u32,
                version: env!("CARGO_PKG_VERSION").to_owned(),
            },
        };
        self.event(event);
    }
}

/// Where a run begins: its state, and the data that belong to it.
struct Begun {
    origin: Origin,
    dtype: Dtype,
    dataset: Dataset,
    decoder: Decoder,
    zero: Zero,
    /// Newer checkpoints that are damaged: step and reason.
    rejected: Vec<(u64, String)>,
    /// What has changed in the configuration since the checkpoint, on the leader.
    config_change: Option<String>,
    /// What has changed in the data, one line each.
    data_change: Vec<String>,
}

impl Begun {
    /// Finds the newest checkpoint and reads it; where it is damaged, the one before, and so on. A
    /// run without checkpoints gets its initial values.
    fn new(
        config: &Config,
        comm: &Comm,
        watch: &Watch,
        ranks: &Ranks,
        plan: &RunPlan,
        options: &Options,
        device: Device,
    ) -> Result<Self, RunError> {
        let mut rejected: Vec<(u64, String)> = Vec::new();
        loop {
            let before = rejected.last().map_or(u64::MAX, |(step, _)| *step);
            let (origin, config_change) = Origin::find(config, ranks, options, before)?;
            if !matches!(origin, Origin::Resume(_)) && !rejected.is_empty() {
                // Damaged checkpoints are a loss, over which a run must not begin anew in silence.
                return Err(RunError::NoneUsable {
                    dir: config.checkpoint.dir.clone(),
                    reason: rejected.swap_remove(0).1,
                });
            }
            ranks.together(origin.check(&plan.units))?;
            let dtype = choose_dtype(config, ranks, &origin, device)?;
            let recorded = match &origin {
                Origin::Resume(checkpoint) => checkpoint.meta().dataset_lock.as_deref(),
                _ => None,
            };
            let allow_change = options.allow_data_change;
            let (dataset, data_change) = open_dataset(config, ranks, recorded, allow_change)?;
            let decoder = Decoder::new(&config.model, dtype);
            let mut zero = Zero::new(
                &plan.units,
                &plan.map,
                &plan.layout,
                Groups::new(comm, &plan.layout.mesh)?,
                StateForm {
                    compute: decoder.compute_kind(),
                    moments: kind(config.optimizer.moments_dtype),
                    wire: wire(config.parallel.grad_reduce_dtype),
                    home: plan.home,
                },
                device,
            )?;
            let filled = match &origin {
                Origin::Resume(checkpoint) => {
                    let alive = || watch.phase(Phase::Starting);
                    let verify = !options.no_verify;
                    if let Some(reason) = read_state(&mut zero, checkpoint, ranks, verify, alive)? {
                        rejected.push((checkpoint.meta().step, reason));
                        continue;
                    }
                    Ok(())
                }
                Origin::Seed => initial_values(&mut zero, config.run.seed),
                Origin::Checkpoint(checkpoint) => weights_alone(&mut zero, |name, range, out| {
                    checkpoint.read(name, StateKind::Master, range, out)
                }),
                Origin::HuggingFace(folder) => weights_alone(&mut zero, |name, range, out| {
                    folder.read_f32(name, range, out)
                }),
            };
            ranks.together(filled)?;
            // Only now: where none is sound, all stay where the next start looks for them.
            for (step, _) in &rejected {
                let name = checkpoint::folder_name(*step);
                set_aside(ranks, &config.checkpoint.dir.join(name))?;
            }
            return Ok(Self {
                origin,
                dtype,
                dataset,
                decoder,
                zero,
                rejected,
                config_change,
                data_change,
            });
        }
    }
}

/// The writer of checkpoints, with the memory that it stages in.
fn saver(config: &Config, zero: &Zero) -> Result<Saver, RunError> {
    let staging = config.checkpoint.asynchronous;
    let staging = staging.then(|| zero.staging(0..zero.units())).transpose()?;
    Saver::new(staging).map_err(RunError::io(
        &config.checkpoint.dir,
        "start a thread that writes checkpoints to",
    ))
}

/// Refuses shard groups by node where nodes have different numbers of ranks, or where neighbouring
/// ranks, which form a group, are on different nodes.
fn check_nodes(config: &Config, ranks: &Ranks, comm: &Comm) -> Result<(), RunError> {
    let local_world = comm.local_world();
    let sum = control::sum(
        &ranks.world,
        &[local_world as f64],
        &mut CommClock::default(),
    )?[0];
    let equal = sum == (local_world * ranks.ranks) as f64;
    let refused = || {
        Err(RunError::Plan(format!(
            "`parallel.shard_size` is \"node\", but not every node has {local_world} ranks as the \
             one of rank {} has; start the same number on every node, or give `shard_size` as a \
             number or \"world\"",
            ranks.rank
        )))
    };
    let scattered = || {
        Err(RunError::Plan(format!(
            "`parallel.shard_size` is \"node\", but rank {} is number {} of the {local_world} on its \
             node: ranks that follow each other are on different nodes. Let the launcher fill one \
             node after the other (`mpirun --map-by slot`, `srun --distribution=block`)",
            ranks.rank,
            comm.local_rank()
        )))
    };
    let in_order = ranks.rank % local_world == comm.local_rank();
    ranks.together(match config.parallel.shard_size {
        ShardSize::Node if !equal => refused(),
        ShardSize::Node if !in_order => scattered(),
        _ => Ok(()),
    })
}

/// The run's identity, how often it has been started, and when it was started this time, in
/// nanoseconds since 1970-01-01 UTC.
fn identify(
    config: &Config,
    ranks: &Ranks,
    origin: &Origin,
) -> Result<(String, u32, u64), RunError> {
    let [attempt, began] = ranks.leaders_choice(|| {
        let attempt = metrics::next_attempt(&config.run.dir)?;
        Ok([u64::from(attempt), trace::unix_nanoseconds()])
    })?;
    let run_id = match origin {
        Origin::Resume(checkpoint) => checkpoint.meta().run_id.clone(),
        _ => format!("{}-{began:016x}", config.run.name),
    };
    Ok((run_id, attempt as u32, began))
}

/// Opens the data: the leader first, since it may have to build the lock. A run that goes on sees
/// the files that it had when the checkpoint was written; with `allow_change` it takes the data as
/// they are, and the second value says how they differ, one line each.
pub(super) fn open_dataset(
    config: &Config,
    ranks: &Ranks,
    recorded: Option<&str>,
    allow_change: bool,
) -> Result<(Dataset, Vec<String>), RunError> {
    let source = |source: &SourceConfig| SourceSpec {
        name: source.name.clone(),
        paths: vec![source.path.clone()],
        weight: source.weight,
        max_epochs: source.max_epochs,
    };
    let spec = DatasetSpec {
        sources: config.data.sources.iter().map(source).collect(),
        seed: config.run.seed,
        window_tokens: config.data.window_tokens,
        validation_fraction: config.validation.fraction,
        vocab_size: config.model.vocab_size,
        lock: config.data.lock.clone(),
    };
    ranks.in_turn(|| {
        Ok(match recorded {
            _ if allow_change => Dataset::open_changed(&spec, recorded)?,
            Some(fingerprint) => (Dataset::open_at(&spec, fingerprint)?, Vec::new()),
            None => (Dataset::open(&spec)?, Vec::new()),
        })
    })
}
