//! The end of a branch: a dense layer whose output joins the residual stream,
//! `sum = residual + x·wᵀ`.
//!
//! There is no backward pass of its own: the gradient of the product is that of the stream, rounded
//! to T, as [`crate::rms_norm::backward`] writes it beside the stream's; [`linear::backward_input`]
//! and [`linear::backward_weight`] go on from there.

use tch::{Kind, Tensor};

use crate::cuda::{Pointers, float};
use crate::error::torch;
use crate::float::with_float;
use crate::matmul::Columns;
use crate::matmul::epilogue::AddResidual;
use crate::product::{self, Input, Product, on_gpu, target};
use crate::sys::operands::{Operands, sizes};
use crate::{Error, Workspace, WorkspacePlan, cast, cuda, linear};

const OP: &str = "linear_add.forward";

/// `x: [n, i]` and `w: [o, i]` in T, `residual: [n, o]` and `sum: [n, o]` (written) in R; T and R are
/// fp32 or bf16. Rows may lie apart (on a GPU those of x and w alone). The fp32 sums of the product are
/// added to the residual before anything is rounded (libtorch's are rounded to T first).
///
/// # Errors
/// The argument errors of [`Error`].
pub fn forward(
    x: &Tensor,
    w: &Tensor,
    residual: &Tensor,
    sum: &mut Tensor,
    workspace: &mut Workspace,
) -> Result<(), Error> {
    let [n, i] = sizes(OP, "x", x)?;
    let [o, _] = sizes(OP, "w", w)?;
    if let Some(gpu) = cuda::of(OP, "x", x)? {
        let (t, _) = float(OP, "x", x)?;
        let mut product = workspace.take(on_gpu::OUTPUT, &[n, o], t)?;
        let mut pointers = Pointers::new(OP, &gpu);
        pointers.read_matrix("x", x, t, [n, i])?;
        pointers.read_matrix("w", w, t, [o, i])?;
        pointers.write("product", &mut product, t, &[n, o])?;
        on_gpu::forward(&gpu, OP, x, w, &mut product)?;
        return cast::on_gpu::add(OP, &gpu, [n, o], residual, &product, sum);
    }
    with_float!(OP, "x", x => T: with_float!(OP, "residual", residual => R: {
        let mut operands = Operands::new(OP);
        let product = Product::Forward(
            Input::<T>::new(&mut operands, "x", x, [n, i])?,
            Input::<T>::new(&mut operands, "w", w, [o, i])?,
        );
        let add = AddResidual {
            residual: Input::<R>::new(&mut operands, "residual", residual, [n, o])?.rows(),
            out: target::<R>(&mut operands, "sum", sum, [n, o])?,
        };
        product::multiply(OP, &product, Columns::Any(o), &add, workspace)
    }))
}

/// What [`forward`] and the gradients take from the workspace for `n` rows and `w: [o, i]` of `kind`.
pub fn plan(workspace: &mut WorkspacePlan, kind: Kind, n: usize, [o, i]: [usize; 2]) {
    product::plan(workspace, kind, [n, i], Columns::Any(o));
    linear::plan_backward(workspace, kind, n, [o, i]);
}

/// The same function by libtorch, for autograd to differentiate.
///
/// # Errors
/// [`Error::Torch`].
pub fn reference(x: &Tensor, w: &Tensor, residual: &Tensor) -> Result<Tensor, Error> {
    let product = linear::reference(x, w)?;
    residual
        .f_add(&product)
        .map_err(torch("linear_add.reference"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::testing::*;

    #[test]
    fn agrees_with_fp64_autograd_whoever_multiplies() {
        whoever_multiplies(agrees_with_fp64_autograd);
    }

    fn agrees_with_fp64_autograd() {
        for (kind, bound) in DTYPES {
            for stream in [Kind::Float, Kind::BFloat16] {
                for (n, i, o) in [(1, 1, 1), (5, 7, 33), (67, 96, 130)] {
                    let bound = if stream == Kind::Float { bound } else { 1e-2 };
                    let (x, w) = (normal("x", &[n, i], kind), normal("w", &[o, i], kind));
                    let residual = normal("residual", &[n, o], stream);
                    let mut sum = poison(&[n, o], stream);
                    let mut workspace = workspace();
                    forward(&x, &w, &residual, &mut sum, &mut workspace).unwrap();
                    let mut planned = WorkspacePlan::new(device());
                    plan(&mut planned, kind, n as usize, [o as usize, i as usize]);
                    assert!(workspace.bytes() <= planned.bytes() as u64);
                    let expected = reference(&leaf(&x), &leaf(&w), &leaf(&residual)).unwrap();
                    assert_close("sum", &sum, &expected, bound);
                }
            }
        }
    }

    #[test]
    fn the_stream_is_not_written_where_it_is_read() {
        let (x, w) = (zeros(&[4, 8], Kind::Float), zeros(&[6, 8], Kind::Float));
        let mut stream = zeros(&[4, 6], Kind::Float);
        let same = stream.shallow_clone();
        let error = forward(&x, &w, &same, &mut stream, &mut workspace());
        let message = error.unwrap_err().to_string();
        assert!(
            message.contains("`residual` and `sum` share memory"),
            "{message}"
        );
    }
}
