//! Measures the kernels on this machine: `cargo run --release --example throughput [THREADS]`.
//!
//! Prints one line per op and dtype (the best of several runs) and ends with one line of JSON. The
//! sizes are those of a 512-wide model with 8 query and 2 key-value heads of 64. With 1 thread,
//! time is the processor time of that thread where Linux tells it, so that a busy machine does not
//! spoil the figures; with more threads it is the time on the wall.

use std::time::Instant;

use oxitron_kernels::attention::{self, Gradients, Inputs};
use oxitron_kernels::linear::{self, WeightGradient};
use oxitron_kernels::linear_cross_entropy as loss;
use oxitron_kernels::{
    DocumentStarts, Error, RopeTable, Threads, Workspace, adamw, add, cpu_prefers_bf16, embedding,
    norm, rms_norm, rope, swiglu,
};
use tch::{Device, Kind, Tensor};

/// Figures in the order they were measured: name and value.
struct Table(Vec<(String, f64)>);

impl Table {
    /// Best of `runs`, printed as `amount / seconds` in `unit`.
    fn measure(
        &mut self,
        name: &str,
        (amount, unit): (f64, &str),
        runs: usize,
        mut run: impl FnMut() -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut best = f64::INFINITY;
        for _ in 0..runs {
            best = best.min(seconds_of(&mut run)?);
        }
        println!(
            "{name:<42} {:>10.3} ms {:>9.1} {unit}",
            best * 1e3,
            amount / best
        );
        self.0.push((name.to_owned(), amount / best));
        Ok(())
    }
}

/// Seconds of one call, averaged over as many calls as take a tenth of a second: the processor
/// time of a thread advances in steps of a few milliseconds.
fn seconds_of(run: &mut impl FnMut() -> Result<(), Error>) -> Result<f64, Error> {
    let alone = Threads::current().count() == 1;
    let (start, cpu) = (Instant::now(), cpu_seconds());
    let mut calls = 0.0;
    loop {
        run()?;
        calls += 1.0;
        let seconds = match (cpu, cpu_seconds()) {
            (Some(before), Some(after)) if alone => after - before,
            _ => start.elapsed().as_secs_f64(),
        };
        if seconds > 0.1 {
            return Ok(seconds / calls);
        }
    }
}

/// Processor time of the calling thread so far.
fn cpu_seconds() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    let nanoseconds: f64 = text.split_whitespace().next()?.parse().ok()?;
    Some(nanoseconds * 1e-9)
}

fn random(shape: &[i64], kind: Kind) -> Tensor {
    Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind)
}

fn zeros(shape: &[i64], kind: Kind) -> Tensor {
    Tensor::zeros(shape, (kind, Device::Cpu))
}

fn main() -> Result<(), Error> {
    let threads = std::env::args().nth(1).and_then(|count| count.parse().ok());
    let threads = match threads {
        Some(count) => Threads::set(count)?,
        None => Threads::current(),
    };
    let bf16 = cpu_prefers_bf16();
    println!(
        "{} threads; bf16 preferred: {} ({})",
        threads.count(),
        bf16.prefer,
        bf16.reason
    );
    println!(
        "bf16 weight gradients by {:?}",
        WeightGradient::of_this_machine()
    );

    let mut table = Table(Vec::new());
    for (kind, short) in [(Kind::Float, "fp32"), (Kind::BFloat16, "bf16")] {
        matrices(&mut table, kind, short)?;
        elementwise(&mut table, kind, short)?;
        head(&mut table, kind, short)?;
        for tokens in [1024, 4096, 16384, 32768] {
            attend(
                &mut table,
                kind,
                short,
                DocumentStarts::whole(1, tokens),
                "one document",
            )?;
        }
        let starts: Vec<u32> = (0..8).map(|document| document * 512).collect();
        let packed = DocumentStarts::new(4096, &[starts])?;
        attend(&mut table, kind, short, packed, "8 documents")?;
    }
    optimizer(&mut table)?;

    let fields: Vec<String> = table
        .0
        .iter()
        .map(|(name, value)| format!("\"{name}\":{value:.2}"))
        .collect();
    println!("{{{}}}", fields.join(","));
    Ok(())
}

fn matrices(table: &mut Table, kind: Kind, short: &str) -> Result<(), Error> {
    let n = 4096;
    let mut workspace = Workspace::new(Device::Cpu);
    for (i, o) in [(512, 512), (512, 768), (512, 2816), (1408, 512)] {
        let (x, w, dy) = (
            random(&[n, i], kind),
            random(&[o, i], kind),
            random(&[n, o], kind),
        );
        let (mut y, mut dx) = (zeros(&[n, o], kind), zeros(&[n, i], kind));
        let mut dw = zeros(&[o, i], Kind::Float);
        let work = (2e-9 * (n * i * o) as f64, "GFLOP/s");
        let name = |what: &str| format!("{short} linear {i}->{o} {what}");
        table.measure(&name("forward"), work, 3, || {
            linear::forward(&x, &w, &mut y)
        })?;
        table.measure(&name("dgrad"), work, 3, || {
            linear::backward_input(&dy, &w, &mut dx, false)
        })?;
        for way in [WeightGradient::OneDnn, WeightGradient::Mkl] {
            if kind == Kind::BFloat16 || way == WeightGradient::OneDnn {
                let what = if kind == Kind::Float {
                    "wgrad".into()
                } else {
                    format!("{way:?}")
                };
                table.measure(&name(&what), work, 3, || {
                    linear::backward_weight_by(way, &dy, &x, &mut dw, &mut workspace)
                })?;
            }
        }
    }
    Ok(())
}

fn elementwise(table: &mut Table, kind: Kind, short: &str) -> Result<(), Error> {
    let (n, h, i) = (8192, 512, 1408);
    let bytes = kind.elt_size_in_bytes() as f64;
    let gigabytes = |bytes_each: f64, count: i64| (1e-9 * bytes_each * count as f64, "GB/s");
    let mut workspace = Workspace::new(Device::Cpu);

    let (x, w) = (random(&[n, h], Kind::Float), random(&[h], kind));
    let (mut y, mut rstd) = (zeros(&[n, h], kind), zeros(&[n], Kind::Float));
    let (mut dx, mut dw) = (zeros(&[n, h], Kind::Float), zeros(&[h], Kind::Float));
    let moved = gigabytes(4.0 + bytes, n * h);
    table.measure(&format!("{short} rms_norm forward"), moved, 3, || {
        rms_norm::forward(&x, &w, 1e-5, &mut y, &mut rstd)
    })?;
    let moved = gigabytes(12.0 + bytes, n * h);
    table.measure(&format!("{short} rms_norm backward"), moved, 3, || {
        rms_norm::backward(&y, &x, &w, &rstd, &mut dx, Some(&mut dw), &mut workspace)
    })?;
    table.measure(
        &format!("{short} add"),
        gigabytes(8.0 + bytes, n * h),
        3,
        || add::in_place(&mut dx, &y),
    )?;

    let gate_up = random(&[n, 2 * i], kind);
    let (mut act, mut dgate_up) = (zeros(&[n, i], kind), zeros(&[n, 2 * i], kind));
    table.measure(
        &format!("{short} swiglu forward"),
        gigabytes(3.0 * bytes, n * i),
        3,
        || swiglu::forward(&gate_up, &mut act),
    )?;
    table.measure(
        &format!("{short} swiglu backward"),
        gigabytes(5.0 * bytes, n * i),
        3,
        || swiglu::backward(&act, &gate_up, &mut dgate_up),
    )?;

    let rotary = RopeTable::new(1e4, 64, n as usize)?;
    let positions = Tensor::arange(n, (Kind::Int64, Device::Cpu));
    let qkv = random(&[n, 12, 64], kind);
    let mut heads = qkv.narrow(1, 0, 10);
    table.measure(
        &format!("{short} rope"),
        gigabytes(2.0 * bytes, n * 640),
        3,
        || rope::forward(&rotary, &positions, &mut heads),
    )?;

    let ids = Tensor::randint(8192, [n], (Kind::Int64, Device::Cpu));
    let mut demb = zeros(&[8192, h], Kind::Float);
    table.measure(
        &format!("{short} embedding backward"),
        gigabytes(12.0, n * h),
        3,
        || embedding::backward(&ids, &dx, &mut demb),
    )
}

fn head(table: &mut Table, kind: Kind, short: &str) -> Result<(), Error> {
    let (n, h, v) = (4096, 512, 16384);
    let (x, w) = (random(&[n, h], kind), random(&[v, h], kind) * 0.02);
    let targets = Tensor::randint(v, [n], (Kind::Int64, Device::Cpu));
    let (mut dx, mut dw) = (zeros(&[n, h], kind), zeros(&[v, h], Kind::Float));
    let mut sum = zeros(&[1], Kind::Double);
    let mut workspace = Workspace::new(Device::Cpu);
    let inputs = loss::Inputs {
        x: &x,
        w: &w,
        targets: &targets,
        weights: None,
        vocab_size: v as usize,
        chunk: loss::DEFAULT_CHUNK,
    };
    let work = (6e-9 * (n * h * v) as f64, "GFLOP/s");
    table.measure(
        &format!("{short} head and loss, vocab {v}"),
        work,
        3,
        || {
            let losses = loss::Losses {
                sum: &mut sum,
                per_token: None,
            };
            let gradients = loss::Gradients {
                dx: Some(&mut dx),
                dw: Some(&mut dw),
            };
            loss::forward_backward(&inputs, losses, gradients, &mut workspace)
        },
    )
}

fn attend(
    table: &mut Table,
    kind: Kind,
    short: &str,
    documents: DocumentStarts,
    what: &str,
) -> Result<(), Error> {
    let seq = documents.seq() as i64;
    let qkv = random(&[1, seq, 12, 64], kind);
    let dqkv = zeros(&[1, seq, 12, 64], kind);
    let (q, k, v) = (
        qkv.narrow(2, 0, 8),
        qkv.narrow(2, 8, 2),
        qkv.narrow(2, 10, 2),
    );
    let inputs = Inputs {
        q: &q,
        k: &k,
        v: &v,
        documents: &documents,
        scale: 0.125,
    };
    let mut out = zeros(&[1, seq, 8, 64], kind);
    let mut lse = zeros(&[1, 8, seq], Kind::Float);
    let mut workspace = Workspace::new(Device::Cpu);
    // Two products of 2·64 operations per pair and head forward, five backward.
    let pairs = 1e-9 * documents.attention_pairs() as f64 * 8.0 * 128.0;
    let runs = if seq > 8192 { 1 } else { 3 };
    let name = |pass: &str| format!("{short} attention {seq}, {what}, {pass}");
    table.measure(&name("forward"), (2.0 * pairs, "GFLOP/s"), runs, || {
        attention::forward(&inputs, &mut out, &mut lse, &mut workspace)
    })?;
    let dout = random(&[1, seq, 8, 64], kind);
    table.measure(&name("backward"), (5.0 * pairs, "GFLOP/s"), runs, || {
        let gradients = Gradients {
            dq: &mut dqkv.narrow(2, 0, 8),
            dk: &mut dqkv.narrow(2, 8, 2),
            dv: &mut dqkv.narrow(2, 10, 2),
        };
        attention::backward(&inputs, &out, &lse, &dout, gradients, &mut workspace)
    })
}

fn optimizer(table: &mut Table) -> Result<(), Error> {
    let n = 16 << 20;
    let mut master = random(&[n], Kind::Float);
    let grad = random(&[n], Kind::Float);
    let (mut exp_avg, mut exp_avg_sq) = (zeros(&[n], Kind::Float), zeros(&[n], Kind::Float));
    let mut weight = zeros(&[n], Kind::BFloat16);
    let hyper = adamw::AdamW {
        lr: 1e-3,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
        grad_scale: 1.0,
        step: 1,
    };
    // Read four fp32 streams; write three and one of bf16.
    let moved = (1e-9 * 30.0 * n as f64, "GB/s");
    table.measure("adamw with bf16 weights", moved, 3, || {
        let state = adamw::State {
            master: &mut master,
            exp_avg: &mut exp_avg,
            exp_avg_sq: &mut exp_avg_sq,
        };
        adamw::step(&hyper, state, &grad, Some(&mut weight))
    })?;
    let read = (4e-9 * n as f64, "GB/s");
    table.measure("sum of squares", read, 3, || {
        norm::sum_of_squares(&grad).map(drop)
    })
}
