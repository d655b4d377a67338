//! Token embedding: picking rows of a matrix, and adding gradients back to them.

use tch::{Device, Tensor};

use crate::error::torch;
use crate::float::{Float, with_float};
use crate::simd::simd;
use crate::sys::operands::{Operands, sizes};
use crate::sys::parallel::parallel_split;
use crate::sys::split::{Grid, Rows};
use crate::{Error, cuda};

mod on_gpu;

const FORWARD: &str = "embedding.forward";
const BACKWARD: &str = "embedding.backward";

/// The tokens of a batch, on the device that computes with them.
#[derive(Debug)]
pub struct TokenIds {
    /// `[n]` int64
    ids: Tensor,
    /// Where a GPU computes.
    occurrences: Option<on_gpu::Occurrences>,
}

impl TokenIds {
    /// Ids in the order of the tokens.
    ///
    /// # Errors
    /// [`Error::Torch`] if libtorch cannot allocate.
    pub fn new(ids: &[i64], device: Device) -> Result<Self, Error> {
        let occurrences = cuda::is_gpu(device).then(|| on_gpu::Occurrences::new(ids, device));
        Ok(TokenIds {
            ids: cuda::upload(ids, device)?,
            occurrences: occurrences.transpose()?,
        })
    }

    /// The ids themselves, `[n]` int64.
    pub fn tensor(&self) -> &Tensor {
        &self.ids
    }
}

/// `y[t] = w[ids[t]]` with `n` ids, `w: [v, h]` in T, `y: [n, h]` in R (written).
///
/// # Errors
/// The argument errors of [`Error`]; [`Error::Index`] for an id outside `0..v`, which on a GPU
/// becomes a row of NaN instead: nothing waits there for what the ids are.
pub fn forward(ids: &TokenIds, w: &Tensor, y: &mut Tensor) -> Result<(), Error> {
    let [n] = sizes(FORWARD, "ids", ids.tensor())?;
    let [v, h] = sizes(FORWARD, "w", w)?;
    if let Some(gpu) = cuda::of(FORWARD, "w", w)? {
        return on_gpu::forward(&gpu, [n, v, h], ids, w, y);
    }
    let ids = ids.tensor();
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

/// `dw[ids[t]] += dy[t]` with `n` ids, `dy: [n, h]` in R and `dw: [v, h]` fp32.
///
/// Threads share out the columns, so each element of `dw` receives its tokens in their order: no
/// atomics, and the same bits on any number of threads. A GPU knows from the ids where each occurs.
///
/// # Errors
/// The argument errors of [`Error`]; [`Error::Index`] for an id outside `0..v`, which a GPU passes
/// over.
pub fn backward(ids: &TokenIds, dy: &Tensor, dw: &mut Tensor) -> Result<(), Error> {
    let [n] = sizes(BACKWARD, "ids", ids.tensor())?;
    let [v, h] = sizes(BACKWARD, "dw", dw)?;
    if let Some(gpu) = cuda::of(BACKWARD, "dw", dw)? {
        return on_gpu::backward(&gpu, [n, v, h], ids, dy, dw);
    }
    let ids = ids.tensor();
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
        .map_err(torch("embedding.reference"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::testing::*;
    use tch::Kind;

    const IDS: [i64; 7] = [3, 0, 3, 10, 3, 0, 9];

    fn ids(ids: &[i64]) -> TokenIds {
        TokenIds::new(ids, device()).unwrap()
    }

    #[test]
    fn agrees_with_fp64_autograd_everywhere() {
        everywhere(agrees_with_fp64_autograd);
    }

    fn agrees_with_fp64_autograd() {
        for (kind, bound) in DTYPES {
            for residual in [Kind::Float, Kind::BFloat16] {
                for h in [70, 8, 520] {
                    let (ids, v) = (ids(&IDS), 11);
                    let w = normal("w", &[v, h], kind);
                    let dy = normal("dy", &[7, h], residual);
                    let mut y = poison(&[7, h], residual);
                    forward(&ids, &w, &mut y).unwrap();
                    let leaf = leaf(&w);
                    let expected = reference(ids.tensor(), &leaf).unwrap();
                    let narrow = residual == Kind::BFloat16;
                    assert_close("y", &y, &expected, if narrow { 1e-2 } else { 0.0 });
                    let expected = gradients(&expected, &dy, &[&leaf]);
                    let mut dw = zeros(&[v, h], Kind::Float);
                    for times in 1..=2 {
                        backward(&ids, &dy, &mut dw).unwrap();
                        assert_close("dw", &dw, &(&expected[0] * times), bound);
                    }
                }
            }
        }
    }

    #[test]
    fn same_bits_on_any_number_of_threads_and_at_every_level() {
        fn run() -> Vec<u32> {
            let all: Vec<i64> = (0..500).map(|t| t * t % 13).collect();
            let mut dw = zeros(&[13, 200], Kind::Float);
            let dy = normal("dy", &[500, 200], Kind::BFloat16);
            backward(&ids(&all), &dy, &mut dw).unwrap();
            bits(&dw)
        }
        assert_level_independent(run);
        assert_order_independent(run);
    }

    #[test]
    fn a_frequent_id_and_many_rare_ones_are_added_up() {
        everywhere(|| {
            let all: Vec<i64> = (0..3000).map(|t| if t % 3 == 0 { 7 } else { t }).collect();
            let dy = normal("dy", &[3000, 16], Kind::Float);
            let mut dw = zeros(&[3000, 16], Kind::Float);
            backward(&ids(&all), &dy, &mut dw).unwrap();
            let wide = zeros(&[3000, 16], Kind::Double);
            let index = Tensor::from_slice(&all).to_device(device());
            let expected = wide.index_add(0, &index, &dy.to_kind(Kind::Double));
            assert_close("dw", &dw, &expected, 1e-5);
        });
    }

    #[test]
    fn bad_ids_change_nothing() {
        let mut dw = zeros(&[10, 4], Kind::Float);
        let error = backward(&ids(&IDS), &normal("dy", &[7, 4], Kind::Float), &mut dw);
        let expected = "embedding.backward: `ids`[3] is 10, but must be at least 0 and below 10";
        assert_eq!(error.unwrap_err().to_string(), expected);
        assert_eq!(dw.abs().sum(Kind::Float).double_value(&[]), 0.0);
        let mut y = zeros(&[1, 4], Kind::Float);
        assert!(forward(&ids(&[-1]), &normal("w", &[10, 4], Kind::Float), &mut y).is_err());
    }

    #[test]
    fn on_a_gpu_bad_ids_make_nan_and_touch_nothing_else() {
        on_gpu(|| {
            let w = normal("w", &[10, 4], Kind::Float);
            let mut y = poison(&[3, 4], Kind::Float);
            let bad = ids(&[2, -1, 10]);
            forward(&bad, &w, &mut y).unwrap();
            let nan = y
                .isnan()
                .sum_dim_intlist([1i64].as_slice(), false, Kind::Int64);
            assert_eq!(
                Vec::<i64>::try_from(nan.to_device(Device::Cpu)).unwrap(),
                [0, 4, 4]
            );
            let mut dw = zeros(&[10, 4], Kind::Float);
            backward(&bad, &zeros(&[3, 4], Kind::Float).fill_(1.0), &mut dw).unwrap();
            assert_eq!(dw.sum(Kind::Float).double_value(&[]), 4.0);
        });
    }
}
