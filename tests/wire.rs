//! Bytes on the wire as Open MPI counts them, against `oxitron plan`.

#![allow(clippy::unwrap_used)]

mod support;

use std::fs;

use serde_json::Value;
use support::{Fixture, run, start_with};

const STAGE: &str = r#"
[[stage]]
name = "only"
seq_len = 32
steps = 2
batch_tokens = 512
"#;

/// Steps of the two runs: what start-up and end send is in both.
const SHORT: u64 = 2;
const LONG: u64 = 6;

/// Bytes of point-to-point messages that each rank has sent, as the monitoring layer of Open MPI's
/// message engine saw them.
fn sent(fixture: &Fixture, arguments: &[&str], ranks: usize, name: &str) -> Vec<u64> {
    let counts = fixture.text(name);
    let environment = [
        ("OMPI_MCA_pml_monitoring_enable", "2"),
        ("OMPI_MCA_pml_monitoring_enable_output", "3"),
        ("OMPI_MCA_pml_monitoring_filename", counts.as_str()),
    ];
    start_with(arguments, &environment).wait().done();
    let of_rank = |rank: usize| {
        let text = fs::read_to_string(format!("{counts}.{rank}.prof")).unwrap();
        // E, from, to, "N bytes", …: messages of the program, not of the library.
        let messages = text.lines().filter(|line| line.starts_with('E'));
        messages
            .map(|line| {
                let bytes = line.split('\t').nth(3).unwrap().split(' ').next().unwrap();
                bytes.parse::<u64>().unwrap()
            })
            .sum()
    };
    (0..ranks).map(of_rank).collect()
}

#[test]
fn ranks_send_what_the_plan_says_in_every_mode() {
    let fixture = Fixture::new();
    let config = fixture.config(STAGE);
    let config = config.to_str().unwrap();
    for (zero_stage, ranks, shard, dtype) in [
        ("0", 2, "\"world\"", "fp32"),
        ("1", 2, "\"world\"", "fp32"),
        ("2", 2, "\"world\"", "fp32"),
        ("3", 2, "\"world\"", "fp32"),
        ("1", 4, "2", "bf16"),
        ("3", 4, "2", "fp32"),
    ] {
        let sets = [
            format!("parallel.zero_stage={zero_stage}"),
            format!("parallel.shard_size={shard}"),
            format!("parallel.grad_reduce_dtype={dtype}"),
            "guard.replica_check_steps=0".to_owned(),
        ];
        let ranks_text = ranks.to_string();
        let mut common = vec![config, "--ranks", &ranks_text];
        for set in &sets {
            common.extend(["--set", set]);
        }
        let plan = run(&[&["plan"][..], &common, &["--json"]].concat()).done();
        let plan: Value = serde_json::from_str(&plan.stdout).unwrap();
        let stage = &plan["stages"][0];
        let figure = |key: &str| stage[key].as_u64().unwrap();
        let planned: u64 = [
            "reduce_bytes",
            "gather_bytes",
            "replicate_bytes",
            "control_bytes",
        ]
        .map(figure)
        .iter()
        .sum();

        let counted = [SHORT, LONG].map(|steps| {
            let name = format!("zero-{zero_stage}-{ranks}-{steps}");
            let (dir, steps) = (format!("run.dir={name}"), format!("stage.0.steps={steps}"));
            let own = ["--set", &dir, "--set", &steps];
            let arguments = [&["launch"][..], &common, &own].concat();
            sent(&fixture, &arguments, ranks, &format!("{name}-counts"))
        });
        for (rank, (short, long)) in counted[0].iter().zip(&counted[1]).enumerate() {
            let per_step = (long - short) as f64 / (LONG - SHORT) as f64;
            let ratio = per_step / planned as f64;
            println!(
                "ZeRO-{zero_stage} on {ranks} ranks, gradients {dtype}: rank {rank} sent \
                 {per_step} bytes a step, {ratio:.4} of the plan"
            );
            assert!((ratio - 1.0).abs() <= 0.03, "{per_step} against {planned}");
        }
    }
}
