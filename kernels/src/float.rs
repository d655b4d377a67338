//! The dtypes that kernels are generic over.

use half::bf16;
use tch::Kind;

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
}

/// Runs an expression with a type name standing for the dtype of a CPU tensor: f32 or bf16.
///
/// `with_float!(OP, "name", tensor => T: expression)`; the expression is a `Result<_, Error>`.
macro_rules! with_float {
    ($op:expr, $name:expr, $tensor:expr => $T:ident: $body:expr) => {
        match $crate::sys::operands::check_device($op, $name, $tensor)? {
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
                device: tch::Device::Cpu,
                dtype,
            }),
        }
    };
}
pub(crate) use with_float;
