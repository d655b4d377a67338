//! Products, and what is done to them before or after.
//!
//! On a GPU libtorch multiplies, and a pass of our own follows. Behind a product of full size the
//! pass would be a small difference between two large times; so it is timed behind one whose inner
//! length is small, and that product, timed by itself, is subtracted. The pass is the same.

use oxitron_kernels::linear_glu::Activation;
use oxitron_kernels::linear_rope::Rotation;
use oxitron_kernels::{
    Error, RopeTable, Workspace, linear, linear_add, linear_glu, linear_rope, rope,
};
use tch::{Kind, Tensor};

use super::{Model, STREAMS, T, bytes, with_stream};
use crate::place::{Place, torch};
use crate::suite::{Op, Suite};

/// The products of a block by themselves.
pub fn linear(suite: &mut Suite, model: Model, place: Place) {
    let n = model.tokens;
    for [i, o] in model.products() {
        let flops = 2 * n * i * o;
        let op = Op::product("linear forward", [n, i, o], flops);
        suite.add(op, || forward(place, [n, i, o]));
        let op = Op::product("linear backward_input", [n, o, i], flops);
        suite.add(op, || backward_input(place, [n, i, o]));
        let mut op = Op::product("linear backward_weight", [n, i, o], flops);
        op.dtype = "bf16 + fp32";
        suite.add(op, || {
            let (x, dy) = (place.random(&[n, i], T)?, place.random(&[n, o], T)?);
            let mut dw = place.random(&[o, i], Kind::Float)?;
            let mut workspace = Workspace::new(place.device());
            Ok(move || linear::backward_weight(&dy, &x, &mut dw, &mut workspace))
        });
    }
}

/// `[n, i]` by weights of `[o, i]`.
pub fn forward(
    place: Place,
    [n, i, o]: [i64; 3],
) -> Result<impl FnMut() -> Result<(), Error> + 'static, Error> {
    let (x, w) = (place.random(&[n, i], T)?, place.random(&[o, i], T)?);
    let mut y = place.output(&[n, o], T)?;
    let mut workspace = Workspace::new(place.device());
    Ok(move || linear::forward(&x, &w, &mut y, &mut workspace))
}

/// `[n, o]` by weights of `[o, i]`.
fn backward_input(
    place: Place,
    [n, i, o]: [i64; 3],
) -> Result<impl FnMut() -> Result<(), Error> + 'static, Error> {
    let (dy, w) = (place.random(&[n, o], T)?, place.random(&[o, i], T)?);
    let mut dx = place.output(&[n, i], T)?;
    let mut workspace = Workspace::new(place.device());
    Ok(move || linear::backward_input(&dy, &w, &mut dx, &mut workspace))
}

/// Queries, keys and values, and the rotation of queries and keys.
pub fn rope(suite: &mut Suite, model: Model, place: Place) {
    let [n, h, o] = [model.tokens, model.hidden, model.qkv()];
    let [d, turned] = [model.head_dim, model.query_heads + model.key_heads];
    let table = move || RopeTable::new(1e6, d as usize, model.seq as usize, place.device());
    let positions = move || place.numbers(&model.positions());

    let op = Op::product("linear_rope forward", [n, h, o], 2 * n * h * o);
    suite.add(op, || {
        let (table, positions) = (table()?, positions()?);
        let (x, w) = (place.random(&[n, h], T)?, place.random(&[o, h], T)?);
        let mut qkv = place.output(&[n, o], T)?;
        let mut workspace = Workspace::new(place.device());
        Ok(move || {
            let rotation = Rotation {
                table: &table,
                positions: &positions,
                heads: turned as usize,
            };
            linear_rope::forward(&x, &w, &rotation, &mut qkv, &mut workspace)
        })
    });

    let moved = 2.0 * bytes(n * turned * d, T) + bytes(n, Kind::Int64);
    for name in ["rope forward", "rope backward"] {
        let op = Op::moving(name, format!("{n} × {turned} × {d}"), "bf16", moved);
        suite.add(op, || {
            let (table, positions) = (table()?, positions()?);
            let turn = match name {
                "rope forward" => rope::forward,
                _ => rope::backward,
            };
            // The heads that turn lie beside those of the values.
            let mut sets = place.sets(moved, |_| {
                let qkv = place.random(&[n, o / d, d], T)?;
                qkv.f_narrow(1, 0, turned).map_err(torch)
            })?;
            Ok(move || turn(&table, &positions, sets.advance()))
        });
    }
}

/// The end of a branch.
pub fn add(suite: &mut Suite, model: Model, place: Place) {
    let [n, i, o] = [model.tokens, model.inner, model.hidden];
    for stream in STREAMS {
        let mut op = Op::product("linear_add forward", [n, i, o], 2 * n * i * o);
        op.dtype = with_stream(stream);
        suite.add(op, || sum(place, [n, i, o], stream));
        let moved = 2.0 * bytes(n * o, stream) + bytes(n * o, T);
        let shape = format!("{n} × {o}");
        let op = Op::moving("linear_add: the sum", shape, with_stream(stream), moved);
        let thin = [n, model.thin, o];
        suite.add_beyond(op, || sum(place, thin, stream), || forward(place, thin));
    }
}

fn sum(
    place: Place,
    [n, i, o]: [i64; 3],
    stream: Kind,
) -> Result<impl FnMut() -> Result<(), Error> + 'static, Error> {
    let (x, w) = (place.random(&[n, i], T)?, place.random(&[o, i], T)?);
    let mut workspace = Workspace::new(place.device());
    let mut sets = place.sets(2.0 * bytes(n * o, stream), |_| {
        Ok((
            place.random(&[n, o], stream)?,
            place.output(&[n, o], stream)?,
        ))
    })?;
    Ok(move || {
        let (residual, sum) = sets.advance();
        linear_add::forward(&x, &w, residual, sum, &mut workspace)
    })
}

/// The gated layer and its gradient.
pub fn glu(suite: &mut Suite, model: Model, place: Place) {
    let [n, h, i] = [model.tokens, model.hidden, model.inner];
    let op = Op::product("linear_glu forward", [n, h, 2 * i], 4 * n * h * i);
    suite.add(op, || gated(place, [n, h, i]));
    // Gate and up are read, what comes of them is written.
    let op = Op::moving(
        "linear_glu forward: the gate",
        format!("{n} × {i}"),
        "bf16",
        3.0 * bytes(n * i, T),
    );
    let thin = model.thin;
    suite.add_beyond(
        op,
        || gated(place, [n, thin, i]),
        || forward(place, [n, thin, 2 * i]),
    );

    let op = Op::product("linear_glu backward", [n, h, i], 2 * n * h * i);
    suite.add(op, || gradient(place, [n, i, h]));
    // The gradient of what came of them is read, too, and theirs are written.
    let op = Op::moving(
        "linear_glu backward: the gate",
        format!("{n} × {i}"),
        "bf16",
        5.0 * bytes(n * i, T),
    );
    suite.add_beyond(
        op,
        || gradient(place, [n, i, thin]),
        || backward_input(place, [n, i, thin]),
    );
}

fn gated(
    place: Place,
    [n, h, i]: [i64; 3],
) -> Result<impl FnMut() -> Result<(), Error> + 'static, Error> {
    let x = place.random(&[n, h], T)?;
    let w = place.scaled(&[2 * i, h], T, (h as f64).powf(-0.5))?;
    let (mut gate_up, mut y) = (place.output(&[n, 2 * i], T)?, place.output(&[n, i], T)?);
    let mut workspace = Workspace::new(place.device());
    Ok(move || {
        let silu = Activation::Silu;
        linear_glu::forward(silu, &x, &w, &mut gate_up, &mut y, &mut workspace)
    })
}

/// Of a next layer with weights of `[o, i]`.
fn gradient(
    place: Place,
    [n, i, o]: [i64; 3],
) -> Result<impl FnMut() -> Result<(), Error> + 'static, Error> {
    let (dz, w) = (place.random(&[n, o], T)?, place.random(&[o, i], T)?);
    let gate_up: Tensor = place.random(&[n, 2 * i], T)?;
    let mut dgate_up = place.output(&[n, 2 * i], T)?;
    let mut workspace = Workspace::new(place.device());
    Ok(move || {
        let silu = Activation::Silu;
        linear_glu::backward(silu, &dz, &w, &gate_up, &mut dgate_up, &mut workspace)
    })
}
