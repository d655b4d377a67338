//! Sum of squares of a flat buffer, the piece of a gradient norm that one rank owns.

use tch::Tensor;

use crate::simd::simd;
use crate::sys::operands::{Operands, sizes};
use crate::sys::parallel::parallel_split;
use crate::sys::split::Rows;
use crate::{Error, Workspace, cuda};

mod on_gpu;

const OP: &str = "norm.sum_of_squares";

/// Partial sums, at most; a constant, so that the order of addition depends on the length alone.
const PARTIALS: usize = 256;

/// Lanes of one partial sum in fp64: one AVX-512 register twice.
const LANES: usize = 16;

/// What a block found.
#[derive(Clone, Copy, Default)]
struct SumOfSquares {
    sum: f64,
    non_finite: u64,
}

/// Adds `Σ x²` of a flat fp32 tensor `x: [n]` to `total[0]`, and how many elements are infinite or NaN
/// to `total[1]`; `total: [2]` fp64. The sum itself is not finite as soon as one element is not.
///
/// The order of addition depends on `n` alone: same bits on any number of threads.
///
/// # Errors
/// The argument errors of [`Error`].
pub fn add_sum_of_squares(
    x: &Tensor,
    total: &mut Tensor,
    workspace: &mut Workspace,
) -> Result<(), Error> {
    let [n] = sizes(OP, "x", x)?;
    if let Some(gpu) = cuda::of(OP, "x", x)? {
        return on_gpu::add_sum_of_squares(&gpu, n, x, total, workspace);
    }
    let mut operands = Operands::new(OP);
    let x = operands.read::<f32>("x", x, &[n])?;
    let total = operands.write::<f64>("total", total, &[2])?;
    let block = n.div_ceil(PARTIALS).next_multiple_of(LANES).max(LANES);
    let blocks = n.div_ceil(block);
    let mut partials = [SumOfSquares::default(); PARTIALS];
    parallel_split(blocks, 1, Rows::new(&mut partials, 1), |range, partials| {
        for (block_index, partial) in range.zip(partials) {
            let start = block_index * block;
            *partial = partial_sum(&x[start..(start + block).min(n)]);
        }
    });
    let mut found = SumOfSquares::default();
    for partial in &partials[..blocks] {
        found.sum += partial.sum;
        found.non_finite += partial.non_finite;
    }
    total[0] += found.sum;
    total[1] += found.non_finite as f64;
    Ok(())
}

simd! {
fn partial_sum(x: &[f32]) -> SumOfSquares {
    let mut sums = [0f64; LANES];
    let mut bad = [0u32; LANES];
    let mut add = |lane: usize, value: f32| {
        let wide = f64::from(value);
        sums[lane] += wide * wide;
        bad[lane] += u32::from(!value.is_finite());
    };
    let (whole, rest) = x.as_chunks::<LANES>();
    for chunk in whole {
        for (lane, &value) in chunk.iter().enumerate() {
            add(lane, value);
        }
    }
    for (lane, &value) in rest.iter().enumerate() {
        add(lane, value);
    }
    SumOfSquares { sum: sums.iter().sum(), non_finite: bad.iter().map(|&b| u64::from(b)).sum() }
}
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::testing::*;
    use tch::{Device, Kind};

    /// The sum, and how many elements are not finite.
    fn sum_of_squares(x: &Tensor) -> [f64; 2] {
        let mut total = zeros(&[2], Kind::Double);
        add_sum_of_squares(x, &mut total, &mut workspace()).unwrap();
        let numbers = Vec::<f64>::try_from(total.to_device(Device::Cpu)).unwrap();
        [numbers[0], numbers[1]]
    }

    #[test]
    fn agrees_with_fp64_at_every_length() {
        everywhere(|| {
            for n in [0, 1, 15, 16, 17, 255, 4096, 4097, 100_003] {
                let x = normal("x", &[n], Kind::Float);
                let squares = x.to_kind(Kind::Double).square().sum(Kind::Double);
                let expected = squares.double_value(&[]);
                let [sum, non_finite] = sum_of_squares(&x);
                assert!((sum - expected).abs() <= 1e-12 * expected, "{n}: {sum}");
                assert_eq!(non_finite, 0.0);
            }
        });
    }

    #[test]
    fn sums_of_several_buffers_add_up() {
        everywhere(|| {
            let (x, mut total) = (normal("x", &[999], Kind::Float), zeros(&[2], Kind::Double));
            for _ in 0..3 {
                add_sum_of_squares(&x, &mut total, &mut workspace()).unwrap();
            }
            let [once, _] = sum_of_squares(&x);
            assert!((total.double_value(&[0]) / once - 3.0).abs() < 1e-14);
        });
    }

    #[test]
    fn large_values_do_not_overflow_and_bad_ones_are_counted() {
        everywhere(|| {
            let x = zeros(&[1000], Kind::Float).fill_(1e30);
            let [sum, _] = sum_of_squares(&x);
            assert!((sum / 1e63 - 1.0).abs() < 1e-6, "{sum}");
            let _ = x.narrow(0, 17, 2).fill_(f64::NAN);
            let _ = x.narrow(0, 999, 1).fill_(f64::NEG_INFINITY);
            let [sum, non_finite] = sum_of_squares(&x);
            assert_eq!(non_finite, 3.0);
            assert!(sum.is_nan());
        });
    }

    #[test]
    fn same_bits_on_any_number_of_threads_and_at_every_level() {
        fn run() -> Vec<u32> {
            let [sum, _] = sum_of_squares(&normal("x", &[123_457], Kind::Float));
            vec![(sum.to_bits() >> 32) as u32, sum.to_bits() as u32]
        }
        assert_level_independent(run);
        assert_order_independent(run);
    }

    #[test]
    fn refuses_what_it_does_not_read() {
        everywhere(|| {
            for wrong in [
                zeros(&[4], Kind::BFloat16),
                zeros(&[2, 2], Kind::Float),
                zeros(&[8], Kind::Float).slice(0, 0, 8, 2),
            ] {
                let mut total = zeros(&[2], Kind::Double);
                assert!(add_sum_of_squares(&wrong, &mut total, &mut workspace()).is_err());
            }
        });
    }
}
