//! The ops on the shapes of two models. Each is called in one place.
//!
//! Products run on 2,048 tokens; what is limited by memory runs on so many rows that caches hardly
//! help, as in a step, which touches much more between two looks at the same tensor: the same rows
//! for fp32 as for bf16.

use oxitron_kernels::attention::{self, Gradients, Inputs};
use oxitron_kernels::decision::{Betas, Decision, Limits, Record, decide};
use oxitron_kernels::embedding::TokenIds;
use oxitron_kernels::linear_cross_entropy as loss;
use oxitron_kernels::linear_glu::Activation;
use oxitron_kernels::linear_rope::Rotation;
use oxitron_kernels::product::{Engine, with_engine};
use oxitron_kernels::{
    DocumentStarts, Error, RopeTable, Workspace, adamw, embedding, linear, linear_add, linear_glu,
    linear_rope, norm, rms_norm,
};
use tch::{Device, Kind, Tensor};

use crate::floors::Floor;
use crate::report::{Bench, Op};

/// Sizes of a decoder.
struct Model {
    hidden: i64,
    inner: i64,
    query_heads: i64,
    key_heads: i64,
}

/// 55 million parameters with 8 layers: the model that the other benchmarks train.
const SMALL: Model = Model {
    hidden: 512,
    inner: 1408,
    query_heads: 8,
    key_heads: 2,
};

/// A wider one.
const WIDE: Model = Model {
    hidden: 2048,
    inner: 5504,
    query_heads: 32,
    key_heads: 8,
};

const VOCABULARY: i64 = 32000;
const HEAD_DIM: i64 = 64;
const TOKENS: i64 = 2048;

impl Model {
    /// Inputs and outputs of the products of a block.
    fn products(&self) -> [(i64, i64); 4] {
        let (query, key) = (self.query_heads * HEAD_DIM, self.key_heads * HEAD_DIM);
        [
            (self.hidden, query + 2 * key),
            (query, self.hidden),
            (self.hidden, 2 * self.inner),
            (self.inner, self.hidden),
        ]
    }
}

pub fn measure_all(bench: &mut Bench) -> Result<(), Error> {
    for kind in [Kind::BFloat16, Kind::Float] {
        products(bench, &SMALL, kind)?;
        if !bench.options.quick {
            products(bench, &WIDE, kind)?;
        }
        head(bench, kind)?;
        for (documents, shape) in documents()? {
            attend(bench, &documents, shape, kind)?;
        }
        norms(bench, kind)?;
        rotation(bench, kind)?;
        embed(bench, kind)?;
        optimizer(bench, kind)?;
    }
    gradient_norm(bench)
}

fn random(shape: &[i64], kind: Kind) -> Tensor {
    Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind)
}

fn zeros(shape: &[i64], kind: Kind) -> Tensor {
    Tensor::zeros(shape, (kind, Device::Cpu))
}

/// Bytes of an element.
fn size(kind: Kind) -> f64 {
    kind.elt_size_in_bytes() as f64
}

/// The products of a block by themselves, by each engine, and with what the model fuses to them.
fn products(bench: &mut Bench, model: &Model, kind: Kind) -> Result<(), Error> {
    for shape in model.products() {
        for engine in [Engine::Own, Engine::Libtorch] {
            with_engine(engine, || plain(bench, shape, kind, engine))?;
        }
    }
    with_engine(Engine::Own, || fused(bench, model, kind))
}

fn product(name: &str, [i, o]: [i64; 2], kind: Kind) -> Op {
    Op {
        name: name.to_owned(),
        shape: format!("{TOKENS} × {i} → {o}"),
        kind,
        work: (2 * TOKENS * i * o) as f64,
        floor: Floor::products(kind),
    }
}

fn plain(bench: &mut Bench, (i, o): (i64, i64), kind: Kind, engine: Engine) -> Result<(), Error> {
    let names = ["linear", "linear dgrad", "linear wgrad"];
    if !bench.wants(&names) {
        return Ok(());
    }
    let mut workspace = Workspace::new(Device::Cpu);
    let (x, w) = (random(&[TOKENS, i], kind), random(&[o, i], kind));
    let (dy, mut y) = (random(&[TOKENS, o], kind), zeros(&[TOKENS, o], kind));
    let (mut dx, mut dw) = (zeros(&[TOKENS, i], kind), zeros(&[o, i], Kind::Float));
    let [forward, dgrad, wgrad] = names.map(|name| match engine {
        Engine::Own => product(name, [i, o], kind),
        Engine::Libtorch => product(&format!("{name} by libtorch"), [i, o], kind),
    });
    bench.measure(forward, || linear::forward(&x, &w, &mut y, &mut workspace))?;
    bench.measure(dgrad, || {
        linear::backward_input(&dy, &w, &mut dx, &mut workspace)
    })?;
    bench.measure(wgrad, || {
        linear::backward_weight(&dy, &x, &mut dw, &mut workspace)
    })
}

fn fused(bench: &mut Bench, model: &Model, kind: Kind) -> Result<(), Error> {
    let names = [
        "linear + rope",
        "linear + add",
        "linear + swiglu",
        "linear dgrad + swiglu backward",
    ];
    if !bench.wants(&names) {
        return Ok(());
    }
    let [rope, add, swiglu, swiglu_backward] = names;
    let mut workspace = Workspace::new(Device::Cpu);
    let (h, inner) = (model.hidden, model.inner);
    let turned = model.query_heads + model.key_heads;
    let all = (turned + model.key_heads) * HEAD_DIM;
    let (x, stream) = (
        random(&[TOKENS, h], kind),
        random(&[TOKENS, h], Kind::Float),
    );

    let table = RopeTable::new(1e4, HEAD_DIM as usize, TOKENS as usize, Device::Cpu)?;
    let rotation = Rotation {
        table: &table,
        positions: &Tensor::arange(TOKENS, (Kind::Int64, Device::Cpu)),
        heads: turned as usize,
    };
    let (w, mut qkv) = (random(&[all, h], kind), zeros(&[TOKENS, all], kind));
    bench.measure(product(rope, [h, all], kind), || {
        linear_rope::forward(&x, &w, &rotation, &mut qkv, &mut workspace)
    })?;

    let w = random(&[2 * inner, h], kind);
    let (mut gate_up, mut gated) = (
        zeros(&[TOKENS, 2 * inner], kind),
        zeros(&[TOKENS, inner], kind),
    );
    bench.measure(product(swiglu, [h, 2 * inner], kind), || {
        linear_glu::forward(
            Activation::Silu,
            &x,
            &w,
            &mut gate_up,
            &mut gated,
            &mut workspace,
        )
    })?;

    let (w, mut sum) = (random(&[h, inner], kind), zeros(&[TOKENS, h], Kind::Float));
    bench.measure(product(add, [inner, h], kind), || {
        linear_add::forward(&gated, &w, &stream, &mut sum, &mut workspace)
    })?;
    let mut dgate_up = zeros(&[TOKENS, 2 * inner], kind);
    bench.measure(product(swiglu_backward, [inner, h], kind), || {
        linear_glu::backward(
            Activation::Silu,
            &x,
            &w,
            &gate_up,
            &mut dgate_up,
            &mut workspace,
        )
    })
}

/// The head with its loss and both gradients.
fn head(bench: &mut Bench, kind: Kind) -> Result<(), Error> {
    if !bench.wants(&["head"]) {
        return Ok(());
    }
    let (n, h, v) = (TOKENS, SMALL.hidden, VOCABULARY);
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
        chunk: loss::default_chunk(Device::Cpu),
    };
    let op = Op {
        name: "head".to_owned(),
        shape: format!("{n} × {h} → {v}"),
        kind,
        work: (6 * n * h * v) as f64,
        floor: Floor::products(kind),
    };
    bench.measure(op, || {
        let losses = loss::Losses {
            sum: &mut sum,
            per_token: None,
        };
        let gradients = loss::Gradients {
            dx: Some(&mut dx),
            dw: Some(&mut dw),
        };
        loss::forward_backward(&inputs, losses, gradients, &mut workspace)
    })
}

/// Samples and the documents in them.
fn documents() -> Result<[(DocumentStarts, &'static str); 4], Error> {
    let packed = |documents: u32, tokens: u32| {
        let starts: Vec<u32> = (0..documents).map(|document| document * tokens).collect();
        DocumentStarts::new((documents * tokens) as usize, &[starts])
    };
    Ok([
        (DocumentStarts::whole(2, 1024), "2 × 1024"),
        (DocumentStarts::whole(1, 4096), "1 × 4096"),
        (packed(8, 512)?, "1 × 4096, 8 of 512"),
        (packed(64, 64)?, "1 × 4096, 64 of 64"),
    ])
}

fn attend(
    bench: &mut Bench,
    documents: &DocumentStarts,
    shape: &str,
    kind: Kind,
) -> Result<(), Error> {
    if !bench.wants(&["attention", "attention backward"]) {
        return Ok(());
    }
    let (batch, seq) = (documents.batch() as i64, documents.seq() as i64);
    let (queries, keys, d) = (SMALL.query_heads, SMALL.key_heads, HEAD_DIM);
    let all = queries + 2 * keys;
    let (qkv, dqkv) = (
        random(&[batch, seq, all, d], kind),
        zeros(&[batch, seq, all, d], kind),
    );
    let parts = |x: &Tensor| {
        let (key, value) = (queries, queries + keys);
        [(0, queries), (key, keys), (value, keys)].map(|(at, heads)| x.narrow(2, at, heads))
    };
    let [q, k, v] = parts(&qkv);
    let inputs = Inputs {
        q: &q,
        k: &k,
        v: &v,
        documents,
        starts: None,
        scale: 0.125,
    };
    let mut out = zeros(&[batch, seq, queries, d], kind);
    let mut lse = zeros(&[batch, queries, seq], Kind::Float);
    let dout = random(&[batch, seq, queries, d], kind);
    let mut workspace = Workspace::new(Device::Cpu);
    let product = documents.attention_pairs() as f64 * (2 * queries * d) as f64;
    let op = |name: &str, products: f64| Op {
        name: name.to_owned(),
        shape: shape.to_owned(),
        kind,
        work: products * product,
        floor: Floor::products(kind),
    };
    bench.measure(op("attention", 2.0), || {
        attention::forward(&inputs, &mut out, &mut lse, &mut workspace)
    })?;
    // Where nobody asked for the forward pass, the gradient still needs what it leaves behind.
    attention::forward(&inputs, &mut out, &mut lse, &mut workspace)?;
    bench.measure(op("attention backward", 5.0), || {
        let [mut dq, mut dk, mut dv] = parts(&dqkv);
        let gradients = Gradients {
            dq: &mut dq,
            dk: &mut dk,
            dv: &mut dv,
        };
        attention::backward(&inputs, &out, &lse, &dout, gradients, &mut workspace)
    })
}

/// An op that memory limits: rows × width elements, so many bytes for each.
fn moving(name: &'static str, [rows, width]: [i64; 2], kind: Kind, bytes: f64, floor: Floor) -> Op {
    Op {
        name: name.to_owned(),
        shape: match width {
            1 => rows.to_string(),
            _ => format!("{rows} × {width}"),
        },
        kind,
        work: bytes * (rows * width) as f64,
        floor,
    }
}

fn norms(bench: &mut Bench, kind: Kind) -> Result<(), Error> {
    if !bench.wants(&["rms_norm", "rms_norm backward"]) {
        return Ok(());
    }
    let (bytes, h) = (4.0 + size(kind), SMALL.hidden);
    let n = bench.rows_of(6 * h);
    let (x, w) = (random(&[n, h], Kind::Float), random(&[h], kind));
    let (mut y, mut rstd) = (zeros(&[n, h], kind), zeros(&[n], Kind::Float));
    let (mut dx, mut dw) = (zeros(&[n, h], Kind::Float), zeros(&[h], Kind::Float));
    let mut rounded = zeros(&[n, h], kind);
    let mut workspace = Workspace::new(Device::Cpu);
    let op = moving("rms_norm", [n, h], kind, bytes, Floor::Triad);
    bench.measure(op, || rms_norm::forward(&x, &w, 1e-5, &mut y, &mut rstd))?;
    let bytes = 12.0 + 2.0 * size(kind);
    let op = moving("rms_norm backward", [n, h], kind, bytes, Floor::Update);
    bench.measure(op, || {
        let saved = rms_norm::Saved {
            x: &x,
            w: &w,
            rstd: &rstd,
        };
        let gradients = rms_norm::Gradients {
            dx: &mut dx,
            rounded: Some(&mut rounded),
            dw: Some(&mut dw),
        };
        rms_norm::backward(&y, saved, gradients, &mut workspace)
    })
}

fn rotation(bench: &mut Bench, kind: Kind) -> Result<(), Error> {
    if !bench.wants(&["rope backward"]) {
        return Ok(());
    }
    let turned = SMALL.query_heads + SMALL.key_heads;
    let all = turned + SMALL.key_heads;
    let bytes = 2.0 * size(kind);
    let n = bench.rows_of(4 * turned * HEAD_DIM);
    let table = RopeTable::new(1e4, HEAD_DIM as usize, TOKENS as usize, Device::Cpu)?;
    let positions = Tensor::arange(n, (Kind::Int64, Device::Cpu)).remainder(TOKENS);
    let mut dqkv = random(&[n, all * HEAD_DIM], kind);
    let op = moving(
        "rope backward",
        [n, turned * HEAD_DIM],
        kind,
        bytes,
        Floor::Update,
    );
    let rotation = Rotation {
        table: &table,
        positions: &positions,
        heads: turned as usize,
    };
    bench.measure(op, || linear_rope::backward(&rotation, &mut dqkv))
}

fn embed(bench: &mut Bench, kind: Kind) -> Result<(), Error> {
    if !bench.wants(&["embedding", "embedding backward"]) {
        return Ok(());
    }
    let (bytes, h, v) = (4.0 + size(kind), SMALL.hidden, VOCABULARY);
    let n = bench.rows_of(6 * h);
    let ids: Vec<i64> = (0..n).map(|token| token * 7919 % v).collect();
    let ids = TokenIds::new(&ids, Device::Cpu)?;
    let (w, mut y) = (random(&[v, h], kind), zeros(&[n, h], Kind::Float));
    let op = moving("embedding", [n, h], kind, bytes, Floor::Triad);
    bench.measure(op, || embedding::forward(&ids, &w, &mut y))?;
    let mut dw = zeros(&[v, h], Kind::Float);
    let op = moving("embedding backward", [n, h], kind, 12.0, Floor::Update);
    bench.measure(op, || embedding::backward(&ids, &y, &mut dw))
}

fn optimizer(bench: &mut Bench, kind: Kind) -> Result<(), Error> {
    if !bench.wants(&["adamw"]) {
        return Ok(());
    }
    // Four fp32 streams are read, three of them and the weights are written.
    let bytes = 28.0 + size(kind);
    let n = bench.rows_of(30);
    let (mut master, grad) = (random(&[n], Kind::Float), random(&[n], Kind::Float));
    let (mut exp_avg, mut exp_avg_sq) = (zeros(&[n], Kind::Float), zeros(&[n], Kind::Float));
    let mut weight = zeros(&[n], kind);
    let hyper = adamw::AdamW {
        lr: 1e-3,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
    };
    let decision = updating()?;
    let op = moving("adamw", [n, 1], kind, bytes, Floor::Update);
    bench.measure(op, || {
        let state = adamw::State {
            master: &mut master,
            exp_avg: &mut exp_avg,
            exp_avg_sq: &mut exp_avg_sq,
        };
        adamw::step(&hyper, state, &grad, Some(&mut weight), &decision)
    })
}

/// What lets the optimizer update: a loss of one token and a gradient.
fn updating() -> Result<Decision, Error> {
    let mut decision = Decision::new(0, Device::Cpu)?;
    let mut record = Record::empty(Device::Cpu)?;
    let betas = Betas {
        first: 0.9,
        second: 0.95,
    };
    let sums = Tensor::from_slice(&[1.0, 1.0, 1.0]);
    decide(&sums, &Limits::clip(1.0), betas, &mut record, &mut decision)?;
    Ok(decision)
}

fn gradient_norm(bench: &mut Bench) -> Result<(), Error> {
    if !bench.wants(&["norm"]) {
        return Ok(());
    }
    let n = bench.rows_of(4);
    let grad = random(&[n], Kind::Float);
    let op = moving("norm", [n, 1], Kind::Float, 4.0, Floor::Read);
    let mut total = zeros(&[2], Kind::Double);
    let mut workspace = Workspace::new(Device::Cpu);
    bench.measure(op, || {
        norm::add_sum_of_squares(&grad, &mut total, &mut workspace)
    })
}
