//! Memory is counted for the whole process, so these checks have a process of their own and run
//! one after the other.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use oxitron_kernels::linear_cross_entropy::{self, Gradients, Inputs, Losses};
use oxitron_kernels::{Workspace, memory};
use tch::{Device, Kind, Tensor};

#[test]
fn memory() {
    memory::install().unwrap();
    memory::install().unwrap();
    tensors_are_seen_to_come_and_go();
    loss_is_bounded_by_the_chunk();
}

fn tensors_are_seen_to_come_and_go() {
    let before = memory::stats();
    let bytes = 1_000_000;
    let tensor = Tensor::zeros([bytes], (Kind::Uint8, Device::Cpu));
    let during = memory::stats();
    let grown = during.current_bytes - before.current_bytes;
    assert!(
        (bytes as u64..bytes as u64 + 8192).contains(&grown),
        "{grown}"
    );
    assert!(during.peak_bytes >= during.current_bytes);
    assert!(during.allocations > before.allocations);
    drop(tensor);
    let after = memory::stats();
    assert_eq!(after.current_bytes, before.current_bytes);
    assert_eq!(after.peak_bytes, during.peak_bytes, "the peak stays");
    memory::reset_peak();
    assert_eq!(memory::stats().peak_bytes, before.current_bytes);
}

fn loss_is_bounded_by_the_chunk() {
    let (tokens, hidden, vocab, chunk) = (512, 16, 32_768, 32);
    for (kind, width) in [(Kind::Float, 4), (Kind::BFloat16, 2)] {
        let x = Tensor::randn([tokens, hidden], (Kind::Float, Device::Cpu)).to_kind(kind);
        let w = Tensor::randn([vocab, hidden], (Kind::Float, Device::Cpu)).to_kind(kind);
        let targets = Tensor::randint(vocab, [tokens], (Kind::Int64, Device::Cpu));
        let mut sum = Tensor::zeros([1], (Kind::Double, Device::Cpu));
        let mut dx = Tensor::zeros([tokens, hidden], (kind, Device::Cpu));
        let mut dw = Tensor::zeros([vocab, hidden], (Kind::Float, Device::Cpu));
        let mut workspace = Workspace::new(Device::Cpu);
        let inputs = Inputs {
            x: &x,
            w: &w,
            targets: &targets,
            weights: None,
            vocab_size: vocab as usize,
            chunk,
        };
        let mut run = || {
            let losses = Losses {
                sum: &mut sum,
                per_token: None,
            };
            let gradients = Gradients {
                dx: Some(&mut dx),
                dw: Some(&mut dw),
            };
            linear_cross_entropy::forward_backward(&inputs, losses, gradients, &mut workspace)
                .unwrap();
        };
        let before = memory::stats().current_bytes;
        memory::reset_peak();
        run();
        let grown = memory::stats().peak_bytes - before;
        let logits = chunk as u64 * vocab as u64 * width;
        let head = (vocab * hidden) as u64 * width;
        println!("{kind:?}: {grown} bytes for {logits} bytes of logits in a chunk");
        // One chunk of logits, room for a library's own copy of it, the scratch of the head's
        // gradient and the token losses. All logits at once would be 16 chunks.
        assert!(
            grown >= logits,
            "{kind:?}: {grown} bytes cannot hold a chunk of {logits}"
        );
        assert!(
            grown <= 2 * logits + 2 * head + (1 << 20),
            "{kind:?}: {grown} for {logits}"
        );

        // A second call finds everything in the workspace.
        let settled = memory::stats().current_bytes;
        run();
        assert_eq!(memory::stats().current_bytes, settled, "{kind:?}");
    }
}
