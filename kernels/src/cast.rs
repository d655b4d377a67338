//! Changing dtype between fp32 and bf16, and adding a narrower tensor to an fp32 one.

use tch::Tensor;

use crate::float::{Float, with_float};
use crate::simd::simd;
use crate::sys::operands::{Operands, shape_of};
use crate::sys::parallel::parallel_split;
use crate::sys::split::Rows;
use crate::{Error, cuda};

pub(crate) mod on_gpu;

const FORWARD: &str = "cast.forward";
const ACCUMULATE: &str = "cast.accumulate";

/// Elements of one block: 16 KiB of fp32.
const GRAIN: usize = 4096;

/// `out = x`, rounded to nearest even where `out` is narrower. Any shape, both contiguous and
/// alike, each fp32 or bf16.
///
/// # Errors
/// The argument errors of [`Error`].
pub fn forward(x: &Tensor, out: &mut Tensor) -> Result<(), Error> {
    let shape = shape_of(out);
    if let Some(gpu) = cuda::of(FORWARD, "x", x)? {
        return on_gpu::forward(&gpu, &shape, x, out);
    }
    with_float!(FORWARD, "x", x => A: with_float!(FORWARD, "out", out => B: {
        let mut operands = Operands::new(FORWARD);
        let x = operands.read::<A>("x", x, &shape)?;
        let out = operands.write::<B>("out", out, &shape)?;
        parallel_split(x.len().div_ceil(GRAIN), 1, Rows::new(out, GRAIN), |range, out| {
            convert(&x[range.start * GRAIN..][..out.len()], out);
        });
        Ok(())
    }))
}

simd! {
fn convert<A: Float, B: Float>(x: &[A], out: &mut [B]) {
    for (x, out) in x.iter().zip(out) {
        *out = B::from_f32(x.to_f32());
    }
}
}

/// `out += x` with `out` in fp32 and `x` in fp32 or bf16. Any shape, both contiguous and alike.
///
/// # Errors
/// The argument errors of [`Error`].
pub fn accumulate(x: &Tensor, out: &mut Tensor) -> Result<(), Error> {
    let shape = shape_of(out);
    if let Some(gpu) = cuda::of(ACCUMULATE, "x", x)? {
        return on_gpu::accumulate(&gpu, &shape, x, out);
    }
    with_float!(ACCUMULATE, "x", x => A: {
        let mut operands = Operands::new(ACCUMULATE);
        let x = operands.read::<A>("x", x, &shape)?;
        let out = operands.write::<f32>("out", out, &shape)?;
        parallel_split(x.len().div_ceil(GRAIN), 1, Rows::new(out, GRAIN), |range, out| {
            add_to(&x[range.start * GRAIN..][..out.len()], out);
        });
        Ok(())
    })
}

simd! {
fn add_to<A: Float>(x: &[A], out: &mut [f32]) {
    for (x, out) in x.iter().zip(out) {
        *out += x.to_f32();
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
    fn rounds_as_libtorch_does_everywhere() {
        everywhere(rounds_as_libtorch_does);
    }

    fn rounds_as_libtorch_does() {
        let special = [
            0.0,
            -0.0,
            1.0,
            f32::NAN,
            f32::INFINITY,
            f32::MAX,
            1e-40,
            257.0 / 256.0,
            -3.1,
        ];
        let x = Tensor::cat(
            &[
                normal("x", &[9001], Kind::Float),
                Tensor::from_slice(&special).to_device(device()),
            ],
            0,
        );
        let mut narrow = zeros(&[9010], Kind::BFloat16);
        forward(&x, &mut narrow).unwrap();
        let expected = x.to_kind(Kind::BFloat16);
        let same = narrow.eq_tensor(&expected).logical_or(&expected.isnan());
        assert!(same.all().int64_value(&[]) == 1);
        assert_eq!(narrow.isnan().sum(Kind::Int64).int64_value(&[]), 1);
        let mut wide = zeros(&[9010], Kind::Float);
        forward(&narrow, &mut wide).unwrap();
        assert_eq!(bits(&wide), bits(&narrow));
    }

    #[test]
    fn accumulates_into_fp32_everywhere() {
        everywhere(accumulates_into_fp32);
    }

    fn accumulates_into_fp32() {
        for (kind, _) in DTYPES {
            let x = normal("x", &[33, 130], kind);
            let mut out = normal("out", &[33, 130], Kind::Float);
            let expected = &out + x.to_kind(Kind::Float);
            accumulate(&x, &mut out).unwrap();
            assert_eq!(bits(&out), bits(&expected));
        }
    }

    #[test]
    fn same_bits_on_any_number_of_threads_and_at_every_level() {
        assert_level_independent(|| {
            let wide = normal("wide", &[9001], Kind::Float);
            let mut narrow = poison(&[9001], Kind::BFloat16);
            forward(&wide, &mut narrow).unwrap();
            let mut sum = normal("sum", &[9001], Kind::Float);
            accumulate(&narrow, &mut sum).unwrap();
            [bits(&narrow), bits(&sum)].concat()
        });
    }

    #[test]
    fn refuses_other_shapes_and_dtypes_everywhere() {
        everywhere(refuses_other_shapes_and_dtypes);
    }

    fn refuses_other_shapes_and_dtypes() {
        let x = zeros(&[4], Kind::Float);
        assert!(forward(&x, &mut zeros(&[5], Kind::Float)).is_err());
        assert!(forward(&x, &mut zeros(&[4], Kind::Half)).is_err());
        assert!(accumulate(&x, &mut zeros(&[4], Kind::BFloat16)).is_err());
        assert!(forward(&x, &mut x.shallow_clone()).is_err());
    }
}
