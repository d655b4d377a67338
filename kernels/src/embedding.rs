//! Token embedding: picking rows of a matrix, and adding gradients back to them.

use tch::Tensor;

use crate::Error;
use crate::float::{Float, with_float};
use crate::simd::simd;
use crate::sys::operands::{Operands, sizes};
use crate::sys::parallel::parallel_split;
use crate::sys::split::{Grid, Rows};

const FORWARD: &str = "embedding.forward";
const BACKWARD: &str = "embedding.backward";

/// `y[t] = w[ids[t]]` with `ids: [n]` int64, `w: [v, h]` in T, `y: [n, h]` in R (written).
///
/// # Errors
/// The argument errors of [`Error`]; [`Error::Index`] for an id outside `0..v`.
pub fn forward(ids: &Tensor, w: &Tensor, y: &mut Tensor) -> Result<(), Error> {
    let [n] = sizes(FORWARD, "ids", ids)?;
    let [v, h] = sizes(FORWARD, "w", w)?;
    with_float!(FORWARD, "w", w => T: with_float!(FORWARD, "y", y => R: {
        let mut operands = Operands::new(FORWARD);
        let ids = operands.read::<i64>("ids", ids, &[n])?;
        let w = operands.read::<T>("w", w, &[v, h])?;
        let y = operands.write::<R>("y", y, &[n, h])?;
        check_ids(FORWARD, ids, v)?;
        parallel_split(n, 16, Rows::new(y, h), |range, y| {
            gather(&ids[range], w, y, h);
        });
        Ok(())
    }))
}

simd! {
fn gather<T: Float, R: Float>(ids: &[i64], w: &[T], y: &mut [R], h: usize) {
    for (r, &id) in ids.iter().enumerate() {
        let row = &w[id as usize * h..][..h];
        for (y, w) in y[r * h..][..h].iter_mut().zip(row) {
            *y = R::from_f32(w.to_f32());
        }
    }
}
}

/// `dw[ids[t]] += dy[t]` with `dy: [n, h]` in R and `dw: [v, h]` fp32.
///
/// Threads share out the columns, so each element of `dw` receives its tokens in their order: no
/// atomics, no sorting, and the same bits on any number of threads.
///
/// # Errors
/// The argument errors of [`Error`]; [`Error::Index`] for an id outside `0..v`.
pub fn backward(ids: &Tensor, dy: &Tensor, dw: &mut Tensor) -> Result<(), Error> {
    let [n] = sizes(BACKWARD, "ids", ids)?;
    let [v, h] = sizes(BACKWARD, "dw", dw)?;
    with_float!(BACKWARD, "dy", dy => R: {
        let mut operands = Operands::new(BACKWARD);
        let ids = operands.read::<i64>("ids", ids, &[n])?;
        let dy = operands.read::<R>("dy", dy, &[n, h])?;
        let dw = operands.write::<f32>("dw", dw, &[v, h])?;
        check_ids(BACKWARD, ids, v)?;
        // 32 columns of fp32 are two cache lines.
        parallel_split(h, 32, Grid::new(dw, h).by_columns(), |columns, mut dw| {
            for (t, &id) in ids.iter().enumerate() {
                let from = t * h + columns.start;
                add_row(&dy[from..from + columns.len()], dw.row(id as usize));
            }
        });
        Ok(())
    })
}

simd! {
fn add_row<R: Float>(dy: &[R], dw: &mut [f32]) {
    for (dy, dw) in dy.iter().zip(dw) {
        *dw += dy.to_f32();
    }
}
}

fn check_ids(op: &'static str, ids: &[i64], v: usize) -> Result<(), Error> {
    let limit = v as i64;
    match ids.iter().position(|id| !(0..limit).contains(id)) {
        None => Ok(()),
        Some(at) => Err(Error::Index {
            op,
            tensor: "ids",
            at,
            value: ids[at],
            limit,
        }),
    }
}

/// The same function by libtorch, for autograd to differentiate.
///
/// # Errors
/// [`Error::Torch`].
pub fn reference(ids: &Tensor, w: &Tensor) -> Result<Tensor, Error> {
    w.f_index_select(0, ids)
        .map_err(crate::error::torch("embedding.reference"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::testing::*;
    use tch::Kind;

    fn ids() -> Tensor {
        Tensor::from_slice(&[3i64, 0, 3, 10, 3, 0, 9])
    }

    #[test]
    fn agrees_with_fp64_autograd() {
        for (kind, bound) in DTYPES {
            for residual in [Kind::Float, Kind::BFloat16] {
                let w = normal("w", &[11, 70], kind);
                let dy = normal("dy", &[7, 70], residual);
                let mut y = poison(&[7, 70], residual);
                forward(&ids(), &w, &mut y).unwrap();
                let leaf = leaf(&w);
                let expected = reference(&ids(), &leaf).unwrap();
                let narrow = residual == Kind::BFloat16;
                assert_close("y", &y, &expected, if narrow { 1e-2 } else { 0.0 });
                let expected = gradients(&expected, &dy, &[&leaf]);
                let mut dw = zeros(&[11, 70], Kind::Float);
                backward(&ids(), &dy, &mut dw).unwrap();
                assert_close("dw", &dw, &expected[0], bound);
                backward(&ids(), &dy, &mut dw).unwrap();
                assert_close("dw twice", &dw, &(&expected[0] * 2.0), bound);
            }
        }
    }

    #[test]
    fn same_bits_on_any_number_of_threads_and_at_every_level() {
        assert_level_independent(|| {
            let ids: Vec<i64> = (0..500).map(|t| t * t % 13).collect();
            let mut dw = zeros(&[13, 200], Kind::Float);
            let dy = normal("dy", &[500, 200], Kind::BFloat16);
            backward(&Tensor::from_slice(&ids), &dy, &mut dw).unwrap();
            bits(&dw)
        });
    }

    #[test]
    fn bad_ids_change_nothing() {
        let mut dw = zeros(&[10, 4], Kind::Float);
        let error = backward(&ids(), &normal("dy", &[7, 4], Kind::Float), &mut dw).unwrap_err();
        let expected = "embedding.backward: `ids`[3] is 10, but must be at least 0 and below 10";
        assert_eq!(error.to_string(), expected);
        assert_eq!(dw.abs().sum(Kind::Float).double_value(&[]), 0.0);
        let negative = Tensor::from_slice(&[-1i64]);
        let mut y = zeros(&[1, 4], Kind::Float);
        assert!(forward(&negative, &normal("w", &[10, 4], Kind::Float), &mut y).is_err());
    }
}
