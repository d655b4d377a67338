//! The ends of the model: embedding, and head with loss.

use std::collections::{BTreeSet, HashSet};

use oxitron_kernels::linear_cross_entropy as loss;
use oxitron_kernels::{Error, Workspace, embedding as tokens, linear, philox};
use tch::{Kind, Tensor};

use super::{Model, STREAMS, T, bytes, with_stream};
use crate::place::{Place, torch};
use crate::suite::{Op, Suite};

/// Spreads the frequent tokens over the vocabulary; a prime, and no divisor of it.
const APART: i64 = 7919;

pub fn embedding(suite: &mut Suite, model: Model, place: Place) {
    let [n, h, v] = [model.tokens, model.hidden, model.vocabulary];
    let shape = || format!("{n} × {h} of {v}");
    let known: HashSet<i64> = ids(model, 0).into_iter().collect();
    let different = known.len() as i64;
    for stream in STREAMS {
        // A row that occurs again is in a cache.
        let moved = bytes(different * h, T) + bytes(n * h, stream);
        let op = Op::moving("embedding forward", shape(), with_stream(stream), moved);
        suite.add(op, || {
            let w = place.scaled(&[v, h], T, 0.02)?;
            let mut sets = place.sets(moved, |set| {
                let ids = place.tokens(&ids(model, set))?;
                Ok((ids, place.output(&[n, h], stream)?))
            })?;
            Ok(move || {
                let (ids, y) = sets.advance();
                tokens::forward(ids, &w, y)
            })
        });

        let moved = 2.0 * bytes(different * h, Kind::Float) + bytes(n * h, stream);
        let op = Op::moving("embedding backward", shape(), with_stream(stream), moved);
        suite.add(op, || {
            let mut dw = place.random(&[v, h], Kind::Float)?;
            let mut sets = place.sets(moved, |set| {
                let ids = place.tokens(&ids(model, set))?;
                Ok((ids, place.random(&[n, h], stream)?))
            })?;
            Ok(move || {
                let (ids, dy) = sets.advance();
                tokens::backward(ids, dy, &mut dw)
            })
        });
    }
}

/// Tokens of which each is about as frequent as its rank says, as in a text: with a vocabulary of
/// 92544 the first one is 6% of all. In each set other tokens are the frequent ones.
fn ids(model: Model, set: usize) -> Vec<i64> {
    let mut ranks = vec![0.0; model.tokens as usize];
    philox::fill_uniform(&mut ranks, 7, "ids", 0, 0.0, 1.0);
    let vocabulary = model.vocabulary as f64;
    let rank = |uniform: &f32| vocabulary.powf(f64::from(*uniform)) as i64 - 1;
    let id = |rank: i64| (rank * APART + set as i64 * 101) % model.vocabulary;
    ranks.iter().map(rank).map(id).collect()
}

/// The head with its loss and both gradients, and the loss by itself.
pub fn loss(suite: &mut Suite, model: Model, place: Place) {
    let [h, v] = [model.hidden, model.vocabulary];
    for chunk in chunks(model, place) {
        let n = chunk as i64;
        let op = Op::product("linear_cross_entropy", [n, h, v], 6 * n * h * v);
        suite.add(op, || head(place, [n, h, v], chunk, Wanted::Gradients));

        // All chunks, for the losses are added up behind the last of them. A row of logits is read,
        // and its gradient is written in its place.
        let (n, thin) = (model.tokens, model.thin);
        let op = Op::moving(
            "linear_cross_entropy: the loss",
            format!("{n} × {v}, {chunk} at a time"),
            "bf16",
            2.0 * bytes(n * v, T),
        );
        suite.add_beyond(
            op,
            || head(place, [n, thin, v], chunk, Wanted::Nothing),
            || logits(place, [n, thin, v], chunk),
        );
    }
}

/// Tokens whose logits exist at once: what is usual on a GPU, and less.
fn chunks(model: Model, place: Place) -> BTreeSet<usize> {
    let tokens = model.tokens as usize;
    let usual = loss::default_chunk(place.device()).min(tokens);
    BTreeSet::from([usual, tokens / 4, tokens / 16])
}

/// Gradients of the layer; those of the logits are made in any case.
#[derive(Clone, Copy, PartialEq)]
enum Wanted {
    Gradients,
    Nothing,
}

fn head(
    place: Place,
    [n, h, v]: [i64; 3],
    chunk: usize,
    wanted: Wanted,
) -> Result<impl FnMut() -> Result<(), Error> + 'static, Error> {
    let x = place.random(&[n, h], T)?;
    let w = place.scaled(&[v, h], T, 0.02)?;
    let options = (Kind::Int64, place.device());
    let targets = Tensor::f_randint(v, [n], options).map_err(torch)?;
    let mut outputs = match wanted {
        Wanted::Nothing => None,
        Wanted::Gradients => Some((
            place.output(&[n, h], T)?,
            place.random(&[v, h], Kind::Float)?,
        )),
    };
    let mut sum = place.numbers(&[0.0])?;
    let mut workspace = Workspace::new(place.device());
    Ok(move || {
        let inputs = loss::Inputs {
            x: &x,
            w: &w,
            targets: &targets,
            weights: None,
            vocab_size: v as usize,
            chunk,
        };
        let losses = loss::Losses {
            sum: &mut sum,
            per_token: None,
        };
        let gradients = match &mut outputs {
            None => loss::Gradients::default(),
            Some((dx, dw)) => loss::Gradients {
                dx: Some(dx),
                dw: Some(dw),
            },
        };
        loss::forward_backward(&inputs, losses, gradients, &mut workspace)
    })
}

/// The products alone: each chunk's into the same memory.
fn logits(
    place: Place,
    [n, h, v]: [i64; 3],
    chunk: usize,
) -> Result<impl FnMut() -> Result<(), Error> + 'static, Error> {
    let x = place.random(&[n, h], T)?;
    let w = place.scaled(&[v, h], T, 0.02)?;
    let mut logits = place.output(&[chunk as i64, v], T)?;
    let mut workspace = Workspace::new(place.device());
    let chunks = x.f_split(chunk as i64, 0).map_err(torch)?;
    Ok(move || {
        chunks
            .iter()
            .try_for_each(|x| linear::forward(x, &w, &mut logits, &mut workspace))
    })
}
