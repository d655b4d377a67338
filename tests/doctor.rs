//! `oxitron doctor`: what a machine has and what it lacks.

#![allow(clippy::unwrap_used)]

#[path = "support/mod.rs"]
mod support;

use support::run;

#[test]
fn a_machine_is_described_and_what_gpus_lack_is_named() {
    let output = run(&["doctor"]);
    let text = output.stdout;
    assert_eq!(output.code, Some(0), "{text}");
    for name in [
        "processor",
        "libtorch ",
        "MPI",
        "NVIDIA driver",
        "NVRTC",
        "NCCL",
    ] {
        assert!(text.contains(name), "{name}: {text}");
    }
    let strict = run(&["doctor", "--device", "cuda"]);
    let complete = !text.contains("  missing  ");
    assert_eq!(strict.code == Some(0), complete, "{text}");
    if complete {
        println!("skipped: this machine lacks nothing");
        return;
    }
    assert_eq!(strict.code, Some(1));
    for line in text.lines().filter(|line| line.starts_with("  missing  ")) {
        let (problem, remedy) = line.split_once("; ").unwrap();
        // The loader's words about a file, or the driver's about GPUs.
        assert!(
            problem.contains("lib") || problem.contains("driver"),
            "{line}"
        );
        assert!(!remedy.is_empty(), "{line}");
    }
}
