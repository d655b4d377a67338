//! Rotary position embedding (Su et al. 2021) in the half-split (NeoX) layout of Hugging Face.
//!
//! Element `i` of the first half of a head turns with element `i + d/2` by the angle
//! `position · base^(−2i/d)`. Angles and products are fp32.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use crate::error::torch;
use crate::float::{Float, with_float};
use crate::simd::simd;
use crate::sys::operands::{Operands, sizes};
use crate::sys::parallel::parallel_split;
use crate::{Error, cuda};

mod on_gpu;

const TABLE: &str = "rope.table";
const FORWARD: &str = "rope.forward";
const BACKWARD: &str = "rope.backward";
const GRAIN: usize = 8;

/// Cosines and sines of every position below a limit, for one base and head size.
pub struct RopeTable {
    base: f64,
    /// `[positions, d/2]` fp32 each.
    cos: Tensor,
    sin: Tensor,
    positions: usize,
    half: usize,
}

/// Where the rows of a table are looked up.
pub(crate) struct Angles<'a> {
    /// `[positions, d/2]`
    pub(crate) cos: &'a [f32],
    /// `[positions, d/2]`
    pub(crate) sin: &'a [f32],
    /// `[n]`, each in the table.
    pub(crate) positions: &'a [i64],
}

impl RopeTable {
    /// Tables on `device` for positions `0..max_positions`.
    ///
    /// The inverse frequencies are computed by libtorch in fp32 in the order of the Hugging Face
    /// models (`1 / base ** (arange(0, d, 2) / d)`): one unit in the last place there is 1e-3
    /// radians at position 30,000.
    ///
    /// # Errors
    /// [`Error::Argument`] for an odd or zero `head_dim` or a base that is not positive and
    /// finite.
    pub fn new(
        base: f64,
        head_dim: usize,
        max_positions: usize,
        device: Device,
    ) -> Result<RopeTable, Error> {
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            let message = format!("head_dim must be even and positive, found {head_dim}");
            return Err(Error::Argument { op: TABLE, message });
        }
        if !(base.is_finite() && base > 0.0) {
            let message = format!("the base must be positive and finite, found {base}");
            return Err(Error::Argument { op: TABLE, message });
        }
        let fp32 = (Kind::Float, Device::Cpu);
        let build = || {
            let steps = Tensor::f_arange_start_step(0.0, head_dim as f64, 2.0, fp32)?;
            let exponents = steps.f_div_scalar(head_dim as f64)?;
            let inverse = Tensor::f_pow_scalar(base, &exponents)?.f_reciprocal()?;
            let positions = Tensor::f_arange(max_positions as i64, fp32)?;
            let angles = positions.f_unsqueeze(1)?.f_mul(&inverse.f_unsqueeze(0)?)?;
            // On the CPU first: the same angles on every device.
            Ok((
                angles.f_cos()?.f_to_device(device)?,
                angles.f_sin()?.f_to_device(device)?,
            ))
        };
        let (cos, sin) = build().map_err(torch(TABLE))?;
        Ok(RopeTable {
            base,
            cos,
            sin,
            positions: max_positions,
            half: head_dim / 2,
        })
    }

    /// The base that the table was built with.
    pub fn base(&self) -> f64 {
        self.base
    }

    /// Positions `0..max_positions` can be looked up.
    pub fn max_positions(&self) -> usize {
        self.positions
    }

    /// Cosines and sines for the rows at `positions: [n]` int64, all of them in the table.
    pub(crate) fn angles<'a>(
        &'a self,
        operands: &mut Operands,
        positions: &'a Tensor,
        n: usize,
    ) -> Result<Angles<'a>, Error> {
        let shape = [self.positions, self.half];
        Ok(Angles {
            cos: operands.read::<f32>("cos", &self.cos, &shape)?,
            sin: operands.read::<f32>("sin", &self.sin, &shape)?,
            positions: check_positions(operands, positions, n, self.positions)?,
        })
    }

    /// Elements of one head.
    pub fn head_dim(&self) -> usize {
        2 * self.half
    }
}

/// Turns every head of `x` in place.
///
/// `x: [n, heads, d]` in T: rows may lie apart (the query and key heads of a fused qkv buffer),
/// heads and elements within a row may not. `positions: [n]` int64. Same bits on any
/// number of threads.
///
/// # Errors
/// The argument errors of [`Error`]; [`Error::Index`] for a position outside the table, which on a GPU
/// makes the row NaN instead.
pub fn forward(table: &RopeTable, positions: &Tensor, x: &mut Tensor) -> Result<(), Error> {
    rotate(FORWARD, table, positions, x, 1.0)
}

/// Gradient of [`forward`] in place: turns every head of `dx` back.
///
/// # Errors
/// As [`forward`].
pub fn backward(table: &RopeTable, positions: &Tensor, dx: &mut Tensor) -> Result<(), Error> {
    rotate(BACKWARD, table, positions, dx, -1.0)
}

fn rotate(
    op: &'static str,
    table: &RopeTable,
    positions: &Tensor,
    x: &mut Tensor,
    direction: f32,
) -> Result<(), Error> {
    let [n, heads, d] = sizes(op, "x", x)?;
    let half = table.half;
    if d != 2 * half {
        let expected = vec![n as i64, heads as i64, 2 * half as i64];
        return Err(Error::Shape {
            op,
            tensor: "x",
            expected,
            found: x.size(),
        });
    }
    if let Some(gpu) = cuda::of(op, "x", x)? {
        return on_gpu::rotate(&gpu, op, table, positions, x, [n, heads], direction);
    }
    with_float!(op, "x", x => T: {
        let mut operands = Operands::new(op);
        let Angles { cos, sin, positions } = table.angles(&mut operands, positions, n)?;
        let rows = operands.write_heads::<T>("x", x, [n, heads, d])?.by_rows();
        parallel_split(n, GRAIN, rows, |range: Range<usize>, mut part| {
            for (r, t) in range.enumerate() {
                let at = positions[t] as usize * half;
                rotate_row(part.row(r), &cos[at..at + half], &sin[at..at + half], direction);
            }
        });
        Ok(())
    })
}

simd! {
fn rotate_row<T: Float>(row: &mut [T], cos: &[f32], sin: &[f32], direction: f32) {
    let half = cos.len();
    for head in row.chunks_exact_mut(2 * half) {
        let (first, second) = head.split_at_mut(half);
        for i in 0..half {
            let (a, b) = (first[i].to_f32(), second[i].to_f32());
            let (c, s) = (cos[i], sin[i] * direction);
            first[i] = T::from_f32(a * c - b * s);
            second[i] = T::from_f32(b * c + a * s);
        }
    }
}
}

/// Positions, all known to lie in a table of `limit`.
fn check_positions<'a>(
    operands: &mut Operands,
    tensor: &'a Tensor,
    n: usize,
    limit: usize,
) -> Result<&'a [i64], Error> {
    let positions = operands.read::<i64>("positions", tensor, &[n])?;
    let limit = limit as i64;
    match positions.iter().position(|at| !(0..limit).contains(at)) {
        None => Ok(positions),
        Some(at) => Err(Error::Index {
            op: operands.op(),
            tensor: "positions",
            at,
            value: positions[at],
            limit,
        }),
    }
}

/// The same function as a composition of libtorch ops, for autograd to differentiate: `x: [n,
/// heads, d]`, any floating dtype, products in that dtype.
///
/// # Errors
/// [`Error::Torch`].
pub fn reference(table: &RopeTable, positions: &Tensor, x: &Tensor) -> Result<Tensor, Error> {
    let compose = || {
        let kind = x.f_kind()?;
        let pick = |t: &Tensor| {
            t.f_index_select(0, positions)?
                .f_unsqueeze(1)?
                .f_to_kind(kind)
        };
        let (cos, sin) = (pick(&table.cos)?, pick(&table.sin)?);
        let halves = x.f_chunk(2, -1)?;
        let (a, b) = (&halves[0], &halves[1]);
        let first = a.f_mul(&cos)?.f_sub(&b.f_mul(&sin)?)?;
        let second = b.f_mul(&cos)?.f_add(&a.f_mul(&sin)?)?;
        Tensor::f_cat(&[first, second], -1)
    };
    compose().map_err(torch("rope.reference"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::testing::*;

    #[test]
    fn agrees_with_fp64_autograd_everywhere() {
        everywhere(|| {
            for d in [16, 6, 256] {
                agrees_with_fp64_autograd_on_a_part_of_a_fused_buffer(d);
            }
        });
    }

    fn agrees_with_fp64_autograd_on_a_part_of_a_fused_buffer(d: i64) {
        let (n, heads) = (9i64, 3i64);
        let table = RopeTable::new(10_000.0, d as usize, 100, device()).unwrap();
        let positions = Tensor::from_slice(&[0i64, 1, 2, 3, 0, 1, 99, 50, 7]).to_device(device());
        for (kind, bound) in DTYPES {
            let fused = normal("qkv", &[n, heads + 2, d], kind);
            let before = fused.copy();
            forward(&table, &positions, &mut fused.narrow(1, 0, heads)).unwrap();
            let leaf = leaf(&before.narrow(1, 0, heads));
            let expected = reference(&table, &positions, &leaf).unwrap();
            assert_close("x", &fused.narrow(1, 0, heads), &expected, bound);
            let rest = (fused.narrow(1, heads, 2), before.narrow(1, heads, 2));
            assert_eq!(
                bits(&rest.0),
                bits(&rest.1),
                "the values must stay as they are"
            );

            let seed = normal("dx", &[n, heads, d], kind);
            let expected = gradients(&expected, &seed, &[&leaf]);
            let mut dx = seed.copy();
            backward(&table, &positions, &mut dx).unwrap();
            assert_close("dx", &dx, &expected[0], bound);
        }
    }

    #[test]
    fn same_bits_on_any_number_of_threads_and_at_every_level() {
        assert_level_independent(|| {
            let table = RopeTable::new(10_000.0, 18, 50, device()).unwrap();
            let positions = Tensor::arange(50, (Kind::Int64, device()));
            let mut x = normal("x", &[50, 3, 18], Kind::BFloat16);
            forward(&table, &positions, &mut x).unwrap();
            bits(&x)
        });
    }

    #[test]
    fn the_pairs_are_half_split_and_position_zero_stands_still() {
        let table = RopeTable::new(100.0, 4, 3, device()).unwrap();
        let mut x = Tensor::from_slice(&[1f32, 2.0, 3.0, 4.0]).view([1, 1, 4]);
        forward(&table, &Tensor::from_slice(&[0i64]), &mut x).unwrap();
        assert_eq!(
            Vec::<f32>::try_from(x.view([4])).unwrap(),
            [1.0, 2.0, 3.0, 4.0]
        );
        forward(&table, &Tensor::from_slice(&[2i64]), &mut x).unwrap();
        // Frequencies 1 and 100^(-1/2) = 0.1: element 0 turns with 2, element 1 with 3.
        let ((s, c), (s2, c2)) = (2f32.sin_cos(), 0.2f32.sin_cos());
        let expected = [
            c - 3.0 * s,
            2.0 * c2 - 4.0 * s2,
            3.0 * c + s,
            4.0 * c2 + 2.0 * s2,
        ];
        let expected = Tensor::from_slice(&expected).view([1, 1, 4]);
        assert_close("x", &x, &expected, 1e-6);
    }

    #[test]
    fn bad_arguments_are_named() {
        assert!(
            RopeTable::new(1e4, 7, 4, device())
                .err()
                .unwrap()
                .to_string()
                .contains("found 7")
        );
        assert!(RopeTable::new(f64::NAN, 8, 4, device()).is_err());
        let table = RopeTable::new(1e4, 8, 4, device()).unwrap();
        assert_eq!(
            (table.head_dim(), table.max_positions(), table.base()),
            (8, 4, 1e4)
        );
        let mut x = zeros(&[2, 1, 8], Kind::Float);
        let error = forward(&table, &Tensor::from_slice(&[3i64, 4]), &mut x).unwrap_err();
        assert!(error.to_string().contains("`positions`[1] is 4"), "{error}");
        let positions = Tensor::from_slice(&[0i64, 1]);
        assert!(forward(&table, &positions, &mut zeros(&[2, 1, 6], Kind::Float)).is_err());
        let mut transposed = zeros(&[8, 1, 2], Kind::Float).transpose(0, 2);
        assert!(matches!(
            forward(&table, &positions, &mut transposed),
            Err(Error::Layout { tensor: "x", .. })
        ));
        assert!(forward(&table, &positions.to_kind(Kind::Float), &mut x).is_err());
    }
}
