//! Root-mean-square normalisation (Zhang & Sennrich 2019), in LLaMA's order of rounding.
//!
//! `y = T(x · rstd) · w` with `rstd = 1 / √(mean(x²) + eps)`: the norm is taken in fp32, rounded
//! to the compute dtype `T`, and then multiplied by the weight. `x` may come in a wider dtype `R`
//! (an fp32 residual stream under bf16 compute).

use tch::{Kind, Tensor};

use crate::error::torch;
use crate::float::{Float, with_float};
use crate::simd::{simd, sum, sum3};
use crate::sys::operands::{Operands, sizes};
use crate::sys::parallel::parallel_split;
use crate::sys::split::{Grid, Rows};
use crate::{Error, Workspace, WorkspacePlan, cuda};

mod on_gpu;

const FORWARD: &str = "rms_norm.forward";
const BACKWARD: &str = "rms_norm.backward";

/// Name of a buffer.
const PARTIAL_SUMS: &str = "rms_norm.partials";

/// Rows that one thread takes at least; a row alone is too little work for a region.
const GRAIN: usize = 8;

/// Blocks of rows whose weight gradients are summed apart. A constant, so that the sum does not
/// depend on the number of threads.
const PARTIALS: usize = 64;

/// Normalises each row.
///
/// `x: [n, h]` in R, `w: [h]` in T, `y: [n, h]` in T (written), `rstd: [n]` fp32 (written, for
/// the backward pass). R and T are fp32 or bf16. Same bits on any number of threads.
///
/// # Errors
/// The argument errors of [`Error`].
pub fn forward(
    x: &Tensor,
    w: &Tensor,
    eps: f64,
    y: &mut Tensor,
    rstd: &mut Tensor,
) -> Result<(), Error> {
    let [n, h] = sizes(FORWARD, "x", x)?;
    if let Some(gpu) = cuda::of(FORWARD, "x", x)? {
        return on_gpu::forward(&gpu, [n, h], x, w, eps, y, rstd);
    }
    with_float!(FORWARD, "x", x => R: with_float!(FORWARD, "w", w => T: {
        let mut operands = Operands::new(FORWARD);
        let x = operands.read::<R>("x", x, &[n, h])?;
        let w = operands.read::<T>("w", w, &[h])?;
        let y = operands.write::<T>("y", y, &[n, h])?;
        let rstd = operands.write::<f32>("rstd", rstd, &[n])?;
        parallel_split(n, GRAIN, (Rows::new(y, h), Rows::new(rstd, 1)), |range, (y, rstd)| {
            let x = &x[range.start * h..range.end * h];
            forward_rows(x, w, eps as f32, y, rstd);
        });
        Ok(())
    }))
}

simd! {
fn forward_rows<R: Float, T: Float>(x: &[R], w: &[T], eps: f32, y: &mut [T], rstd: &mut [f32]) {
    let h = w.len();
    for (r, rstd) in rstd.iter_mut().enumerate() {
        let (x, y) = (&x[r * h..][..h], &mut y[r * h..][..h]);
        let mean = sum(x, |x| x.to_f32() * x.to_f32()) / h as f32;
        *rstd = 1.0 / (mean + eps).sqrt();
        for c in 0..h {
            let normalised = T::from_f32(x[c].to_f32() * *rstd);
            y[c] = T::from_f32(normalised.to_f32() * w[c].to_f32());
        }
    }
}
}

/// What [`backward`] needs of the forward pass.
#[derive(Clone, Copy)]
pub struct Saved<'a> {
    /// `[n, h]` in R.
    pub x: &'a Tensor,
    /// `[h]` in T.
    pub w: &'a Tensor,
    /// `[n]` fp32.
    pub rstd: &'a Tensor,
}

/// Where the gradients go.
pub struct Gradients<'a> {
    /// `[n, h]` in R, **added to**.
    pub dx: &'a mut Tensor,
    /// `[n, h]` in T, written where wanted: the sum in `dx`, rounded.
    pub rounded: Option<&'a mut Tensor>,
    /// `[h]` fp32, **added to** where wanted.
    pub dw: Option<&'a mut Tensor>,
}

/// Gradients of [`forward`].
///
/// `dy: [n, h]` in T. The gradient of `x` joins that of the residual stream, and the sum is rounded
/// in the same pass: so the branch below takes it. Same bits on any number of threads.
///
/// # Errors
/// The argument errors of [`Error`].
pub fn backward(
    dy: &Tensor,
    saved: Saved<'_>,
    gradients: Gradients<'_>,
    workspace: &mut Workspace,
) -> Result<(), Error> {
    let [n, h] = sizes(BACKWARD, "x", saved.x)?;
    if let Some(gpu) = cuda::of(BACKWARD, "x", saved.x)? {
        return on_gpu::backward(&gpu, [n, h], dy, saved, gradients, workspace);
    }
    let Saved { x, w, rstd } = saved;
    let Gradients { dx, rounded, dw } = gradients;
    let (rows, blocks) = partition(n);
    let mut partials = match dw {
        Some(_) => Some(workspace.take(PARTIAL_SUMS, &[blocks, h], Kind::Float)?),
        None => None,
    };
    with_float!(BACKWARD, "x", x => R: with_float!(BACKWARD, "w", w => T: {
        let mut operands = Operands::new(BACKWARD);
        let dy = operands.read::<T>("dy", dy, &[n, h])?;
        let x = operands.read::<R>("x", x, &[n, h])?;
        let w = operands.read::<T>("w", w, &[h])?;
        let rstd = operands.read::<f32>("rstd", rstd, &[n])?;
        let dx = operands.write::<R>("dx", dx, &[n, h])?;
        let rounded = rounded
            .map(|rounded| operands.write::<T>("rounded", rounded, &[n, h]))
            .transpose()?;
        let dw = dw.map(|dw| operands.write::<f32>("dw", dw, &[h])).transpose()?;
        let mut partials = partials
            .as_mut()
            .map(|partials| operands.write::<f32>("partials", partials, &[blocks, h]))
            .transpose()?;
        {
            // A loop item is a block of `rows` rows, with one row of partial sums.
            let partials = partials.as_deref_mut().map(|partials| Rows::new(partials, h));
            let rounded = rounded.map(|rounded| Rows::new(rounded, rows * h));
            let outputs = (Rows::new(dx, rows * h), rounded, partials);
            parallel_split(blocks, 1, outputs, |range, (dx, mut rounded, mut partials)| {
                for (i, (block, dx)) in range.zip(dx.chunks_mut((rows * h).max(1))).enumerate() {
                    let (start, end) = (block * rows, ((block + 1) * rows).min(n));
                    let rounded = match rounded.as_deref_mut() {
                        Some(rounded) => &mut rounded[i * rows * h..][..dx.len()],
                        None => &mut [],
                    };
                    let partial = match partials.as_deref_mut() {
                        Some(partials) => &mut partials[i * h..][..h],
                        None => &mut [],
                    };
                    let (dy, x) = (&dy[start * h..end * h], &x[start * h..end * h]);
                    backward_rows(dy, x, w, &rstd[start..end], dx, rounded, partial);
                }
            });
        }
        if let (Some(dw), Some(partials)) = (dw, partials) {
            let columns = Grid::new(dw, h).by_columns();
            parallel_split(h, 256, columns, |range, mut dw| {
                add_partials(partials, h, range.start, dw.row(0));
            });
        }
        Ok(())
    }))
}

/// What [`backward`] takes from the workspace for `n` rows of `h` elements.
pub fn plan(workspace: &mut WorkspacePlan, n: usize, h: usize) {
    let (_, blocks) = if workspace.on_gpu() {
        on_gpu::partition([n, h])
    } else {
        partition(n)
    };
    workspace.take(PARTIAL_SUMS, &[blocks, h], Kind::Float);
}

/// Rows of a block with partial sums of its own, and the number of such blocks.
fn partition(n: usize) -> (usize, usize) {
    let rows = n.div_ceil(PARTIALS).max(1);
    (rows, n.div_ceil(rows))
}

simd! {
/// Gradients of some rows; what is not wanted is empty.
fn backward_rows<R: Float, T: Float>(
    dy: &[T], x: &[R], w: &[T], rstd: &[f32], dx: &mut [R], rounded: &mut [T], dw: &mut [f32],
) {
    let h = w.len();
    dw.fill(0.0);
    for (r, &rstd) in rstd.iter().enumerate() {
        let (dy, x, dx) = (&dy[r * h..][..h], &x[r * h..][..h], &mut dx[r * h..][..h]);
        // With x̂ = x·rstd and g = dy·w: dx = rstd · (g − x̂ · mean(g·x̂)).
        let dot = sum3(dy, w, x, |dy, w, x| dy.to_f32() * w.to_f32() * x.to_f32());
        let mean = dot * rstd / h as f32;
        for c in 0..h {
            let g = dy[c].to_f32() * w[c].to_f32();
            let gradient = rstd * (g - x[c].to_f32() * rstd * mean);
            dx[c] = R::from_f32(dx[c].to_f32() + gradient);
        }
        // The row is still in the nearest cache.
        for (rounded, dx) in rounded.iter_mut().skip(r * h).zip(&*dx) {
            *rounded = T::from_f32(dx.to_f32());
        }
        for ((dw, dy), x) in dw.iter_mut().zip(dy).zip(x) {
            *dw += dy.to_f32() * (x.to_f32() * rstd);
        }
    }
}
}

simd! {
/// Adds columns `start..` of all partial sums to `dw`, in the order of the blocks.
fn add_partials(partials: &[f32], h: usize, start: usize, dw: &mut [f32]) {
    for row in partials.chunks_exact(h) {
        for (dw, partial) in dw.iter_mut().zip(&row[start..]) {
            *dw += *partial;
        }
    }
}
}

/// The same function as a composition of libtorch ops, for autograd to differentiate.
///
/// # Errors
/// [`Error::Torch`].
pub fn reference(x: &Tensor, w: &Tensor, eps: f64) -> Result<Tensor, Error> {
    let compose = || {
        let wide = if x.f_kind()? == Kind::BFloat16 {
            Kind::Float
        } else {
            x.f_kind()?
        };
        let x = x.f_to_kind(wide)?;
        let mean = x.f_square()?.f_mean_dim([-1i64].as_slice(), true, wide)?;
        let normalised = x.f_mul(&mean.f_add_scalar(eps)?.f_rsqrt()?)?;
        normalised.f_to_kind(w.f_kind()?)?.f_mul(w)
    };
    compose().map_err(torch("rms_norm.reference"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::testing::{self, *};

    /// The last row is too wide for a block of a GPU to keep its share of the weight's gradient.
    const SHAPES: [(i64, i64); 5] = [(1, 1), (3, 7), (130, 96), (65, 515), (9, 8200)];

    #[test]
    fn agrees_with_fp64_autograd_everywhere() {
        everywhere(agrees_with_fp64_autograd);
    }

    fn agrees_with_fp64_autograd() {
        for (kind, bound) in DTYPES {
            for residual in [Kind::Float, Kind::BFloat16] {
                for (n, h) in SHAPES {
                    // The narrower of the two dtypes sets what can be reached.
                    let bound = if residual == Kind::BFloat16 {
                        1e-2
                    } else {
                        bound
                    };
                    let x = normal("x", &[n, h], residual);
                    let w = normal("w", &[h], kind);
                    let dy = normal("dy", &[n, h], kind);
                    let (mut y, mut rstd) = (poison(&[n, h], kind), poison(&[n], Kind::Float));
                    forward(&x, &w, 1e-5, &mut y, &mut rstd).unwrap();

                    let (x64, w64) = (leaf(&x), leaf(&w));
                    let y64 = reference(&x64, &w64, 1e-5).unwrap();
                    assert_close("y", &y, &y64, bound);
                    let expected = testing::gradients(&y64, &dy, &[&x64, &w64]);

                    let mut workspace = workspace();
                    let dx0 = normal("dx", &[n, h], residual);
                    let (mut dx, mut dw) = (dx0.copy(), zeros(&[h], Kind::Float));
                    let saved = Saved {
                        x: &x,
                        w: &w,
                        rstd: &rstd,
                    };
                    let mut rounded = poison(&[n, h], kind);
                    for times in 1..=2 {
                        let gradients = Gradients {
                            dx: &mut dx,
                            rounded: Some(&mut rounded),
                            dw: Some(&mut dw),
                        };
                        backward(&dy, saved, gradients, &mut workspace).unwrap();
                        assert_eq!(bits(&rounded), bits(&dx.to_kind(kind)));
                        let start = dx0.to_kind(Kind::Double);
                        assert_close("dx", &dx, &(start + &expected[0] * times), bound);
                        assert_close("dw", &dw, &(&expected[1] * times), bound);
                    }
                    let mut alone = dx0.copy();
                    for _ in 0..2 {
                        let gradients = Gradients {
                            dx: &mut alone,
                            rounded: None,
                            dw: None,
                        };
                        backward(&dy, saved, gradients, &mut workspace).unwrap();
                    }
                    assert_eq!(bits(&alone), bits(&dx), "dx must not depend on the others");
                }
            }
        }
    }

    #[test]
    fn bf16_rounds_before_the_weight_as_llama_does() {
        let (x, w) = (
            normal("x", &[64, 128], Kind::BFloat16),
            normal("w", &[128], Kind::BFloat16),
        );
        let (mut y, mut rstd) = (
            poison(&[64, 128], Kind::BFloat16),
            poison(&[64], Kind::Float),
        );
        forward(&x, &w, 1e-5, &mut y, &mut rstd).unwrap();
        let expected = reference(&x, &w, 1e-5).unwrap();
        let different = y.ne_tensor(&expected).sum(Kind::Int64).int64_value(&[]);
        // The sums of squares are added in another order, so a few roundings may fall otherwise.
        assert!(different <= 8, "{different} of 8192 elements differ");
    }

    #[test]
    fn same_bits_on_any_number_of_threads_and_at_every_level() {
        assert_level_independent(|| all_outputs(777, 130));
        for (n, h) in [(37, 130), (5, 520)] {
            assert_order_independent(|| all_outputs(n, h));
        }
    }

    fn all_outputs(n: i64, h: i64) -> Vec<u32> {
        {
            let (x, w) = (
                normal("x", &[n, h], Kind::Float),
                normal("w", &[h], Kind::BFloat16),
            );
            let (mut y, mut rstd) = (poison(&[n, h], w.kind()), poison(&[n], Kind::Float));
            forward(&x, &w, 1e-5, &mut y, &mut rstd).unwrap();
            let (mut dx, mut dw) = (zeros(&[n, h], Kind::Float), zeros(&[h], Kind::Float));
            let mut workspace = workspace();
            let mut rounded = poison(&[n, h], w.kind());
            let saved = Saved {
                x: &x,
                w: &w,
                rstd: &rstd,
            };
            let gradients = Gradients {
                dx: &mut dx,
                rounded: Some(&mut rounded),
                dw: Some(&mut dw),
            };
            backward(&y, saved, gradients, &mut workspace).unwrap();
            [bits(&y), bits(&dx), bits(&rounded), bits(&dw)].concat()
        }
    }

    #[test]
    fn wrong_arguments_are_named() {
        let (x, w) = (
            normal("x", &[4, 8], Kind::Float),
            normal("w", &[8], Kind::Float),
        );
        let (mut y, mut rstd) = (zeros(&[4, 8], Kind::Float), zeros(&[4], Kind::Float));
        let mut text = |x: &Tensor, w: &Tensor, y: &mut Tensor| {
            forward(x, w, 1e-5, y, &mut rstd).unwrap_err().to_string()
        };
        let message = text(&x, &w.narrow(0, 0, 7), &mut y);
        assert_eq!(
            message,
            "rms_norm.forward: `w` must have shape [8], found [7]"
        );
        assert!(text(&x, &w, &mut y.to_kind(Kind::Half)).contains("`y` must be Float, found Half"));
        let strided = normal("x", &[8, 4], Kind::Float).tr();
        assert!(text(&strided, &w, &mut y).contains("`x` with shape [4, 8] and strides [1, 4]"));
        assert!(text(&x, &w, &mut x.shallow_clone()).contains("`x` and `y` share memory"));
        assert!(text(&x.view([32]), &w, &mut y).contains("[-1, -1], found [32]"));
        let message = text(&x.to_kind(Kind::Double), &w, &mut y);
        assert!(message.contains("`x` is Double, which"), "{message}");
        assert!(text(&Tensor::new(), &w, &mut y).contains("`x`"));
    }
}
