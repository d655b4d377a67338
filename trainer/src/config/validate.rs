//! Checks that involve several keys.
//!
//! They read the typed configuration and use the tree only to point at the text.

use oxitron_kernels::attention::flash::MOST_DIM;

use super::error::{ConfigError, Problem, refuse_if_any};
use super::guard::SampleRange;
use super::model::Dtype;
use super::root::Config;
use super::run::{Device, TraceSteps};
use super::source::Sources;
use super::stage::StageConfig;
use super::tree::Node;

/// Refuses what each key allows by itself but not together; reports everything it finds.
pub(super) fn validate(config: &Config, tree: &Node, sources: &Sources) -> Result<(), ConfigError> {
    let mut check = Check {
        tree,
        sources,
        problems: Vec::new(),
    };
    check.heads(config);
    check.trace(config);
    check.moments(config);
    check.offload(config);
    check.saves(config);
    check.skipped_samples(config);
    check.names(
        "data.source",
        config.data.sources.iter().map(|source| &source.name),
    );
    check.names("stage", config.stages.iter().map(|stage| &stage.name));
    for (index, stage) in config.stages.iter().enumerate() {
        check.batch(index, stage);
        check.window(index, stage, config.data.window_tokens);
        check.schedule(index, stage);
        check.mixture(index, stage);
    }
    refuse_if_any(check.problems)
}

struct Check<'a> {
    tree: &'a Node,
    sources: &'a Sources,
    problems: Vec<Problem>,
}

impl Check<'_> {
    /// Adds a finding about some keys, at the value of the one to blame.
    fn problem(&mut self, paths: &[&str], message: String, help: String) {
        let origins = paths
            .iter()
            .filter_map(|path| self.tree.get(path))
            .map(|node| &node.origin);
        let origin = self.sources.blame(origins);
        self.problems
            .push(self.sources.problem(&origin, message, help));
    }

    fn heads(&mut self, config: &Config) {
        let model = &config.model;
        let (heads, kv_heads) = (model.num_heads, model.num_kv_heads);
        if !heads.is_multiple_of(kv_heads) {
            let divisors: Vec<String> = (1..=heads)
                .filter(|n| heads.is_multiple_of(*n))
                .map(|n| n.to_string())
                .collect();
            self.problem(
                &["model.num_kv_heads", "model.num_heads"],
                format!(
                    "`model.num_kv_heads` is {kv_heads}, it must divide `model.num_heads` ({heads})"
                ),
                format!("use one of {}", divisors.join(", ")),
            );
        }
        if !model.head_dim.is_multiple_of(2) {
            let message = format!(
                "`model.head_dim` is {}, it must be even: RoPE turns pairs of elements",
                model.head_dim
            );
            let help = "change `head_dim`, or `hidden_size` or `num_heads` that it follows from";
            let paths = ["model.head_dim", "model.hidden_size", "model.num_heads"];
            self.problem(&paths, message, help.to_owned());
        }
        if model.head_dim > MOST_DIM {
            let message = format!(
                "`model.head_dim` is {}, attention takes at most {MOST_DIM}",
                model.head_dim
            );
            let help = format!(
                "give `num_heads` {} or more",
                model.hidden_size.div_ceil(MOST_DIM)
            );
            let paths = ["model.head_dim", "model.hidden_size", "model.num_heads"];
            self.problem(&paths, message, help);
        }
    }

    fn trace(&mut self, config: &Config) {
        let Some(TraceSteps { first, last }) = config.run.trace_steps else {
            return;
        };
        if first > last {
            let message = format!(
                "`run.trace_steps` is [{first}, {last}], its first step must not be after its last"
            );
            let help = format!("use [{last}, {first}]");
            self.problem(&["run.trace_steps"], message, help);
        }
    }

    /// A bf16 number has 8 significant bits: a moment that shrinks by less than half of its last bit
    /// rounds back to what it was, and never decays.
    fn moments(&mut self, config: &Config) {
        const SLOWEST: f64 = 1.0 - 1.0 / 256.0;
        let (beta1, beta2) = config.optimizer.betas;
        if config.optimizer.moments_dtype == Dtype::Fp32 || beta1.max(beta2) <= SLOWEST {
            return;
        }
        let message = format!(
            "`optimizer.betas` is [{beta1}, {beta2}], with `moments_dtype = \"bf16\"` neither must be \
             greater than {SLOWEST}: a moment that decays by less than 1/256 per step would round \
             back to what it was"
        );
        let help = "use smaller betas such as [0.9, 0.95], or `moments_dtype = \"fp32\"`";
        let paths = ["optimizer.betas", "optimizer.moments_dtype"];
        self.problem(&paths, message, help.to_owned());
    }

    fn offload(&mut self, config: &Config) {
        if !config.optimizer.offload || config.run.device == Device::Cuda {
            return;
        }
        let device = match config.run.device {
            Device::Auto => "\"auto\", which may be the processor",
            _ => "\"cpu\"",
        };
        let message = format!(
            "`optimizer.offload` is true with `run.device` {device}: it computes in host memory \
             already, and there is no other to move the optimizer's state to"
        );
        let help = "remove `offload`, or set `device = \"cuda\"`";
        let paths = ["optimizer.offload", "run.device"];
        self.problem(&paths, message, help.to_owned());
    }

    fn saves(&mut self, config: &Config) {
        let checkpoint = &config.checkpoint;
        let every = checkpoint.every_steps;
        if let Some(kept) = checkpoint.keep_every
            && !kept.is_multiple_of(every)
        {
            let message = format!(
                "`checkpoint.keep_every` is {kept}, it must be a multiple of \
                 `checkpoint.every_steps` ({every})"
            );
            let below = kept / every * every;
            let help = match below {
                0 => format!("use {every}"),
                _ => format!("use {below} or {}", below + every),
            };
            let paths = ["checkpoint.keep_every", "checkpoint.every_steps"];
            self.problem(&paths, message, help);
        }
        if let Some(between) = checkpoint.ephemeral_every_steps
            && between >= every
        {
            let message = format!(
                "`checkpoint.ephemeral_every_steps` is {between}, it must be less than \
                 `checkpoint.every_steps` ({every}): no save would lie in between"
            );
            let help = "use a smaller number, or remove it";
            let paths = ["checkpoint.ephemeral_every_steps", "checkpoint.every_steps"];
            self.problem(&paths, message, help.to_owned());
        }
    }

    fn skipped_samples(&mut self, config: &Config) {
        let trained = config.stages.iter().fold(0u64, |sum, stage| {
            let samples = stage.batch_tokens / (stage.seq_len as u64);
            sum.saturating_add(stage.steps.saturating_mul(samples))
        });
        for (index, range) in config.guard.skip_samples.iter().enumerate() {
            let SampleRange { first, end } = *range;
            let path = format!("guard.skip_samples.{index}");
            if first < end {
                // All of them are drawn, however many there are, before the run goes on.
                if end - first > trained {
                    let message = format!(
                        "`{path}` leaves out {} samples, more than the {trained} that all stages \
                         train on",
                        end - first
                    );
                    let help = "give indices of samples, counted from 0, without the end";
                    self.problem(&[&path], message, help.to_owned());
                }
                continue;
            }
            let message = format!(
                "`{path}` is [{first}, {end}], its end, which is not left out itself, must be after \
                 its first"
            );
            let help = format!("use [{}, {}]", first.min(end), first.max(end) + 1);
            self.problem(&[&path], message, help);
        }
    }

    fn names<'n>(&mut self, section: &str, names: impl Iterator<Item = &'n String>) {
        let mut seen: Vec<&String> = Vec::new();
        for (index, name) in names.enumerate() {
            if let Some(first) = seen.iter().position(|other| *other == name) {
                let message = format!(
                    "`{section}.{index}.name` is {name:?}, as is `{section}.{first}.name`; \
                     names must differ"
                );
                let path = format!("{section}.{index}.name");
                self.problem(
                    &[&path],
                    message,
                    "give one of them another name".to_owned(),
                );
            }
            seen.push(name);
        }
    }

    fn batch(&mut self, index: usize, stage: &StageConfig) {
        let (batch, seq_len) = (stage.batch_tokens, stage.seq_len as u64);
        if batch.is_multiple_of(seq_len) {
            return;
        }
        let path = format!("stage.{index}.batch_tokens");
        let message =
            format!("`{path}` is {batch}, it must be a multiple of `seq_len` ({seq_len})");
        let below = batch / seq_len * seq_len;
        let help = match below {
            0 => format!("use {seq_len}"),
            _ => format!("use {below} or {}", below + seq_len),
        };
        self.problem(&[&path, &format!("stage.{index}.seq_len")], message, help);
    }

    fn window(&mut self, index: usize, stage: &StageConfig, window_tokens: u64) {
        if window_tokens >= stage.seq_len as u64 {
            return;
        }
        let message = format!(
            "`data.window_tokens` is {window_tokens}, less than `stage.{index}.seq_len` ({}): \
             no sample would fit into a window",
            stage.seq_len
        );
        let help = "use at least the longest `seq_len`, better a few times that";
        let paths = ["data.window_tokens", &format!("stage.{index}.seq_len")];
        self.problem(&paths, message, help.to_owned());
    }

    fn schedule(&mut self, index: usize, stage: &StageConfig) {
        let (warmup, steps) = (stage.warmup_steps, stage.steps);
        let path = format!("stage.{index}.warmup_steps");
        let steps_path = format!("stage.{index}.steps");
        if warmup > steps {
            let message = format!("`{path}` is {warmup}, more than the {steps} steps of the stage");
            let help = format!("set `warmup_steps` of this stage to at most {steps}");
            return self.problem(&[&path, &steps_path], message, help);
        }
        let decay = stage.decay_steps.unwrap_or(0);
        if decay > steps - warmup {
            let path = format!("stage.{index}.decay_steps");
            let message = format!(
                "`{path}` is {decay}, more than the {} steps that warm-up leaves of the stage",
                steps - warmup
            );
            let help = format!(
                "set `decay_steps` of this stage to at most {}",
                steps - warmup
            );
            self.problem(&[&path, &steps_path], message, help);
        }
    }

    fn mixture(&mut self, index: usize, stage: &StageConfig) {
        if stage.weights.values().all(|share| *share == 0.0) {
            let path = format!("stage.{index}.weights");
            let message = format!("`{path}` gives every source a share of 0");
            self.problem(
                &[&path],
                message,
                "give at least one source a share".to_owned(),
            );
        }
    }
}
