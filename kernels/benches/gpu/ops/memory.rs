//! What is nothing but a way through memory.

use oxitron_kernels::decision::{Betas, Decision, Limits, Record, decide};
use oxitron_kernels::{Error, Workspace, adamw, cast, norm, rms_norm};
use tch::{Kind, Tensor};

use super::{Model, STREAMS, T, bytes, with_stream};
use crate::place::{Place, torch};
use crate::suite::{Op, Suite, Work, named};

const BETAS: Betas = Betas {
    first: 0.9,
    second: 0.95,
};

pub fn norms(suite: &mut Suite, model: Model, place: Place) {
    let [n, h] = [model.tokens, model.hidden];
    let shape = || format!("{n} × {h}");
    for stream in STREAMS {
        let (r, t) = (bytes(n * h, stream), bytes(n * h, T));
        let weights = || place.random(&[h], T);

        let moved = r + t;
        let op = Op::moving("rms_norm forward", shape(), with_stream(stream), moved);
        suite.add(op, || {
            let w = weights()?;
            let mut sets = place.sets(moved, |_| {
                let x = place.random(&[n, h], stream)?;
                let y = place.output(&[n, h], T)?;
                Ok((x, y, place.output(&[n], Kind::Float)?))
            })?;
            Ok(move || {
                let (x, y, rstd) = sets.advance();
                rms_norm::forward(x, &w, 1e-5, y, rstd)
            })
        });

        // The stream's gradient is read and written, and written once more, rounded.
        let moved = 3.0 * r + 2.0 * t;
        let op = Op::moving("rms_norm backward", shape(), with_stream(stream), moved);
        suite.add(op, || {
            let w = weights()?;
            let rstd = Tensor::f_ones([n], (Kind::Float, place.device())).map_err(torch)?;
            let mut dw = place.random(&[h], Kind::Float)?;
            let mut workspace = Workspace::new(place.device());
            let mut sets = place.sets(moved, |_| {
                let (x, dy) = (place.random(&[n, h], stream)?, place.random(&[n, h], T)?);
                let dx = place.random(&[n, h], stream)?;
                Ok((x, dy, dx, place.output(&[n, h], T)?))
            })?;
            Ok(move || {
                let (x, dy, dx, rounded) = sets.advance();
                let saved = rms_norm::Saved {
                    x,
                    w: &w,
                    rstd: &rstd,
                };
                let gradients = rms_norm::Gradients {
                    dx,
                    rounded: Some(rounded),
                    dw: Some(&mut dw),
                };
                rms_norm::backward(dy, saved, gradients, &mut workspace)
            })
        });
    }
}

/// Activations between dtypes, and gradients of a block added up.
pub fn casts(suite: &mut Suite, model: Model, place: Place) {
    let [n, h] = [model.tokens, model.hidden];
    let both = [
        (Kind::Float, T, "fp32 → bf16"),
        (T, Kind::Float, "bf16 → fp32"),
    ];
    for (from, to, dtype) in both {
        let moved = bytes(n * h, from) + bytes(n * h, to);
        let op = Op::moving("cast forward", format!("{n} × {h}"), dtype, moved);
        suite.add(op, || {
            let mut sets = place.sets(moved, |_| {
                Ok((place.random(&[n, h], from)?, place.output(&[n, h], to)?))
            })?;
            Ok(move || {
                let (x, out) = sets.advance();
                cast::forward(x, out)
            })
        });
    }
    let n = model.block();
    for (from, dtype) in [(T, "bf16 + fp32"), (Kind::Float, "fp32 + fp32")] {
        let moved = bytes(n, from) + 2.0 * bytes(n, Kind::Float);
        let op = Op::moving("cast accumulate", n.to_string(), dtype, moved);
        suite.add(op, || {
            let mut sets = place.sets(moved, |_| {
                Ok((place.random(&[n], from)?, place.random(&[n], Kind::Float)?))
            })?;
            Ok(move || {
                let (x, out) = sets.advance();
                cast::accumulate(x, out)
            })
        });
    }
}

/// Gradient norm, verdict and update of a block's parameters.
pub fn optimizer(suite: &mut Suite, model: Model, place: Place) {
    let n = model.block();
    let moved = bytes(n, Kind::Float);
    let op = Op::moving("norm", n.to_string(), "fp32", moved);
    suite.add(op, || {
        let mut workspace = Workspace::new(place.device());
        let mut total = place.numbers(&[0.0, 0.0])?;
        let mut sets = place.sets(moved, |_| place.random(&[n], Kind::Float))?;
        Ok(move || norm::add_sum_of_squares(sets.advance(), &mut total, &mut workspace))
    });

    let op = Op {
        name: "decision",
        shape: String::new(),
        dtype: "fp64",
        work: Work::Launch,
    };
    suite.add(op, || {
        let sums = place.numbers(&[1.0, 1.0, 1.0])?;
        let mut record = Record::empty(place.device())?;
        let mut decision = Decision::new(0, place.device())?;
        Ok(move || {
            let limits = Limits::clip(1.0);
            decide(&sums, &limits, BETAS, &mut record, &mut decision)
        })
    });

    for moments in [Kind::Float, Kind::BFloat16] {
        // Gradient and master weights, both moments read and written, and the rounded weights.
        let moved = 3.0 * bytes(n, Kind::Float) + 4.0 * bytes(n, moments) + bytes(n, T);
        let dtype = match named(moments) {
            "bf16" => "bf16 moments",
            _ => "fp32 moments",
        };
        let op = Op::moving("adamw", n.to_string(), dtype, moved);
        suite.add(op, || update(place, n, moments));
    }
}

fn update(
    place: Place,
    n: i64,
    moments: Kind,
) -> Result<impl FnMut() -> Result<(), Error> + 'static, Error> {
    let mut master = place.scaled(&[n], Kind::Float, 0.02)?;
    let grad = place.scaled(&[n], Kind::Float, 1e-3)?;
    let mut exp_avg = place.scaled(&[n], moments, 1e-3)?;
    let mut exp_avg_sq = place.scaled(&[n], moments, 1e-3)?;
    exp_avg_sq = exp_avg_sq.f_square_().map_err(torch)?;
    let mut weight = place.output(&[n], T)?;
    let decision = updating(place)?;
    let hyper = adamw::AdamW {
        lr: 1e-5,
        beta1: BETAS.first,
        beta2: BETAS.second,
        eps: 1e-8,
        weight_decay: 0.1,
    };
    Ok(move || {
        let state = adamw::State {
            master: &mut master,
            exp_avg: &mut exp_avg,
            exp_avg_sq: &mut exp_avg_sq,
        };
        adamw::step(&hyper, state, &grad, Some(&mut weight), &decision)
    })
}

/// What lets the optimizer update: a loss of one token and a gradient.
fn updating(place: Place) -> Result<Decision, Error> {
    let mut decision = Decision::new(0, place.device())?;
    let mut record = Record::empty(place.device())?;
    let sums = place.numbers(&[1.0, 1.0, 1.0])?;
    decide(&sums, &Limits::clip(1.0), BETAS, &mut record, &mut decision)?;
    Ok(decision)
}
