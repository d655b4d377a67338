//! The best kernel for a dtype: what a tensor's dtype and the level in force ask for.

use half::bf16;

use super::{Kernel, fp32::Fp32};
use crate::Float;
use crate::float::Operand;
use crate::simd::vector::Portable;

/// A dtype that is multiplied: f32 or bf16.
pub trait Dtype: Float {
    /// Finds the best kernel at the level in force and hands it over.
    fn with_kernel<V: Visitor<Self>>(visitor: V) -> V::Out;
}

/// What is done with numbers of dtype T once the kernel is known.
pub trait Visitor<T> {
    /// The answer.
    type Out;

    /// Called with the kernel.
    fn visit<K: Kernel>(self, kernel: K) -> Self::Out
    where
        T: Operand<K::Element>;
}

/// The best kernel of fp32 operands.
fn with_fp32<T: Operand<f32>, V: Visitor<T>>(visitor: V) -> V::Out {
    #[cfg(target_arch = "x86_64")]
    {
        use crate::simd::vector::{Avx2, Avx512};
        if let Some(simd) = Avx512::<false>::detect() {
            return visitor.visit(Fp32(simd));
        }
        if let Some(simd) = Avx2::detect() {
            return visitor.visit(Fp32(simd));
        }
    }
    visitor.visit(Fp32(Portable))
}

impl Dtype for f32 {
    fn with_kernel<V: Visitor<f32>>(visitor: V) -> V::Out {
        with_fp32(visitor)
    }
}

impl Dtype for bf16 {
    fn with_kernel<V: Visitor<bf16>>(visitor: V) -> V::Out {
        #[cfg(target_arch = "x86_64")]
        {
            if let Some(kernel) = super::amx::Amx::detect() {
                return visitor.visit(kernel);
            }
            if let Some(kernel) = super::dot::Dot::detect() {
                return visitor.visit(kernel);
            }
        }
        with_fp32(visitor)
    }
}
