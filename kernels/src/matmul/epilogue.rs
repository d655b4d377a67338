//! Ways to finish a product. Each is the tail of an op of this crate, done while the sums are near.
//!
//! | epilogue | of the product | writes |
//! |---|---|---|
//! | [`Store`] | any | the sums, rounded |
//! | [`AddTo`] | a weight's gradient | what was there plus the sums |
//! | [`AddResidual`] | a projection back into the residual stream | the stream plus the sums |
//! | [`Rope`] | queries, keys and values | rotated queries and keys, values |
//! | [`Glu`] | gate and up | both, rounded, and `act(gate) · up` |
//! | [`GluGradient`] | the input gradient of the layer after it | gradients of gate and up |

mod glu;
mod rope;
mod store;

pub use glu::{Gate, GeluTanh, Glu, GluGradient, Silu};
pub use rope::Rope;
pub use store::{AddResidual, AddTo, Store};

use crate::Error;
use crate::matmul::{Block, refuse};
use crate::microkernel::pack::Strided;

/// Refuses rows of another shape than `[rows, columns]`, or that reach past their memory.
fn check_read<T>(name: &str, from: Strided<'_, T>, expected: [usize; 2]) -> Result<(), Error> {
    if [from.n, from.d] != expected {
        return refuse(format!(
            "`{name}` must have shape {expected:?}, found {:?}",
            [from.n, from.d]
        ));
    }
    crate::matmul::Matrix::Rows(from).check(name)
}

/// Asks for the lines of a block that will be read, `shift` columns on.
#[inline(always)]
fn prefetch_read<T>(from: Strided<'_, T>, block: &Block, shift: usize) {
    #[cfg(target_arch = "x86_64")]
    for run in block.runs() {
        for row in block.rows.clone() {
            for column in run.columns.clone().step_by(64 / size_of::<T>()) {
                use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
                let at = row * from.stride + shift + column;
                // SAFETY: reads nothing, whatever the address.
                unsafe { _mm_prefetch::<_MM_HINT_T1>(from.data.as_ptr().wrapping_add(at).cast()) };
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (from, block, shift);
}
