//! What the plan counts is what libtorch's allocator counts.
//!
//! Memory is counted for the whole process, so these checks have a process of their own and run
//! one after the other. The ranks of a case are threads of it: their bytes are added up.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::convert::Infallible;
use std::path::Path;
use std::sync::Barrier;

use oxitron_kernels::cuda::emulated;
use oxitron_kernels::product::{Engine, with_engine};
use oxitron_kernels::{
    RopeTable, Threads,
    adamw::AdamW,
    decision::{self, Betas, Decision, Limits, Record},
    memory,
};
use oxitron_trainer::comm::{Comm, Wire};
use oxitron_trainer::config::{Config, Dtype, ModelConfig, Recompute};
use oxitron_trainer::model::{Activations, Batch, Decoder, Objective, activation_bytes, describe};
use oxitron_trainer::plan::{
    Action, ElementBytes, Home, Layout, ShardMap, StepShape, Units, emit_opening, emit_step,
    staging_bytes, state_bytes,
};
use oxitron_trainer::zero::{Groups, InitialValues, StateForm, Zero};
use tch::{Device, Kind, Tensor};

/// 3.0 million parameters.
const MODEL: &str = r#"
[model]
vocab_size = 2048
hidden_size = 256
intermediate_size = 704
num_layers = 3
num_heads = 8
num_kv_heads = 4
[data]
[[data.source]]
name = "none"
path = "none"
[optimizer]
lr = 1e-3
[[stage]]
name = "one"
seq_len = 64
steps = 1
batch_tokens = 64
"#;

#[test]
fn the_plan_counts_what_the_allocator_counts() {
    memory::install().unwrap();
    let config = Config::from_text(MODEL, "test.toml", Path::new("/"), &[]).unwrap();
    for (threads, engine) in [(1, Engine::Own), (3, Engine::Own), (1, Engine::Libtorch)] {
        Threads::set(threads).unwrap();
        for dtype in [Dtype::Fp32, Dtype::Bf16] {
            for recompute in Recompute::ALL {
                println!("{threads} threads, products {}", engine.name());
                // oneDNN allocates scratch of its own.
                let steady = engine == Engine::Own;
                let home = Home::Device;
                with_engine(engine, || {
                    activations(&config.model, dtype, recompute, home, (true, steady));
                });
            }
        }
    }
    Threads::set(1).unwrap();
    for (dtype, recompute, home) in [
        (Dtype::Fp32, Recompute::None, Home::Device),
        (Dtype::Fp32, Recompute::Attention, Home::Host),
        (Dtype::Fp32, Recompute::Full, Home::Host),
        (Dtype::Bf16, Recompute::Attention, Home::Host),
    ] {
        println!("emulated kernels of GPUs");
        // The emulator widens the factors of bf16 products, which a GPU does not.
        let steady = dtype == Dtype::Fp32;
        emulated(|| activations(&config.model, dtype, recompute, home, (false, steady)));
    }
    for stage in 0..=3 {
        for (ranks, shard) in [(1, 1), (2, 2), (4, 4), (4, 2)] {
            let kinds = (Dtype::Fp32, Kind::Float);
            state(&config.model, kinds, Home::Device, stage, ranks, shard);
        }
        for home in [Home::Device, Home::Host] {
            let state = |dtype, moments, ranks| {
                state(&config.model, (dtype, moments), home, stage, ranks, ranks);
            };
            state(Dtype::Bf16, Kind::Float, 2);
            state(Dtype::Bf16, Kind::BFloat16, 2);
            state(Dtype::Fp32, Kind::BFloat16, 1);
        }
    }
}

/// Compares a measured number of bytes with the planned one.
#[track_caller]
fn compare(what: &str, measured: u64, planned: usize, tolerance: f64) {
    let ratio = measured as f64 / planned as f64;
    println!("{what}: measured {measured}, planned {planned}, ratio {ratio:.4}");
    assert!((ratio - 1.0).abs() <= tolerance, "{what}: ratio {ratio}");
}

/// Buffers of a micro-batch, and the peak of a forward and backward pass.
///
/// `steady` is where a step allocates nothing once it has been taken twice; elsewhere stand-ins and
/// libraries do, beside what is planned.
fn activations(
    model: &ModelConfig,
    dtype: Dtype,
    recompute: Recompute,
    home: Home,
    (on_processor, steady): (bool, bool),
) {
    const SAMPLES: usize = 4;
    const SEQ_LEN: usize = 512;
    let what = format!("activations, {dtype:?}, recompute {recompute}, state on {home:?}");
    let units = units(model);
    let decoder = Decoder::new(model, dtype);
    let (layout, map) = (Layout::solo(), ShardMap::new(&units, 1));
    let form = StateForm {
        compute: decoder.compute_kind(),
        moments: Kind::Float,
        wire: Wire::F32,
        home,
    };
    let groups = Groups::new(&Comm::solo(), &layout.mesh).unwrap();
    let mut zero = Zero::new(&units, &map, &layout, groups, form, Device::Cpu).unwrap();
    load(&mut zero);
    let batch = batch(SAMPLES, SEQ_LEN, model.vocab_size);
    let rope = RopeTable::new(1e4, model.head_dim, SEQ_LEN, Device::Cpu).unwrap();
    let planned = activation_bytes(model, dtype, batch.token_count(), recompute, Device::Cpu);

    // What a step decides from is no buffer of a micro-batch.
    let (squares, decision) = (squares(), updating());
    let before = memory::stats().current_bytes;
    memory::reset_peak();
    let mut buffers = decoder
        .activations(batch.token_count(), recompute, Device::Cpu)
        .unwrap();
    let built = memory::stats();
    let allocated = planned.kept + planned.shared;
    compare(&what, built.current_bytes - before, allocated, 0.01);
    assert_eq!(built.peak_bytes, built.current_bytes, "{what}");

    let actions = emit_step(&units, &map, &layout, shape(1, recompute));
    let mut walk = Walk {
        decoder: &decoder,
        rope: &rope,
        batch: &batch,
        activations: &mut buffers,
        zero: &mut zero,
        squares,
        decision,
    };
    // The second pass finds the workspace as large as it gets.
    for _ in 0..2 {
        memory::reset_peak();
        walk.step(&actions);
    }
    let settled = memory::stats();
    walk.step(&actions);
    let after = memory::stats();
    if steady {
        assert_eq!(
            after.allocations, settled.allocations,
            "{what}: a step allocates"
        );
    }
    compare(
        &format!("{what}, with workspace"),
        after.current_bytes - before,
        planned.total(),
        0.02,
    );
    if on_processor || steady {
        compare(
            &format!("{what}, peak"),
            after.peak_bytes - before,
            planned.total(),
            0.02,
        );
    }
}

/// Weights, gradients and optimizer state of all ranks after some steps.
fn state(
    model: &ModelConfig,
    (dtype, moments): (Dtype, Kind),
    home: Home,
    stage: u8,
    ranks: usize,
    shard: usize,
) {
    let units = units(model);
    let layout = Layout::new(stage, ranks, shard);
    let map = ShardMap::new(&units, layout.mesh.shard);
    let shape = shape(2, Recompute::Full);
    let actions = emit_step(&units, &map, &layout, shape);
    let bytes = ElementBytes {
        weight: match dtype {
            Dtype::Fp32 => 4,
            Dtype::Bf16 => 2,
        },
        moment: moments.elt_size_in_bytes(),
    };
    let planned = state_bytes(&units, &map, &layout, &actions, bytes, home);

    let barrier = Barrier::new(ranks);
    let rank = |comm: Comm| {
        Threads::set(1).unwrap();
        let decoder = Decoder::new(model, dtype);
        let groups = Groups::new(&comm, &layout.mesh).unwrap();
        let form = StateForm {
            compute: decoder.compute_kind(),
            moments,
            wire: Wire::F32,
            home,
        };
        let mut zero = Zero::new(&units, &map, &layout, groups, form, Device::Cpu).unwrap();
        load(&mut zero);
        let opening = emit_opening(&units, &map, &layout, shape);
        let batch = batch(1, 16, model.vocab_size);
        let rope = RopeTable::new(1e4, model.head_dim, 16, Device::Cpu).unwrap();
        let mut buffers = decoder
            .activations(16, Recompute::Full, Device::Cpu)
            .unwrap();
        let mut walk = Walk {
            decoder: &decoder,
            rope: &rope,
            batch: &batch,
            activations: &mut buffers,
            zero: &mut zero,
            squares: squares(),
            decision: updating(),
        };
        walk.step(&opening);
        for _ in 0..2 {
            walk.step(&actions);
        }
        let staged = zero.staging(0..zero.units()).unwrap().bytes();
        let planned = staging_bytes(&units, &map, &layout);
        // Only rounding makes the shares of later ranks smaller.
        assert!(staged <= planned && staged * 100 >= planned * 99);
        assert!(comm.rank() > 0 || staged == planned);
        barrier.wait();
        let with = memory::stats().current_bytes;
        barrier.wait();
        drop(zero);
        // The last gathers may still be under way; until they end their memory stays.
        comm.finish().unwrap();
        barrier.wait();
        let without = memory::stats().current_bytes;
        barrier.wait();
        with - without
    };
    let freed: Vec<u64> = std::thread::scope(|scope| {
        let comms = Comm::threads(ranks).unwrap();
        let threads: Vec<_> = comms
            .into_iter()
            .map(|comm| scope.spawn(|| rank(comm)))
            .collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, u64>| thread.join().unwrap();
        threads.into_iter().map(join).collect()
    });
    let (replicas, shard) = (layout.mesh.replicate, layout.mesh.shard);
    let what = format!(
        "state, stage {stage}, {dtype:?}, moments {moments:?}, on {home:?}, {replicas} groups of {shard}"
    );
    compare(&what, freed[0] / ranks as u64, planned.total(), 0.01);
}

fn units(model: &ModelConfig) -> Units {
    describe(model, |_| true, |_| true).unwrap()
}

fn shape(accumulation: usize, recompute: Recompute) -> StepShape {
    StepShape {
        accumulation,
        overlap: true,
        recompute,
        prefetch_units: 1,
    }
}

fn load(zero: &mut Zero) {
    let values = InitialValues { seed: 1 };
    let read = |spec: &_, state, range, out: &mut [f32]| {
        values.read(spec, state, range, out);
        Ok::<_, Infallible>(())
    };
    zero.load(read).unwrap();
}

/// Samples of one document each.
fn batch(samples: usize, seq_len: usize, vocab_size: usize) -> Batch {
    let tokens: Vec<i64> = (0..samples * seq_len)
        .map(|index| (index * 7919 % vocab_size) as i64)
        .collect();
    Batch::new(
        &tokens,
        &tokens,
        &vec![vec![0]; samples],
        seq_len,
        Device::Cpu,
    )
    .unwrap()
}

/// What the actions of a step work on; every micro-batch is the same.
struct Walk<'a> {
    decoder: &'a Decoder,
    rope: &'a RopeTable,
    batch: &'a Batch,
    activations: &'a mut Activations,
    zero: &'a mut Zero,
    squares: Tensor,
    decision: Decision,
}

const ADAMW: AdamW = AdamW {
    lr: 1e-3,
    beta1: 0.9,
    beta2: 0.95,
    eps: 1e-8,
    weight_decay: 0.1,
};

/// Where the squares of the gradient are added up.
fn squares() -> Tensor {
    Tensor::zeros([2], (Kind::Double, Device::Cpu))
}

/// To update with a thousandth of the gradient.
fn updating() -> Decision {
    let mut decision = Decision::new(0, Device::Cpu).unwrap();
    let mut record = Record::empty(Device::Cpu).unwrap();
    let sums = Tensor::from_slice(&[1.0, 1000.0, 1.0]);
    let betas = Betas {
        first: ADAMW.beta1,
        second: ADAMW.beta2,
    };
    decision::decide(&sums, &Limits::clip(0.0), betas, &mut record, &mut decision).unwrap();
    decision
}

impl Walk<'_> {
    fn step(&mut self, actions: &[Action]) {
        let Self {
            decoder,
            rope,
            batch,
            activations,
            zero,
            squares,
            decision,
        } = self;
        let last = decoder.layers() - 1;
        for &action in actions {
            match action {
                Action::Forward { layer, .. } if layer == last => {
                    let weights = zero.weights(layer).unwrap();
                    let mut gradients = zero.gradients(layer).unwrap();
                    let objective = Objective::LossAndGradient {
                        gradients: &mut gradients,
                    };
                    decoder
                        .head(&weights, batch, activations, objective)
                        .unwrap();
                }
                Action::Recompute { layer, .. } => {
                    let weights = zero.weights(layer).unwrap();
                    decoder
                        .recompute(layer, &weights, batch, rope, activations)
                        .unwrap();
                }
                Action::Forward { layer, .. } => {
                    let weights = zero.weights(layer).unwrap();
                    decoder
                        .forward(layer, &weights, batch, rope, activations)
                        .unwrap();
                }
                Action::Backward { layer, .. } => {
                    let weights = zero.weights(layer).unwrap();
                    let mut gradients = zero.gradients(layer).unwrap();
                    decoder
                        .backward(layer, &weights, &mut gradients, batch, rope, activations)
                        .unwrap();
                }
                Action::Exchange(exchange) => zero.exchange(exchange).unwrap(),
                Action::Norm { piece } => zero.add_sum_of_squares(piece, squares).unwrap(),
                Action::Update { piece } => zero.update(piece, &ADAMW, decision).unwrap(),
                Action::Evaluate { .. } | Action::Control => {}
            }
        }
    }
}
