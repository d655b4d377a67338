//! Dense layers: `y = x·wᵀ` with `w: [o, i]`, as Hugging Face stores it.
//!
//! Matrices may be views whose rows lie apart, so a layer can read from or write to a part of a
//! wider buffer. Who multiplies is [`Engine::of`]'s choice. Sums are fp32, and a weight gradient is
//! added to its fp32 buffer without rounding in between (except through oneDNN, see
//! [`WeightGradient`]).

use tch::{Kind, Tensor};

use crate::cuda::{Pointers, float};
use crate::error::torch;
use crate::float::{Scalar, with_float};
use crate::matmul::epilogue::{AddTo, Store};
use crate::matmul::{Columns, Target};
use crate::product::on_gpu;
use crate::product::{self, Engine, Input, Product, target};
use crate::sys::operands::{Operands, sizes};
use crate::{Error, Workspace, WorkspacePlan, cuda};

mod libtorch;
mod packed;

pub use libtorch::WeightGradient;
pub(crate) use packed::{PackedWeight, plan as plan_packed};

const FORWARD: &str = "linear.forward";
const BACKWARD_INPUT: &str = "linear.backward_input";
const BACKWARD_WEIGHT: &str = "linear.backward_weight";

/// `y = x·wᵀ` with `x: [n, i]`, `w: [o, i]` and `y: [n, o]` (written), all fp32 or all bf16.
///
/// # Errors
/// The argument errors of [`Error`].
pub fn forward(
    x: &Tensor,
    w: &Tensor,
    y: &mut Tensor,
    workspace: &mut Workspace,
) -> Result<(), Error> {
    let [n, i] = sizes(FORWARD, "x", x)?;
    let [o, _] = sizes(FORWARD, "w", w)?;
    if let Some(gpu) = cuda::of(FORWARD, "x", x)? {
        let (t, _) = float(FORWARD, "x", x)?;
        let mut pointers = Pointers::new(FORWARD, &gpu);
        pointers.read_matrix("x", x, t, [n, i])?;
        pointers.read_matrix("w", w, t, [o, i])?;
        pointers.write_matrix("y", y, t, [n, o])?;
        return on_gpu::forward(&gpu, FORWARD, x, w, y);
    }
    with_float!(FORWARD, "x", x => T: {
        let mut operands = Operands::new(FORWARD);
        let product = Product::Forward(
            Input::<T>::new(&mut operands, "x", x, [n, i])?,
            Input::<T>::new(&mut operands, "w", w, [o, i])?,
        );
        if Engine::of(T::KIND) == Engine::Libtorch {
            operands.write_matrix::<T>("y", y, [n, o])?;
            return libtorch::forward(x, w, y);
        }
        let store = Store(target::<T>(&mut operands, "y", y, [n, o])?);
        product::multiply(FORWARD, &product, Columns::Any(o), &store, workspace)
    })
}

/// `dx = dy·w` with `dy: [n, o]`, `w: [o, i]` and `dx: [n, i]` (written), all fp32 or all bf16.
///
/// # Errors
/// The argument errors of [`Error`].
pub fn backward_input(
    dy: &Tensor,
    w: &Tensor,
    dx: &mut Tensor,
    workspace: &mut Workspace,
) -> Result<(), Error> {
    const OP: &str = BACKWARD_INPUT;
    let [n, o] = sizes(OP, "dy", dy)?;
    let [_, i] = sizes(OP, "w", w)?;
    if let Some(gpu) = cuda::of(OP, "dy", dy)? {
        let (t, _) = float(OP, "dy", dy)?;
        let mut pointers = Pointers::new(OP, &gpu);
        pointers.read_matrix("dy", dy, t, [n, o])?;
        pointers.read_matrix("w", w, t, [o, i])?;
        pointers.write_matrix("dx", dx, t, [n, i])?;
        return on_gpu::backward_input(&gpu, OP, dy, w, dx);
    }
    with_float!(OP, "dy", dy => T: {
        let mut operands = Operands::new(OP);
        let product = Product::BackwardInput(
            Input::<T>::new(&mut operands, "dy", dy, [n, o])?,
            Input::<T>::new(&mut operands, "w", w, [o, i])?,
        );
        if Engine::of(T::KIND) == Engine::Libtorch {
            operands.write_matrix::<T>("dx", dx, [n, i])?;
            return libtorch::backward_input(dy, w, dx);
        }
        let store = Store(target::<T>(&mut operands, "dx", dx, [n, i])?);
        product::multiply(OP, &product, Columns::Any(i), &store, workspace)
    })
}

/// `dw += dyᵀ·x` with `dy: [n, o]` and `x: [n, i]`, both fp32 or both bf16, and `dw: [o, i]`
/// contiguous fp32.
///
/// # Errors
/// The argument errors of [`Error`].
pub fn backward_weight(
    dy: &Tensor,
    x: &Tensor,
    dw: &mut Tensor,
    workspace: &mut Workspace,
) -> Result<(), Error> {
    const OP: &str = BACKWARD_WEIGHT;
    let [n, o] = sizes(OP, "dy", dy)?;
    let [_, i] = sizes(OP, "x", x)?;
    if let Some(gpu) = cuda::of(OP, "dy", dy)? {
        let (t, _) = float(OP, "dy", dy)?;
        let mut pointers = Pointers::new(OP, &gpu);
        pointers.read_matrix("dy", dy, t, [n, o])?;
        pointers.read_matrix("x", x, t, [n, i])?;
        pointers.write("dw", dw, Kind::Float, &[o, i])?;
        return on_gpu::backward_weight(&gpu, OP, dy, x, dw);
    }
    with_float!(OP, "dy", dy => T: {
        let mut operands = Operands::new(OP);
        let product = Product::BackwardWeight(
            Input::<T>::new(&mut operands, "dy", dy, [n, o])?,
            Input::<T>::new(&mut operands, "x", x, [n, i])?,
        );
        let dw_out = operands.write::<f32>("dw", dw, &[o, i])?;
        if n * o * i == 0 {
            return Ok(());
        }
        if Engine::of(T::KIND) == Engine::Libtorch {
            let way = WeightGradient::of_this_machine();
            return libtorch::backward_weight(way, dy, x, dw, workspace);
        }
        let add = AddTo(Target::new(dw_out, [o, i], i)?);
        product::multiply(OP, &product, Columns::Any(i), &add, workspace)
    })
}

/// What [`backward_input`] and [`backward_weight`] take from the workspace for `n` rows and `w: [o, i]`
/// of `kind`.
pub fn plan_backward(workspace: &mut WorkspacePlan, kind: Kind, n: usize, [o, i]: [usize; 2]) {
    if workspace.on_gpu() {
        return;
    }
    if Engine::of(kind) == Engine::Libtorch {
        return libtorch::plan(workspace, kind, [o, i]);
    }
    product::plan(workspace, kind, [n, o], Columns::Any(i));
    product::plan(workspace, kind, [o, n], Columns::Any(i));
}

/// The same function by libtorch, for autograd to differentiate.
///
/// # Errors
/// [`Error::Torch`].
pub fn reference(x: &Tensor, w: &Tensor) -> Result<Tensor, Error> {
    w.f_tr()
        .and_then(|w| x.f_matmul(&w))
        .map_err(torch("linear.reference"))
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
            for (n, i, o) in [(1, 1, 1), (5, 7, 3), (67, 96, 130)] {
                let mut workspace = workspace();
                let (x, w) = (normal("x", &[n, i], kind), normal("w", &[o, i], kind));
                let dy = normal("dy", &[n, o], kind);
                let mut y = poison(&[n, o], kind);
                forward(&x, &w, &mut y, &mut workspace).unwrap();
                let (x64, w64) = (leaf(&x), leaf(&w));
                let y64 = reference(&x64, &w64).unwrap();
                assert_close("y", &y, &y64, bound);
                let expected = gradients(&y64, &dy, &[&x64, &w64]);

                let mut dx = poison(&[n, i], kind);
                backward_input(&dy, &w, &mut dx, &mut workspace).unwrap();
                assert_close("dx", &dx, &expected[0], bound);

                let mut dw = zeros(&[o, i], Kind::Float);
                for times in 1..=2 {
                    backward_weight(&dy, &x, &mut dw, &mut workspace).unwrap();
                    assert_close("dw", &dw, &(&expected[1] * times), bound);
                }
            }
        }
    }

    #[test]
    fn parts_of_wider_buffers_serve_as_matrices_whoever_multiplies() {
        whoever_multiplies(parts_of_wider_buffers_serve_as_matrices);
    }

    fn parts_of_wider_buffers_serve_as_matrices() {
        for (kind, bound) in DTYPES {
            let mut workspace = workspace();
            let (wide_x, wide_y) = (normal("x", &[33, 64], kind), normal("y", &[33, 80], kind));
            let (x, mut y) = (wide_x.narrow(1, 8, 24), wide_y.narrow(1, 16, 40));
            let w = normal("w", &[40, 24], kind);
            let before = wide_y.copy();
            forward(&x, &w, &mut y, &mut workspace).unwrap();
            let wide = |x: &Tensor| x.to_kind(Kind::Double);
            assert_close("y", &y, &wide(&x).matmul(&wide(&w).tr()), bound);
            for (start, len) in [(0, 16), (56, 24)] {
                let part = |y: &Tensor| bits(&y.narrow(1, start, len));
                assert_eq!(part(&wide_y), part(&before));
            }
            let wide_dx = poison(&[33, 30], kind);
            backward_input(&y, &w, &mut wide_dx.narrow(1, 3, 24), &mut workspace).unwrap();
            let dx = wide_dx.narrow(1, 3, 24);
            assert_close("dx", &dx, &wide(&y).matmul(&wide(&w)), bound);
            let mut dw = zeros(&[40, 24], Kind::Float);
            backward_weight(&y, &x, &mut dw, &mut workspace).unwrap();
            assert_close("dw", &dw, &wide(&y).tr().matmul(&wide(&x)), bound);
        }
    }

    #[test]
    fn bad_arguments_are_refused() {
        let mut workspace = workspace();
        let mut refused = |x: &Tensor, w: &Tensor, y: &mut Tensor| {
            forward(x, w, y, &mut workspace)
                .err()
                .map(|error| error.to_string())
        };
        let (x, w) = (zeros(&[4, 8], Kind::Float), zeros(&[6, 8], Kind::Float));
        let mut y = zeros(&[4, 6], Kind::Float);
        assert_eq!(refused(&x, &w, &mut y), None);
        assert!(refused(&x, &w.tr(), &mut y).is_some());
        assert!(refused(&x, &w.to_kind(Kind::BFloat16), &mut y).is_some());
        assert!(refused(&x.to_kind(Kind::Half), &w, &mut y).is_some());
        assert!(refused(&x, &w, &mut zeros(&[6, 4], Kind::Float).tr()).is_some());
        let mut square = zeros(&[4, 4], Kind::Float);
        let same = square.shallow_clone();
        let message = refused(&same, &same, &mut square).unwrap();
        assert!(message.contains("share memory"), "{message}");
        let mut dw = zeros(&[6, 8], Kind::BFloat16);
        assert!(backward_weight(&y, &x, &mut dw, &mut workspace).is_err());
    }
}
