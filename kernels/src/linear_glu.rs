//! The gated layer of a feed-forward network: a dense layer with a gated linear unit (Shazeer 2020),
//! `[gate, up] = x·wᵀ` and `y = act(gate)·up`: SwiGLU or GeGLU, after its [`Activation`].
//!
//! Gate and up come from one product and lie side by side in one row. The gradient is computed with
//! that of the dense layer that follows: its input gradient is `dy`, which is never stored.

use tch::{Kind, Tensor};

use crate::error::torch;
use crate::float::with_float;
use crate::matmul::Columns;
use crate::matmul::epilogue::{GeluTanh, Glu, GluGradient, Silu};
use crate::product::{self, Input, Product, target};
use crate::sys::operands::{Operands, sizes};
use crate::{Error, Workspace, WorkspacePlan, cuda, linear};

mod on_gpu;

const FORWARD: &str = "linear_glu.forward";
const BACKWARD: &str = "linear_glu.backward";

/// The activation of the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x · σ(x)`, of SwiGLU.
    Silu,
    /// GELU approximated by tanh, of GeGLU.
    GeluTanh,
}

/// Evaluates an expression with the epilogues' name of an [`Activation`].
macro_rules! with_gate {
    ($activation:expr, $gate:ident => $body:expr) => {
        match $activation {
            Activation::Silu => {
                let $gate = Silu;
                $body
            }
            Activation::GeluTanh => {
                let $gate = GeluTanh;
                $body
            }
        }
    };
}

/// `x: [n, h]`, `w: [2·i, h]` (rows of the gate, then of up), `gate_up: [n, 2·i]` and `y: [n, i]`
/// (both written), all fp32 or all bf16. `y` is computed in fp32 from the rounded gate and up.
///
/// # Errors
/// The argument errors of [`Error`].
pub fn forward(
    activation: Activation,
    x: &Tensor,
    w: &Tensor,
    gate_up: &mut Tensor,
    y: &mut Tensor,
    workspace: &mut Workspace,
) -> Result<(), Error> {
    let [n, h] = sizes(FORWARD, "x", x)?;
    let [rows, _] = sizes(FORWARD, "w", w)?;
    let i = rows / 2;
    if let Some(gpu) = cuda::of(FORWARD, "x", x)? {
        return on_gpu::forward(&gpu, activation, ([n, h], i), x, w, gate_up, y);
    }
    with_float!(FORWARD, "x", x => T: with_gate!(activation, gate => {
        let mut operands = Operands::new(FORWARD);
        let product = Product::Forward(
            Input::<T>::new(&mut operands, "x", x, [n, h])?,
            Input::<T>::new(&mut operands, "w", w, [2 * i, h])?,
        );
        let glu = Glu {
            gate,
            gate_up: target::<T>(&mut operands, "gate_up", gate_up, [n, 2 * i])?,
            gated: target::<T>(&mut operands, "y", y, [n, i])?,
        };
        product::multiply(FORWARD, &product, Columns::Halves { width: i }, &glu, workspace)
    }))
}

/// Gradient of `gate_up` for the layer `z = y·wᵀ` that follows: `dz: [n, o]`, that layer's `w: [o,
/// i]`, `gate_up: [n, 2·i]` of the forward pass, `dgate_up: [n, 2·i]` (written), all fp32 or all bf16.
/// [`linear::backward_input`] and [`linear::backward_weight`] go on from there.
///
/// # Errors
/// The argument errors of [`Error`].
pub fn backward(
    activation: Activation,
    dz: &Tensor,
    w: &Tensor,
    gate_up: &Tensor,
    dgate_up: &mut Tensor,
    workspace: &mut Workspace,
) -> Result<(), Error> {
    let [n, o] = sizes(BACKWARD, "dz", dz)?;
    let [_, i] = sizes(BACKWARD, "w", w)?;
    if let Some(gpu) = cuda::of(BACKWARD, "dz", dz)? {
        let sizes = ([n, o], i);
        return on_gpu::backward(
            &gpu,
            activation,
            sizes,
            [dz, w, gate_up],
            dgate_up,
            workspace,
        );
    }
    with_float!(BACKWARD, "dz", dz => T: with_gate!(activation, gate => {
        let mut operands = Operands::new(BACKWARD);
        let product = Product::BackwardInput(
            Input::<T>::new(&mut operands, "dz", dz, [n, o])?,
            Input::<T>::new(&mut operands, "w", w, [o, i])?,
        );
        let glu = GluGradient {
            gate,
            gate_up: Input::<T>::new(&mut operands, "gate_up", gate_up, [n, 2 * i])?.rows(),
            d_gate_up: target::<T>(&mut operands, "dgate_up", dgate_up, [n, 2 * i])?,
        };
        product::multiply(BACKWARD, &product, Columns::Any(i), &glu, workspace)
    }))
}

/// What [`forward`] and its gradients but [`backward`] take from the workspace for `n` rows and `w:
/// [2·i, h]` of `kind`.
pub fn plan(workspace: &mut WorkspacePlan, kind: Kind, n: usize, [o, h]: [usize; 2]) {
    product::plan(workspace, kind, [n, h], Columns::Halves { width: o / 2 });
    linear::plan_backward(workspace, kind, n, [o, h]);
}

/// What [`backward`] takes from the workspace for `n` rows and a next layer of `w: [o, i]`.
pub fn plan_backward(workspace: &mut WorkspacePlan, kind: Kind, n: usize, [o, i]: [usize; 2]) {
    product::plan(workspace, kind, [n, o], Columns::Any(i));
}

/// The same function, `y` alone, as a composition of libtorch ops, for autograd to differentiate.
///
/// # Errors
/// [`Error::Torch`].
pub fn reference(activation: Activation, x: &Tensor, w: &Tensor) -> Result<Tensor, Error> {
    let gate_up = linear::reference(x, w)?;
    let compose = || {
        let halves = gate_up.f_chunk(2, -1)?;
        let gate = match activation {
            Activation::Silu => halves[0].f_silu()?,
            Activation::GeluTanh => halves[0].f_gelu("tanh")?,
        };
        gate.f_mul(&halves[1])
    };
    compose().map_err(torch("linear_glu.reference"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::testing::*;

    const ACTIVATIONS: [Activation; 2] = [Activation::Silu, Activation::GeluTanh];

    #[test]
    fn agrees_with_fp64_autograd_whoever_multiplies() {
        whoever_multiplies(agrees_with_fp64_autograd);
    }

    fn agrees_with_fp64_autograd() {
        for (activation, (kind, bound)) in
            ACTIVATIONS.into_iter().flat_map(|a| DTYPES.map(|d| (a, d)))
        {
            for (n, h, i, o) in [(1, 1, 1, 1), (5, 7, 17, 3), (67, 96, 130, 40)] {
                let x = normal("x", &[n, h], kind);
                let w = normal("w", &[2 * i, h], kind);
                let next = normal("next", &[o, i], kind);
                let dz = normal("dz", &[n, o], kind);
                let (mut gate_up, mut y) = (poison(&[n, 2 * i], kind), poison(&[n, i], kind));
                let mut dgate_up = poison(&[n, 2 * i], kind);
                let mut workspace = workspace();
                forward(activation, &x, &w, &mut gate_up, &mut y, &mut workspace).unwrap();
                backward(
                    activation,
                    &dz,
                    &next,
                    &gate_up,
                    &mut dgate_up,
                    &mut workspace,
                )
                .unwrap();
                let mut planned = WorkspacePlan::new(device());
                let [n, h, i, o] = [n, h, i, o].map(|size| size as usize);
                plan(&mut planned, kind, n, [2 * i, h]);
                plan_backward(&mut planned, kind, n, [o, i]);
                assert!(workspace.bytes() <= planned.bytes() as u64);
                let (x64, w64) = (leaf(&x), leaf(&w));
                let y64 = reference(activation, &x64, &w64).unwrap();
                assert_close("y", &y, &y64, bound);
                let gate_up64 = linear::reference(&x64, &w64).unwrap();
                assert_close("gate_up", &gate_up, &gate_up64, bound);
                let dy = dz.to_kind(Kind::Double).matmul(&next.to_kind(Kind::Double));
                let expected = gradients(&y64, &dy, &[&x64]);
                let dx = dgate_up
                    .to_kind(Kind::Double)
                    .matmul(&w.to_kind(Kind::Double));
                assert_close("dx", &dx, &expected[0], bound);
            }
        }
    }

    #[test]
    fn far_gates_stay_finite_whoever_multiplies() {
        whoever_multiplies(far_gates_stay_finite);
    }

    fn far_gates_stay_finite() {
        let kinds = [Kind::Float, Kind::BFloat16];
        for (activation, kind) in ACTIVATIONS.into_iter().flat_map(|a| kinds.map(|k| (a, k))) {
            // Either flat end of the sigmoid; the cubes of the last two are no fp32 numbers.
            let x = numbers(&[1e4f32, -1e4, 1e18, -1e18])
                .view([4, 1])
                .to_kind(kind);
            let w = numbers(&[1f32, 1.0]).view([2, 1]).to_kind(kind);
            let (mut gate_up, mut y) = (poison(&[4, 2], kind), poison(&[4, 1], kind));
            let mut workspace = workspace();
            forward(activation, &x, &w, &mut gate_up, &mut y, &mut workspace).unwrap();
            let expected = reference(activation, &leaf(&x), &leaf(&w)).unwrap();
            assert_close("y", &y, &expected, 1e-2);
            let (dz, next) = (x.ones_like(), w.narrow(0, 0, 1));
            let mut dgate_up = poison(&[4, 2], kind);
            backward(
                activation,
                &dz,
                &next,
                &gate_up,
                &mut dgate_up,
                &mut workspace,
            )
            .unwrap();
            assert_eq!(dgate_up.isfinite().all().int64_value(&[]), 1);
        }
    }

    #[test]
    fn wrong_shapes_are_refused() {
        let (x, w) = (zeros(&[4, 3], Kind::Float), zeros(&[16, 3], Kind::Float));
        let (mut gate_up, mut y) = (zeros(&[4, 15], Kind::Float), zeros(&[4, 8], Kind::Float));
        let error = forward(
            Activation::Silu,
            &x,
            &w,
            &mut gate_up,
            &mut y,
            &mut workspace(),
        );
        assert!(matches!(
            error,
            Err(Error::Shape {
                tensor: "gate_up",
                ..
            })
        ));
    }
}
