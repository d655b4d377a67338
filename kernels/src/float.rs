//! The dtypes that kernels are generic over.

use half::bf16;
use tch::Kind;

use crate::microkernel::{Element, head, head_mut};
use crate::simd::vector::{Simd, WIDTH};

/// A Rust type that is the memory of one tensor element.
///
/// tch's own `Element` will not do: for `half::bf16` it answers `Kind::Half`.
///
/// # Safety
/// A tensor of dtype `KIND` must hold values of this very layout, and every bit pattern must be a
/// valid value.
pub unsafe trait Scalar: Copy + Default + Send + Sync + 'static {
    /// The dtype.
    const KIND: Kind;
}

/// Declares plain numbers with their dtypes.
macro_rules! scalars {
    ($($number:ty => $kind:ident),+) => {
        // SAFETY: plain numbers of the width that libtorch documents for the dtype.
        $(unsafe impl Scalar for $number {
            const KIND: Kind = Kind::$kind;
        })+
    };
}
scalars!(u8 => Uint8, i32 => Int, i64 => Int64, f32 => Float, f64 => Double, bf16 => BFloat16);

/// A storage dtype whose arithmetic is done in fp32.
pub trait Float: Scalar {
    /// Exact widening to fp32.
    fn to_f32(self) -> f32;

    /// Rounds to nearest, ties to even; NaN stays NaN.
    fn from_f32(value: f32) -> Self;

    /// Sixteen numbers, widened.
    fn load<S: Simd>(simd: S, from: &[Self; WIDTH]) -> S::F;

    /// Sixteen numbers, rounded.
    fn store<S: Simd>(simd: S, x: S::F, to: &mut [Self; WIDTH]);
}

impl Float for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }

    #[inline(always)]
    fn from_f32(value: f32) -> f32 {
        value
    }

    #[inline(always)]
    fn load<S: Simd>(simd: S, from: &[f32; WIDTH]) -> S::F {
        simd.load(from)
    }

    #[inline(always)]
    fn store<S: Simd>(simd: S, x: S::F, to: &mut [f32; WIDTH]) {
        simd.store(x, to);
    }
}

impl Float for bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    // bf16::from_f32 branches on NaN and calls out of line; shifts and a select vectorise.
    #[inline(always)]
    fn from_f32(value: f32) -> bf16 {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let quiet = (bits >> 16) | 0x40;
        bf16::from_bits(if value.is_nan() { quiet } else { rounded } as u16)
    }

    #[inline(always)]
    fn load<S: Simd>(simd: S, from: &[bf16; WIDTH]) -> S::F {
        simd.load_bf16(from)
    }

    #[inline(always)]
    fn store<S: Simd>(simd: S, x: S::F, to: &mut [bf16; WIDTH]) {
        simd.store_bf16(x, to);
    }
}

/// A storage dtype that can be packed as the operand `E` of a product.
pub trait Operand<E: Element>: Float {
    /// Sixteen words of operands from the `16 · E::PER_WORD` numbers they stand for.
    fn load_words<S: Simd>(simd: S, from: &[Self]) -> S::F;
}

impl Operand<f32> for f32 {
    #[inline(always)]
    fn load_words<S: Simd>(simd: S, from: &[f32]) -> S::F {
        simd.load(head(from))
    }
}

impl Operand<f32> for bf16 {
    #[inline(always)]
    fn load_words<S: Simd>(simd: S, from: &[bf16]) -> S::F {
        simd.load_bf16(head(from))
    }
}

impl Operand<bf16> for bf16 {
    #[inline(always)]
    fn load_words<S: Simd>(simd: S, from: &[bf16]) -> S::F {
        <bf16 as Element>::load_words(simd, from)
    }
}

/// Sixteen numbers of a row from `at` on, zeros past its end.
#[inline(always)]
pub(crate) fn load_padded<T: Float, S: Simd>(simd: S, row: &[T], at: usize) -> S::F {
    let rest = &row[at.min(row.len())..];
    if rest.len() >= WIDTH {
        return T::load(simd, head(rest));
    }
    let mut padded = [T::default(); WIDTH];
    padded[..rest.len()].copy_from_slice(rest);
    T::load(simd, &padded)
}

/// Writes sixteen numbers into a row from `at` on, as many as it has room for.
#[inline(always)]
pub(crate) fn store_cut<T: Float, S: Simd>(simd: S, x: S::F, row: &mut [T], at: usize) {
    let rest = &mut row[at..];
    if rest.len() >= WIDTH {
        return T::store(simd, x, head_mut(rest));
    }
    let mut all = [T::default(); WIDTH];
    T::store(simd, x, &mut all);
    rest.copy_from_slice(&all[..rest.len()]);
}

/// Runs an expression with a type name standing for the dtype of a tensor: f32 or bf16.
///
/// `with_float!(OP, "name", tensor => T: expression)`; the expression is a `Result<_, Error>`.
macro_rules! with_float {
    ($op:expr, $name:expr, $tensor:expr => $T:ident: $body:expr) => {
        match $crate::sys::operands::check_dtype($op, $name, $tensor)? {
            tch::Kind::Float => {
                type $T = f32;
                $body
            }
            tch::Kind::BFloat16 => {
                type $T = half::bf16;
                $body
            }
            dtype => Err($crate::Error::Unsupported {
                op: $op,
                tensor: $name,
                dtype,
            }),
        }
    };
}
pub(crate) use with_float;
