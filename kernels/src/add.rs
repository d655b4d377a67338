//! The residual connection: adding a layer's output to the residual stream.

use tch::Tensor;

use crate::Error;
use crate::float::{Float, with_float};
use crate::simd::simd;
use crate::sys::operands::{Operands, shape_of};
use crate::sys::parallel::parallel_split;
use crate::sys::split::Rows;

const FORWARD: &str = "add.forward";
const IN_PLACE: &str = "add.in_place";

/// Elements of one block.
const GRAIN: usize = 4096;

/// `out = a + b` with `a` and `out` in R and `b` in T (each fp32 or bf16), summed in fp32. Any
/// shape, all contiguous and alike. The gradient of both inputs is the output's, so there is no
/// backward pass: R to T is [`crate::cast::forward`].
///
/// # Errors
/// The argument errors of [`Error`].
pub fn forward(a: &Tensor, b: &Tensor, out: &mut Tensor) -> Result<(), Error> {
    let shape = shape_of(out);
    with_float!(FORWARD, "a", a => R: with_float!(FORWARD, "b", b => T: {
        let mut operands = Operands::new(FORWARD);
        let a = operands.read::<R>("a", a, &shape)?;
        let b = operands.read::<T>("b", b, &shape)?;
        let out = operands.write::<R>("out", out, &shape)?;
        parallel_split(a.len().div_ceil(GRAIN), 1, Rows::new(out, GRAIN), |range, out| {
            let at = range.start * GRAIN;
            sum_of(&a[at..][..out.len()], &b[at..][..out.len()], out);
        });
        Ok(())
    }))
}

simd! {
fn sum_of<R: Float, T: Float>(a: &[R], b: &[T], out: &mut [R]) {
    for ((a, b), out) in a.iter().zip(b).zip(out) {
        *out = R::from_f32(a.to_f32() + b.to_f32());
    }
}
}

/// `a += b`, as [`forward`] with the residual stream updated where it lies.
///
/// # Errors
/// The argument errors of [`Error`].
pub fn in_place(a: &mut Tensor, b: &Tensor) -> Result<(), Error> {
    let shape = shape_of(a);
    with_float!(IN_PLACE, "a", a => R: with_float!(IN_PLACE, "b", b => T: {
        let mut operands = Operands::new(IN_PLACE);
        let a = operands.write::<R>("a", a, &shape)?;
        let b = operands.read::<T>("b", b, &shape)?;
        parallel_split(b.len().div_ceil(GRAIN), 1, Rows::new(a, GRAIN), |range, a| {
            add_to(a, &b[range.start * GRAIN..][..a.len()]);
        });
        Ok(())
    }))
}

simd! {
fn add_to<R: Float, T: Float>(a: &mut [R], b: &[T]) {
    for (a, b) in a.iter_mut().zip(b) {
        *a = R::from_f32(a.to_f32() + b.to_f32());
    }
}
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::testing::*;
    use tch::Kind;

    #[test]
    fn adds_in_every_mix_of_dtypes() {
        for residual in [Kind::Float, Kind::BFloat16] {
            for (kind, _) in DTYPES {
                let (a, b) = (
                    normal("a", &[7, 999], residual),
                    normal("b", &[7, 999], kind),
                );
                let expected = (a.to_kind(Kind::Float) + b.to_kind(Kind::Float)).to_kind(residual);
                let mut out = poison(&[7, 999], residual);
                forward(&a, &b, &mut out).unwrap();
                assert_eq!(bits(&out), bits(&expected));
                let mut a = a;
                in_place(&mut a, &b).unwrap();
                assert_eq!(bits(&a), bits(&expected));
            }
        }
    }

    #[test]
    fn refuses_an_output_over_an_input() {
        let mut a = zeros(&[8], Kind::Float);
        let error = forward(&a.shallow_clone(), &zeros(&[8], Kind::Float), &mut a).unwrap_err();
        assert!(
            error.to_string().contains("`a` and `out` share memory"),
            "{error}"
        );
        let half = a.narrow(0, 0, 4);
        assert!(in_place(&mut a.narrow(0, 2, 4), &half).is_err());
        in_place(&mut a.narrow(0, 4, 4), &half).unwrap();
    }
}
