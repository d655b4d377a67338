//! The same training between GPUs and over messages: emulated kernels, emulated NCCL.

use oxitron_kernels::cuda::emulated;

use super::ranks::{LR, Mesh, SAMPLES, micro_batches, model, on_every_rank, samples, setting};
use super::runner::{Runner, Staged, staged};
use crate::config::ModelConfig;

/// Enough for a bit that differs to spread to every weight.
const STEPS: usize = 3;

/// What a rank saw and holds: losses and gradient norms, and its state.
type Trained = Vec<(Vec<(f64, f64)>, Vec<Staged>)>;

fn train(model: &ModelConfig, mesh: Mesh, between_gpus: bool) -> Trained {
    let samples = samples(model.vocab_size);
    on_every_rank(mesh.ranks, |comm| {
        emulated(|| {
            if between_gpus {
                comm.open_emulated_gpu().unwrap();
            }
            let mut runner = Runner::new(setting(model, mesh), comm);
            let mut figures = Vec::new();
            for batch in samples.chunks(SAMPLES).take(STEPS) {
                let mine = micro_batches(batch, comm.rank(), mesh.ranks, mesh.accumulation);
                let record = runner.step(&mine, LR).record;
                figures.push((record.mean_loss, record.grad_norm));
            }
            comm.check().unwrap();
            (figures, staged(&mut runner.zero))
        })
    })
}

/// Emulated sums are taken in rank order, so nothing may differ by a bit, in any mode.
#[test]
fn training_between_gpus_is_training_over_messages() {
    let model = model(true, &[]);
    for zero_stage in 0..4 {
        for (ranks, shard) in [(2, 2), (4, 2)] {
            let mesh = Mesh::new(zero_stage, ranks, shard, 2);
            let [messages, gpus] = [false, true].map(|gpus| train(&model, mesh, gpus));
            assert!(messages[0].0[0].0 > 1.0, "{:?}", messages[0].0);
            for (rank, (messages, gpus)) in messages.iter().zip(&gpus).enumerate() {
                let what =
                    format!("rank {rank} of {ranks} in groups of {shard}, ZeRO-{zero_stage}");
                assert_eq!(messages.0, gpus.0, "{what}");
                assert!(messages.1 == gpus.1, "{what}: other state");
            }
        }
    }
}
