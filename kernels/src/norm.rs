//! Sum of squares of a flat buffer, the piece of a gradient norm that one rank owns.

use std::ops::AddAssign;

use tch::Tensor;

use crate::Error;
use crate::simd::simd;
use crate::sys::operands::{Operands, sizes};
use crate::sys::parallel::parallel_split;
use crate::sys::split::Rows;

const OP: &str = "norm.sum_of_squares";

/// Partial sums, at most; a constant, so that the order of addition depends on the length alone.
const PARTIALS: usize = 256;

/// Lanes of one partial sum in fp64: one AVX-512 register twice.
const LANES: usize = 16;

/// What [`sum_of_squares`] found.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SumOfSquares {
    /// `Σ x²` in fp64; infinite or NaN as soon as one element is.
    pub sum: f64,
    /// Elements that are infinite or NaN.
    pub non_finite: u64,
}

impl AddAssign for SumOfSquares {
    fn add_assign(&mut self, other: SumOfSquares) {
        self.sum += other.sum;
        self.non_finite += other.non_finite;
    }
}

/// `Σ x²` of a flat fp32 tensor `x: [n]`, and how many elements are not finite.
///
/// The order of addition depends on `n` alone: same bits on any number of threads.
///
/// # Errors
/// The argument errors of [`Error`].
pub fn sum_of_squares(x: &Tensor) -> Result<SumOfSquares, Error> {
    let [n] = sizes(OP, "x", x)?;
    let x = Operands::new(OP).read::<f32>("x", x, &[n])?;
    let block = n.div_ceil(PARTIALS).next_multiple_of(LANES).max(LANES);
    let blocks = n.div_ceil(block);
    let mut partials = [SumOfSquares::default(); PARTIALS];
    parallel_split(blocks, 1, Rows::new(&mut partials, 1), |range, partials| {
        for (block_index, partial) in range.zip(partials) {
            let start = block_index * block;
            *partial = partial_sum(&x[start..(start + block).min(n)]);
        }
    });
    let mut total = SumOfSquares::default();
    for partial in &partials[..blocks] {
        total += *partial;
    }
    Ok(total)
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
    use tch::Kind;

    #[test]
    fn agrees_with_fp64_at_every_length() {
        for n in [0, 1, 15, 16, 17, 255, 4096, 4097, 100_003] {
            let x = normal("x", &[n], Kind::Float);
            let expected = x
                .to_kind(Kind::Double)
                .square()
                .sum(Kind::Double)
                .double_value(&[]);
            let found = sum_of_squares(&x).unwrap();
            assert!(
                (found.sum - expected).abs() <= 1e-12 * expected,
                "{n}: {found:?}"
            );
            assert_eq!(found.non_finite, 0);
        }
    }

    #[test]
    fn large_values_do_not_overflow_and_bad_ones_are_counted() {
        let x = Tensor::full([1000], 1e30, (Kind::Float, tch::Device::Cpu));
        let sum = sum_of_squares(&x).unwrap().sum;
        assert!((sum / 1e63 - 1.0).abs() < 1e-6, "{sum}");
        let _ = x.narrow(0, 17, 2).fill_(f64::NAN);
        let _ = x.narrow(0, 999, 1).fill_(f64::NEG_INFINITY);
        let found = sum_of_squares(&x).unwrap();
        assert_eq!(found.non_finite, 3);
        assert!(found.sum.is_nan());
    }

    #[test]
    fn same_bits_on_any_number_of_threads_and_at_every_level() {
        assert_level_independent(|| {
            let sum = sum_of_squares(&normal("x", &[123_457], Kind::Float))
                .unwrap()
                .sum;
            vec![(sum.to_bits() >> 32) as u32, sum.to_bits() as u32]
        });
    }

    #[test]
    fn refuses_what_it_does_not_read() {
        assert!(sum_of_squares(&zeros(&[4], Kind::BFloat16)).is_err());
        assert!(sum_of_squares(&zeros(&[2, 2], Kind::Float)).is_err());
        assert!(sum_of_squares(&zeros(&[8], Kind::Float).slice(0, 0, 8, 2)).is_err());
    }
}
