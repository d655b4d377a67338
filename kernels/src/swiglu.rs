//! The gated activation of LLaMA's feed-forward layer (Shazeer 2020): `y = silu(gate) · up`.
//!
//! Gate and up come from one product and lie side by side in one row. Everything between loading
//! and storing happens in fp32.

use tch::{Kind, Tensor};

use crate::Error;
use crate::error::torch;
use crate::float::{Float, with_float};
use crate::simd::{exp, simd};
use crate::sys::operands::{Operands, sizes};
use crate::sys::parallel::parallel_split;
use crate::sys::split::Rows;

const FORWARD: &str = "swiglu.forward";
const BACKWARD: &str = "swiglu.backward";
const GRAIN: usize = 4;

/// `gate_up: [n, 2·i]` in T (gate first, then up), `y: [n, i]` in T (written). Same bits on any
/// number of threads.
///
/// # Errors
/// The argument errors of [`Error`].
pub fn forward(gate_up: &Tensor, y: &mut Tensor) -> Result<(), Error> {
    let [n, i] = sizes(FORWARD, "y", y)?;
    with_float!(FORWARD, "y", y => T: {
        let mut operands = Operands::new(FORWARD);
        let gate_up = operands.read::<T>("gate_up", gate_up, &[n, 2 * i])?;
        let y = operands.write::<T>("y", y, &[n, i])?;
        parallel_split(n, GRAIN, Rows::new(y, i), |range, y| {
            forward_rows(&gate_up[2 * i * range.start..2 * i * range.end], y, i);
        });
        Ok(())
    })
}

simd! {
fn forward_rows<T: Float>(gate_up: &[T], y: &mut [T], i: usize) {
    if i == 0 {
        return;
    }
    for (row, y) in gate_up.chunks_exact(2 * i).zip(y.chunks_exact_mut(i)) {
        let (gate, up) = row.split_at(i);
        for c in 0..i {
            let g = gate[c].to_f32();
            y[c] = T::from_f32(g * sigmoid(g) * up[c].to_f32());
        }
    }
}
}

/// Gradient of [`forward`]: `dy: [n, i]` in T, `gate_up` as before, `dgate_up: [n, 2·i]` in T
/// (written). Same bits on any number of threads.
///
/// # Errors
/// The argument errors of [`Error`].
pub fn backward(dy: &Tensor, gate_up: &Tensor, dgate_up: &mut Tensor) -> Result<(), Error> {
    let [n, i] = sizes(BACKWARD, "dy", dy)?;
    with_float!(BACKWARD, "dy", dy => T: {
        let mut operands = Operands::new(BACKWARD);
        let dy = operands.read::<T>("dy", dy, &[n, i])?;
        let gate_up = operands.read::<T>("gate_up", gate_up, &[n, 2 * i])?;
        let dgate_up = operands.write::<T>("dgate_up", dgate_up, &[n, 2 * i])?;
        parallel_split(n, GRAIN, Rows::new(dgate_up, 2 * i), |range, dgate_up| {
            let (a, b) = (range.start * i, range.end * i);
            backward_rows(&dy[a..b], &gate_up[2 * a..2 * b], dgate_up, i);
        });
        Ok(())
    })
}

simd! {
fn backward_rows<T: Float>(dy: &[T], gate_up: &[T], dgate_up: &mut [T], i: usize) {
    if i == 0 {
        return;
    }
    let rows = dy.chunks_exact(i).zip(gate_up.chunks_exact(2 * i));
    for ((dy, row), out) in rows.zip(dgate_up.chunks_exact_mut(2 * i)) {
        let (gate, up) = row.split_at(i);
        let (dgate, dup) = out.split_at_mut(i);
        for c in 0..i {
            let (d, g, u) = (dy[c].to_f32(), gate[c].to_f32(), up[c].to_f32());
            let s = sigmoid(g);
            // silu'(g) = σ(g) · (1 + g · (1 − σ(g)))
            dgate[c] = T::from_f32(d * u * s * (1.0 + g * (1.0 - s)));
            dup[c] = T::from_f32(d * g * s);
        }
    }
}
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The same function as a composition of libtorch ops, for autograd to differentiate; half-width
/// inputs are widened first, as the kernel does.
///
/// # Errors
/// [`Error::Torch`].
pub fn reference(gate_up: &Tensor) -> Result<Tensor, Error> {
    let compose = || {
        let kind = gate_up.f_kind()?;
        let wide = if kind == Kind::BFloat16 {
            Kind::Float
        } else {
            kind
        };
        let halves = gate_up.f_to_kind(wide)?.f_chunk(2, -1)?;
        halves[0].f_silu()?.f_mul(&halves[1])?.f_to_kind(kind)
    };
    compose().map_err(torch("swiglu.reference"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::testing::*;

    #[test]
    fn agrees_with_fp64_autograd() {
        for (kind, bound) in DTYPES {
            for (n, i) in [(1, 1), (5, 17), (64, 176)] {
                // Wide enough to reach both flat ends of the sigmoid.
                let gate_up = normal("gate_up", &[n, 2 * i], kind) * 6.0;
                let dy = normal("dy", &[n, i], kind);
                let (mut y, mut dgate_up) = (poison(&[n, i], kind), poison(&[n, 2 * i], kind));
                forward(&gate_up, &mut y).unwrap();
                backward(&dy, &gate_up, &mut dgate_up).unwrap();
                let leaf = leaf(&gate_up);
                let expected = reference(&leaf).unwrap();
                assert_close("y", &y, &expected, bound);
                let expected = gradients(&expected, &dy, &[&leaf]);
                assert_close("dgate_up", &dgate_up, &expected[0], bound);
            }
        }
    }

    #[test]
    fn same_bits_on_any_number_of_threads() {
        assert_thread_independent(|| {
            let gate_up = normal("gate_up", &[101, 66], Kind::Float);
            let mut y = poison(&[101, 33], Kind::Float);
            let mut dgate_up = poison(&[101, 66], Kind::Float);
            forward(&gate_up, &mut y).unwrap();
            backward(&y, &gate_up, &mut dgate_up).unwrap();
            [bits(&y), bits(&dgate_up)].concat()
        });
    }

    #[test]
    fn wrong_shapes_are_refused() {
        let mut y = zeros(&[4, 8], Kind::Float);
        let error = forward(&zeros(&[4, 8], Kind::Float), &mut y).unwrap_err();
        assert!(
            matches!(
                error,
                Error::Shape {
                    tensor: "gate_up",
                    ..
                }
            ),
            "{error}"
        );
    }
}
