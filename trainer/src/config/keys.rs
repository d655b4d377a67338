//! Every key of a configuration: name, type, default, unit, meaning.
//!
//! The reference page prints these tables; a test keeps it equal to them.

use super::schema::Bounds::{AboveOne, BelowOne, NotNegative, Positive, UpToOne};
use super::schema::Fallback::{Absent, From, Is, Required, Rule};
use super::schema::Kind::{
    Boolean, Choice, ChoiceOrInteger, FilePattern, Integer, IntegerPair, IntegerPairs, Name,
    Number, Pair, Path, Patterns, Section, Sections, Shares, Text, TimeSpan,
};
use super::schema::{Fallback, Key, Kind};

// Bounds keep every product of sizes and every token count inside 64 bits.
const SIZE: Kind = Integer(1, 1 << 22);
const STEPS: Kind = Integer(0, MAX_STEPS);
/// The most steps a stage can have.
pub(super) const MAX_STEPS: u64 = 1_000_000_000;

const fn key(
    name: &'static str,
    kind: Kind,
    fallback: Fallback,
    unit: &'static str,
    meaning: &'static str,
) -> Key {
    Key {
        name,
        kind,
        fallback,
        unit,
        meaning,
    }
}

const OPTIONAL: Fallback = Rule("every key has a default");

/// The sections of a config file.
#[rustfmt::skip]
pub(super) const ROOT: &[Key] = &[
    key("run", Section(RUN), OPTIONAL, "", "What the run is called, where it lies, where it runs."),
    key("model", Section(MODEL), Required, "",
        "Architecture, number formats, where weights begin."),
    key("parallel", Section(PARALLEL), OPTIONAL, "", "How a step is spread over ranks."),
    key("data", Section(DATA), Required, "", "Token shards and how they are mixed."),
    key("validation", Section(VALIDATION), OPTIONAL, "",
        "Documents held back, and when to use them."),
    key("optimizer", Section(OPTIMIZER), Required, "",
        "AdamW, and the learning rate of all stages."),
    key("checkpoint", Section(CHECKPOINT), OPTIONAL, "", "When the state is saved."),
    key("guard", Section(GUARD), OPTIONAL, "", "What is watched while the run goes on."),
    key("stage", Sections(STAGE), Required, "", "Context stages, in order."),
];

/// `[run]`
#[rustfmt::skip]
pub(super) const RUN: &[Key] = &[
    key("name", Name, Rule("the config file's name without `.toml`"), "", "Name of the run."),
    key("dir", Path, Rule("`runs/NAME` beside the config file"), "",
        "Run directory: resolved config, metrics, logs, checkpoints."),
    key("seed", Integer(0, i64::MAX as u64), Is("0"), "",
        "Seed of the initial weights and of the data order."),
    key("device", Choice(&["auto", "cpu", "cuda"]), Is("\"auto\""), "",
        "Where to compute. `cuda` takes the GPU with the rank's number on its node; `auto` does so \
         where every rank has one, and takes the processor otherwise."),
    key("deterministic", Boolean, Is("false"), "",
        "The run, repeated on the same ranks and threads, gives the same bits: nothing is chosen by \
         measurement. A new run in bf16 on a processor with AMX then multiplies by itself; otherwise \
         it tries whether libtorch does so faster."),
    key("threads", Integer(1, 4096), Absent("the cores of the machine divided by its ranks"),
        "threads per rank", "Compute threads."),
    key("peak_tflops", Number(Positive), Absent("known by the name of the GPU"), "TFLOP/s per rank",
        "What a rank's device does at most in dense bf16 products: what `mfu` and `hfu` are shares \
         of. Without it the names of common GPUs are known; on another device, and in fp32, they are \
         left out."),
    key("trace_steps", IntegerPair(1, MAX_STEPS), Absent("no trace"), "steps",
        "First and last step, counted from 1, both included, of which every rank writes a trace \
         into `run.dir/trace/`, for Perfetto or `chrome://tracing`."),
    key("time_limit", TimeSpan, Absent("no limit"), "since the start of the attempt",
        "After this wall-clock time the run stops with a save and exits with code 75, to be resumed. \
         Leave room for one step and one save before the job itself is ended."),
];

/// `[model]`
#[rustfmt::skip]
pub(super) const MODEL: &[Key] = &[
    key("preset", Text, Absent("all sizes are given here"), "",
        "Sizes from a model of `configs/models/`, by file name without `.toml`; any key beside \
         it overrides that one value."),
    key("family", Choice(&["llama"]), Is("\"llama\""), "",
        "Architecture: RMSNorm, half-split RoPE, grouped-query attention, SwiGLU, no biases. \
         InternLM2 is this once its fused `wqkv` is unpacked."),
    key("vocab_size", Integer(1, 1 << 31), Required, "tokens", "Rows of the embedding."),
    key("hidden_size", SIZE, Required, "", "Width of the residual stream."),
    key("intermediate_size", SIZE, Required, "", "Width of the SwiGLU."),
    key("num_layers", Integer(1, 1 << 14), Required, "", "Blocks."),
    key("num_heads", Integer(1, 1 << 16), Required, "", "Query heads."),
    key("num_kv_heads", Integer(1, 1 << 16), From("model.num_heads"), "",
        "Key and value heads; divides `num_heads`."),
    key("head_dim", Integer(2, 256), Rule("`hidden_size / num_heads`"), "",
        "Width of a head; even."),
    key("rms_norm_eps", Number(Positive), Is("1e-5"), "",
        "Added to the mean square inside the root."),
    key("rope_base", Number(AboveOne), Is("10000.0"), "",
        "RoPE base (theta) of the stages that do not set their own."),
    key("tie_word_embeddings", Boolean, Is("false"), "", "The output matrix is the embedding."),
    key("dtype", Choice(&["auto", "bf16", "fp32"]), Is("\"auto\""), "",
        "Number format of weights and activations; `auto` takes bf16 where the processor \
         multiplies it fast, else fp32. The choice is recorded and kept on resume."),
    key("residual_dtype", Choice(&["fp32", "bf16"]), Is("\"fp32\""), "",
        "Number format of the residual stream."),
    key("init_std", Number(Positive), Is("0.02"), "",
        "Standard deviation of the initial weights; projections into the residual stream use it \
         times `1/√(2·num_layers)`."),
    key("init_from", Path, Absent("random initial weights"), "",
        "A checkpoint or a Hugging Face folder to take the weights from. An existing run \
         directory wins over it."),
    key("freeze", Patterns, Is("[]"), "",
        "Tensors that are not trained, matched against whole Hugging Face names such as \
         `model.layers.0.self_attn.q_proj.weight`."),
];

/// `[parallel]`
#[rustfmt::skip]
pub(super) const PARALLEL: &[Key] = &[
    key("zero_stage", Integer(0, 3), Is("1"), "",
        "What is sharded: 0 nothing, 1 fp32 master weights and AdamW moments, 2 also gradients, \
         3 also weights."),
    key("shard_size", ChoiceOrInteger(&["node", "world"], 1, 1 << 20), Is("\"world\""), "ranks",
        "Ranks that together hold one copy of the sharded state: those of a node, all, or this \
         many neighbours, a divisor of all. The other shard groups hold replicas."),
    key("grad_reduce_dtype", Choice(&["fp32", "bf16"]), Is("\"fp32\""), "",
        "Number format of gradients on the wire; they are summed in fp32."),
    key("overlap", Boolean, Is("true"), "", "Communicate while computing."),
    key("prefetch_units", Integer(0, 64), Is("1"), "units",
        "Stages 2 and 3: layers ahead of the one that computes whose weights are being gathered (3), \
         and units behind it whose gradients may still be on their way (2 and 3). More hides a \
         slower network; each costs the memory of a unit."),
    key("recompute", Choice(&["none", "attention", "full"]), Is("\"none\""), "",
        "What backward computes again instead of keeping it: `attention` the attention branch of \
         each block, `full` all of a block from its input. See [Memory](memory.md#recomputation)."),
];

/// `[data]`
#[rustfmt::skip]
pub(super) const DATA: &[Key] = &[
    key("tokenizer", Path, Absent("none is copied on export"), "",
        "The `tokenizer.json` that made the shards; goes into exported models."),
    key("lock", Path, Rule("`dataset.lock` in `run.dir`"), "",
        "Record of the files, their checksums and their index; made on first use."),
    key("window_tokens", Integer(2, 1 << 40), Is("4194304"), "tokens",
        "Documents are shuffled within windows of this size: a few times the longest `seq_len`, \
         well below the tokens of the shortest stage, because what is left of a window is dropped \
         when a stage ends."),
    key("packing", Choice(&["concat"]), Is("\"concat\""), "",
        "Documents follow one another; one that does not fit is cut and goes on in the next \
         sample."),
    key("source", Sections(SOURCE), Required, "", "The parts of the mixture."),
];

/// `[[data.source]]`
#[rustfmt::skip]
pub(super) const SOURCE: &[Key] = &[
    key("name", Name, Required, "",
        "Name of the source; no two are equal. The order of its documents depends on it."),
    key("path", FilePattern, Required, "",
        "Its token shards: a Parquet file, a folder of them, or a pattern such as \
         `code/*.parquet`."),
    key("weight", Number(Positive), Is("1.0"), "share of tokens",
        "Its part of the mixture, relative to the other sources."),
    key("max_epochs", Number(Positive), Absent("no limit"), "epochs",
        "How often its documents may be used; then the mixture goes on without it, and it is an \
         error when no source is left."),
];

/// `[validation]`
#[rustfmt::skip]
pub(super) const VALIDATION: &[Key] = &[
    key("fraction", Number(BelowOne), Is("0.0"), "share of documents",
        "Documents held back from training, chosen by a hash of their id; 0 turns validation \
         off."),
    key("every_steps", Integer(1, MAX_STEPS), Is("100"), "steps",
        "Validation interval; it also happens at the end of each stage."),
    key("batches", Integer(1, 1 << 20), Is("8"), "global batches",
        "The most that one validation reads."),
];

/// `[optimizer]`
#[rustfmt::skip]
pub(super) const OPTIMIZER: &[Key] = &[
    key("lr", Number(Positive), Required, "", "Peak learning rate."),
    key("betas", Pair(BelowOne), Is("[0.9, 0.95]"), "",
        "Decay rates of the first and second moment."),
    key("eps", Number(Positive), Is("1e-8"), "", "Added to the root of the second moment."),
    key("weight_decay", Number(NotNegative), Is("0.1"), "per step, times the learning rate",
        "Decoupled weight decay."),
    key("no_decay", Patterns, Is("[\"*norm.weight\", \"*.bias\"]"), "",
        "Tensors without weight decay, matched like `model.freeze`."),
    key("moments_dtype", Choice(&["fp32", "bf16"]), Is("\"fp32\""), "",
        "Number format in which the moments are kept. bf16 saves 4 bytes per parameter; they are \
         computed in fp32 and rounded to nearest when stored, so `betas` must not be greater than \
         0.99609375 (a slower decay would be lost in rounding)."),
    key("offload", Boolean, Is("false"), "",
        "Master weights and moments lie in page-locked host memory and pass through the GPU when they \
         are updated: 12 bytes per parameter less on the GPU, the same bits, a slower update. Only with \
         `device = \"cuda\"`. See [Memory](memory.md#optimizer-state-in-host-memory)."),
    key("clip_norm", Number(NotNegative), Is("1.0"), "",
        "Gradients are scaled down to this global norm; 0 turns clipping off."),
    key("warmup_steps", STEPS, Is("0"), "steps", "Linear warm-up at the start of a stage."),
    key("schedule", Choice(&["cosine", "linear", "constant", "wsd"]), Is("\"cosine\""), "",
        "How the learning rate goes from its peak to its end."),
    key("min_lr_ratio", Number(UpToOne), Is("0.1"), "share of the peak",
        "Learning rate of a stage's last step; `constant` has no use for it."),
    key("decay_steps", Integer(1, MAX_STEPS), Absent("see `stage.decay_steps`"), "steps",
        "`wsd`: length of the final decay."),
    key("decay_shape", Choice(&["sqrt", "linear", "cosine"]), Is("\"sqrt\""), "",
        "`wsd`: shape of the final decay."),
];

/// `[checkpoint]`
#[rustfmt::skip]
pub(super) const CHECKPOINT: &[Key] = &[
    key("every_steps", Integer(1, MAX_STEPS), Is("500"), "steps",
        "Save interval; the end of each stage is saved too."),
    key("at_end", Boolean, Is("true"), "",
        "The end of the last stage is saved. `false` leaves nothing behind that the run could be \
         extended or exported from: for benchmarks and trials."),
    key("keep", Integer(1, 1 << 20), Is("3"), "checkpoints", "Newest checkpoints kept."),
    key("keep_every", Integer(1, MAX_STEPS), Absent("none"), "steps",
        "Checkpoints whose step is a multiple of this are kept for good, beside the newest; a \
         multiple of `every_steps`."),
    key("ephemeral_every_steps", Integer(1, MAX_STEPS), Absent("none"), "steps",
        "Interval of saves in between, less than `every_steps`. Such a checkpoint goes as soon as a \
         newer one is there, and does not count for `keep`."),
    key("async", Boolean, Is("true"), "",
        "Training goes on while a checkpoint is written, from a copy in memory; `false` waits for \
         the disk."),
    key("when_busy", Choice(&["wait", "skip"]), Is("\"wait\""), "",
        "What a periodic save does while the one before is still being written: wait for it, or be \
         left out. The save at a stage's end and on a stop always waits."),
    key("dir", Path, Rule("`checkpoints` in `run.dir`"), "", "Where checkpoints lie."),
];

/// `[guard]`
#[rustfmt::skip]
pub(super) const GUARD: &[Key] = &[
    key("replica_check_steps", STEPS, Is("100"), "steps",
        "Interval at which ranks compare hashes of the weights that they hold in common; it happens \
         before every save too. Where one differs the run stops and names the rank. 0 turns it \
         off."),
    key("skip_samples", IntegerPairs(0, 1 << 62), Is("[]"), "samples",
        "Samples to leave out, as a list of `[first, end]` without the end, by their index in the \
         run: counted from 0 over all stages, with those that were left out. Batches are filled up \
         with the samples that follow."),
    key("spike_policy", Choice(&["off", "skip", "rollback"]), Is("\"off\""), "",
        "What follows a step whose loss or gradient norm stands out: nothing, its update is not \
         applied, or the run goes back to its last checkpoint and leaves out the samples since."),
    key("spike_window", Integer(16, 1 << 20), Is("128"), "steps",
        "Accepted steps that a step is compared with; begins once a quarter of them, at least 16, \
         are there."),
    key("spike_zscore", Number(Positive), Is("6.0"), "standard deviations",
        "How far above the mean of the window a step stands out."),
    key("max_skipped_steps", STEPS, Is("10"), "steps",
        "The most steps that may be skipped in a row, for whatever reason; one more ends the run."),
    key("max_rollbacks", Integer(0, 1 << 20), Is("5"), "per run",
        "The most times that the run goes back by itself; one more ends it."),
    key("start_timeout", TimeSpan, Is("\"30m\""), "",
        "The longest time in which a rank makes no progress before its first step, and where a stage \
         begins: it loads weights and looks through data."),
    key("hang_timeout", TimeSpan, Is("\"10m\""), "",
        "The longest time in which a rank makes no progress (an action of a step, of a validation, \
         bytes of a save); then it counts as hung. Longer than the longest action."),
    key("lease", TimeSpan, Is("\"30s\""), "",
        "The longest time without a sign of life of a rank; then it counts as dead."),
    key("stop_grace", TimeSpan, Is("\"10s\""), "",
        "How long the step under way may go on after a request to stop. A longer one is given up, \
         and the state before it is saved."),
    key("watch_interface", Text, Absent("chosen by the system"), "",
        "Network interface (`eth0`) or address over which ranks watch each other."),
];

/// `[[stage]]`
#[rustfmt::skip]
pub(super) const STAGE: &[Key] = &[
    key("name", Name, Required, "", "Name of the stage; no two are equal."),
    key("seq_len", Integer(1, 1 << 24), Required, "tokens", "Length of a sample."),
    key("rope_base", Number(AboveOne), From("model.rope_base"), "", "RoPE base (theta)."),
    key("steps", Integer(1, MAX_STEPS), Rule("`tokens / batch_tokens`, rounded up"), "steps",
        "Length of the stage; this or `tokens`."),
    key("tokens", Integer(1, 1 << 62), Absent("`steps` is given"), "tokens",
        "Length of the stage; becomes `steps`, rounded up to whole steps."),
    key("batch_tokens", Integer(1, 1 << 32), Required, "tokens",
        "Global batch: all ranks, all micro-batches; a multiple of `seq_len`."),
    key("micro_batch", Integer(1, 1 << 20), Is("1"), "samples per rank",
        "Samples computed at once; gradient accumulation follows from it."),
    key("lr", Number(Positive), From("optimizer.lr"), "", "Peak learning rate."),
    key("warmup_steps", STEPS, From("optimizer.warmup_steps"), "steps",
        "Linear warm-up at the start of the stage."),
    key("schedule", Choice(&["cosine", "linear", "constant", "wsd"]), From("optimizer.schedule"),
        "", "How the learning rate goes from its peak to its end."),
    key("min_lr_ratio", Number(UpToOne), From("optimizer.min_lr_ratio"), "share of the peak",
        "Learning rate of the last step."),
    key("decay_steps", Integer(1, MAX_STEPS),
        Rule("`wsd`: `optimizer.decay_steps`, else a tenth of `steps`, at least 1"),
        "steps", "Length of the final decay; only with `schedule = \"wsd\"`."),
    key("decay_shape", Choice(&["sqrt", "linear", "cosine"]),
        Rule("`wsd`: `optimizer.decay_shape`"),
        "", "Shape of the final decay; only with `schedule = \"wsd\"`."),
    key("optimizer", Choice(&["keep", "reset"]), Is("\"keep\""), "",
        "`reset` forgets AdamW's moments and time on entry to the stage."),
    key("weights", Shares, Rule("`weight` of each `[[data.source]]`"), "shares of tokens",
        "Mixture of this stage, `{ code = 0.3, web = 0.7 }`; a source that is not named is not \
         used."),
];
