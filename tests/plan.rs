//! `oxitron plan`: figures that can be computed by hand, the order of a step, and what is refused.

#![allow(clippy::unwrap_used)]

#[path = "support/mod.rs"]
mod support;

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use support::{Fixture, ONE_STAGE, Output, TWO_STAGES, run};

fn plan(config: &Path, more: &[&str]) -> Output {
    let mut args = vec!["plan", config.to_str().unwrap()];
    args.extend(more);
    run(&args)
}

fn json_of(config: &Path, more: &[&str]) -> Value {
    let output = plan(config, &[&["--json"], more].concat()).done();
    serde_json::from_str(&output.stdout).unwrap()
}

#[track_caller]
fn expect(found: &Value, figures: &[(&str, Value)]) {
    for (key, value) in figures {
        assert_eq!(&found[key], value, "{key}");
    }
}

/// Bytes of the workspace of a micro-batch: they depend on this machine's caches and cores.
fn workspace_bytes(config: &Path) -> usize {
    let found = json_of(config, &[]);
    let workspace = &found["stages"][0]["activations_workspace_bytes"];
    workspace.as_u64().unwrap() as usize
}

/// So many bytes more than the workspace takes, as an argument.
fn beside_workspace(config: &Path, bytes: usize) -> String {
    format!("{}KiB", (workspace_bytes(config) + bytes) >> 10)
}

/// Elements of all units, each matrix padded to 128: embedding and head of 512 · 64, two blocks of
/// 128 + 128 · 64 + 64 · 64 + 128 + 352 · 64 + 64 · 176, and the final norm.
const PADDED: usize = 2 * 32_768 + 2 * 46_336 + 128;

#[test]
fn two_shard_groups_of_two_hold_and_send_what_the_formulas_say() {
    let fixture = Fixture::without_data();
    let config = fixture.config(ONE_STAGE);
    let hybrid = ["--ranks", "4", "--set", "parallel.shard_size=2"];
    let found = json_of(&config, &hybrid);
    expect(
        &found,
        &[
            ("ranks", json!(4)),
            ("parameters", json!(158_016)),
            ("dtype", json!("fp32")),
            ("shard_groups", json!(2)),
            ("first_shard_group", json!([0, 1])),
            ("replica_groups", json!(2)),
            ("first_replica_group", json!([0, 2])),
            // The embedding: half of it to be summed in the group, the same between the groups.
            ("floor_bytes", json!(2 * 32_768 / 2 * 4)),
            ("memory_bytes", Value::Null),
        ],
    );
    // Elements per token: what a block keeps of activations, the residual stream and statistics.
    let (kept, statistics, hidden) = (64 + 128 + 64 + 64 + 352 + 176, 1 + 4 + 1, 64);
    let block = kept + hidden + statistics;
    // The gradient of the activation is never stored; that of the residual stream is.
    let gradients = kept - 176 + hidden;
    let shared = gradients + 2 * hidden + 1;
    let workspace = workspace_bytes(&config);
    let without = 4 * 64 * (3 * hidden + 2 * block + shared) + workspace;
    let with = 4 * 64 * (3 * hidden + block + shared) + workspace;
    // Norm, queries, keys and values, attention; the norm's statistic and one per head.
    let branch = 64 + 128 + 64 + 1 + 4;
    let between = 4 * 64 * (3 * hidden + 2 * (block - branch) + branch + shared) + workspace;
    expect(
        &found["stages"][0],
        &[
            ("accumulation", json!(1)),
            ("micro_batch_tokens", json!(64)),
            ("weights_bytes", json!(PADDED * 4)),
            ("gradients_bytes", json!(PADDED * 4)),
            ("master_bytes", json!(PADDED / 2 * 4)),
            ("moments_bytes", json!(PADDED / 2 * 8)),
            ("buffers_bytes", json!(0)),
            ("activations_bytes", json!(without)),
            (
                "activations_by_recompute_bytes",
                json!({"none": without, "attention": between, "full": with}),
            ),
            ("reduce_bytes", json!(PADDED / 2 * 4)),
            ("gather_bytes", json!(PADDED / 2 * 4)),
            ("replicate_bytes", json!(PADDED / 2 * 4)),
            // Two of six numbers are summed here: four sent to be summed, two sums sent to three.
            ("control_bytes", json!(10 * 8)),
            ("staging_bytes", json!(PADDED / 4 * 12)),
            ("fits", Value::Null),
            ("floor_seconds", Value::Null),
        ],
    );
    let bf16 = ["--set", "parallel.grad_reduce_dtype=bf16"];
    let found = json_of(&config, &[&hybrid[..], &bf16].concat());
    expect(
        &found["stages"][0],
        &[
            ("reduce_bytes", json!(PADDED / 2 * 2)),
            ("replicate_bytes", json!(PADDED / 2 * 2)),
        ],
    );
    assert_eq!(fixture.files(), ["config.toml"]);
}

#[test]
fn a_cluster_gives_memory_and_times() {
    let fixture = Fixture::without_data();
    let config = fixture.config(TWO_STAGES);
    let cluster = fixture.text("cluster.toml");
    fs::write(
        &cluster,
        "name = \"pair\"\ndevice = \"cpu\"\nranks_per_node = 2\nmemory = \"64MiB\"\n\
         bytes_per_second_in_node = 1e6\nbytes_per_second_between_nodes = 1e5\n",
    )
    .unwrap();
    let batch = "stage.1.batch_tokens=512";
    let args = ["--ranks", "4", "--cluster", &cluster, "--set", batch];
    let found = json_of(
        &config,
        &[&args[..], &["--set", "parallel.shard_size=node"]].concat(),
    );
    assert_eq!(found["ranks_per_node"], 2);
    assert_eq!(found["stages"].as_array().unwrap().len(), 2);
    let stage = &found["stages"][0];
    let floor = 65_536.0 / 1e6 + 65_536.0 / 1e5;
    assert!((stage["floor_seconds"].as_f64().unwrap() - floor).abs() < 1e-9);
    // One sample is all that a rank has to compute in a step.
    assert_eq!(stage["largest_micro_batch"]["none"], 1);
    assert_eq!(stage["fits"], true);
    let memory = beside_workspace(&config, 5 << 20);
    let direct = ["--set", "checkpoint.async=false", "--memory", &memory];
    let alone = json_of(&config, &[&["--cluster", &cluster], &direct[..]].concat());
    let stage = &alone["stages"][0];
    let largest = |recompute: &str| stage["largest_micro_batch"][recompute].as_u64().unwrap();
    let [without, between, with] = ["none", "attention", "full"].map(largest);
    assert!(1 <= without && without <= between, "{stage}");
    assert!(between <= with && with <= 4, "{stage}");
    let set = format!("stage.0.micro_batch={without}");
    let fitting = json_of(&config, &[&direct[..], &["--set", &set]].concat());
    assert_eq!(fitting["stages"][0]["fits"], true);
}

/// A plan for GPUs needs none: what lies in host memory does not count against theirs.
#[test]
fn memory_of_the_gpu_and_of_the_host_are_told_apart() {
    let fixture = Fixture::without_data();
    let config = fixture.config(ONE_STAGE);
    let cuda = ["--set", "run.device=cuda"];
    let found = json_of(&config, &cuda);
    assert_eq!(found["device"], "cuda");
    let bytes = |found: &Value, key: &str| found["stages"][0][key].as_u64().unwrap();
    let staging = bytes(&found, "staging_bytes");
    assert_eq!(staging, PADDED as u64 * 12);
    assert_eq!(bytes(&found, "host_bytes"), staging);
    let whole = bytes(&found, "device_bytes");
    assert_eq!(bytes(&found, "total_bytes"), whole + staging);

    let offload = [&cuda[..], &["--set", "optimizer.offload=true"]].concat();
    let moved = json_of(&config, &offload);
    let optimizer = PADDED as u64 * 12;
    assert_eq!(bytes(&moved, "host_bytes"), staging + optimizer);
    // The largest slice passes at once, through two buffers: that of a block.
    let passing = 2 * 46_336 * 12;
    assert_eq!(bytes(&moved, "passing_bytes"), passing);
    assert_eq!(bytes(&moved, "device_bytes"), whole - optimizer + passing);

    // What fits is what fits on the GPU, and staging is not there.
    let memory = whole.to_string();
    let fitting = [&cuda[..], &["--memory", &memory]].concat();
    assert_eq!(json_of(&config, &fitting)["stages"][0]["fits"], true);
    let memory = (whole - 1).to_string();
    let tight = [&cuda[..], &["--memory", &memory]].concat();
    assert_eq!(json_of(&config, &tight)["stages"][0]["fits"], false);

    let full = [&cuda[..], &["--set", "parallel.recompute=full"]].concat();
    let memory = (bytes(&json_of(&config, &full), "device_bytes") - 1).to_string();
    plan(&config, &[&cuda[..], &["--memory", &memory]].concat())
        .refused(2, &["what would fit: optimizer.offload = true ("]);

    let text = plan(&config, &offload).done().stdout;
    let [gpu, host] =
        ["GPU memory of a rank", "host memory of a rank"].map(|title| text.find(title).unwrap());
    let moments = text.find("  moments").unwrap();
    assert!(gpu < host && host < moments, "{text}");

    // A cluster of GPUs is one for configs that leave the device open.
    let cluster = fixture.text("cluster.toml");
    fs::write(
        &cluster,
        "name = \"one\"\ndevice = \"cuda\"\nranks_per_node = 1\nmemory = \"64GiB\"\n\
         bytes_per_second_in_node = 1e6\nbytes_per_second_between_nodes = 1e5\n",
    )
    .unwrap();
    assert_eq!(json_of(&config, &["--cluster", &cluster])["device"], "cuda");
    let processor = ["--cluster", &cluster, "--set", "run.device=cpu"];
    assert_eq!(json_of(&config, &processor)["device"], "cpu");
}

#[test]
fn a_step_is_printed_in_order() {
    let fixture = Fixture::without_data();
    let config = fixture.config(ONE_STAGE);
    let hybrid = [
        "--ranks",
        "4",
        "--set",
        "parallel.shard_size=2",
        "--memory",
        "1GiB",
    ];
    let short = plan(&config, &hybrid).done().stdout;
    for phrase in [
        "shard     2 groups of 2, the first ranks 0-1",
        "replica   2 groups of 2, the first ranks 0, 2",
        "158,016 parameters in fp32",
        "a step of stage \"short\": 4 forward, 4 backward, 5 reduce, 5 replicate, 5 norm, 1 control, \
         5 update, 5 gather",
        "  backward, reduce, replicate: block.1 … embedding, micro-batch 0\n",
        "  norm: norm … embedding\n  control\n  update, gather: embedding … head\n",
    ] {
        assert!(short.contains(phrase), "{phrase:?} is not in\n{short}");
    }
    let long = plan(&config, &[&hybrid[..], &["--actions"]].concat())
        .done()
        .stdout;
    let mut rest = long.as_str();
    for line in [
        "before the first step:\n",
        "  gather     embedding\n",
        "a step of stage",
        "  forward    block.1, micro-batch 0\n",
        "  backward   block.1, micro-batch 0\n  reduce     block.1\n  replicate  block.1\n",
        "  backward   embedding, micro-batch 0\n  reduce     embedding\n",
        "  norm       embedding\n  control\n  update     embedding\n  gather     embedding\n",
    ] {
        let at = rest.find(line);
        assert!(at.is_some(), "{line:?} does not follow in\n{long}");
        rest = &rest[at.unwrap_or(0) + line.len()..];
    }
    let sharded = [
        "--ranks",
        "2",
        "--set",
        "parallel.zero_stage=3",
        "--actions",
    ];
    let found = json_of(&config, &sharded);
    let first = json!({"action": "hold", "of": "embedding", "remark": "weights"});
    assert_eq!(found["opening_actions"][0], first);
    assert!(found["stages"][0]["buffers_bytes"].as_u64().unwrap() > 0);
    let counts = &found["stages"][0]["action_counts"];
    assert_eq!(counts["hold"], counts["drop"]);
}

#[test]
fn what_cannot_run_is_refused() {
    let fixture = Fixture::without_data();
    let config = fixture.config(ONE_STAGE);
    plan(&config, &["--ranks", "5"]).refused(
        2,
        &[
            "holds 4 samples of 64 tokens",
            "start at most 4 ranks",
            "context parallelism over 2",
        ],
    );
    plan(&config, &["--ranks", "4", "--set", "parallel.shard_size=3"]).refused(
        2,
        &[
            "it must divide the number of all ranks (4)",
            "use one of 1, 2, 4",
        ],
    );
    plan(
        &config,
        &[
            "--ranks",
            "4",
            "--ranks-per-node",
            "3",
            "--set",
            "parallel.shard_size=node",
        ],
    )
    .refused(2, &["which has 3 ranks here"]);
    let direct = ["--set", "checkpoint.async=false"];
    let beside = |kib: usize| beside_workspace(&config, kib << 10);
    let [three, four, some] = [3 << 10, 4 << 10, 8900].map(beside);
    plan(&config, &[&["--memory", &three], &direct[..]].concat()).refused(
        2,
        &[
            "stage \"short\": a rank needs ",
            "even with micro_batch = 1 and recompute = \"full\", and has ",
            "what would fit: 2 ranks (",
        ],
    );
    plan(&config, &["--memory", &four])
        .refused(2, &["fit: checkpoint.async = false (", "2 ranks ("]);
    let deep = ["--set", "model.num_layers=12", "--memory", &some];
    plan(&config, &[&["--ranks", "2"], &deep[..], &direct].concat())
        .refused(2, &["what would fit: zero_stage = 2 (", "4 ranks ("]);
    plan(&config, &["--memory", "1MiB"]).refused(2, &["it takes more memory or a smaller model"]);
    plan(&config, &["--memory", "24G"]).refused(2, &["`24G` is no size of memory", "24GiB"]);
    let cluster = fixture.text("cluster.toml");
    plan(&config, &["--cluster", &cluster]).refused(2, &[&cluster, "No such file"]);
    fs::write(&cluster, "nodes = 3\n").unwrap();
    plan(&config, &["--cluster", &cluster]).refused(2, &["unknown field `nodes`", "line 1"]);
    plan(&config, &["--set", "parallel.zero_stge=1"]).refused(2, &["did you mean `zero_stage`?"]);
}
