//! bf16 pairs by `vdpbf16ps`: two products and two sums per lane and instruction.
//!
//! A tile of 8 rows × 2 panels keeps 16 sums in registers; each step over a pair of k loads two
//! vectors of B and broadcasts 8 words of A, each used twice. The instruction has one issue per
//! cycle and a latency of six, so 6 independent sums would do, and the load ports have slack (10
//! loads for 16 products). Measured on Zen 4, tiles of 6 to 14 rows reach the same 95–99% of the
//! peak in long products; at k = 64, the inner length of scores, 6 and 8 rows are ahead by 2–3%,
//! since less of a tile is loaded and stored while no product runs, and attention as a whole by
//! 5–10%. Panels by three would need fewer loads, but do not divide a head of 64 or 128.
//!
//! The instruction rounds once per pair to nearest even and takes denormals as zero, whatever the
//! thread's floating-point mode.

// Rows and vectors of a register tile are counted by constants; indices unroll into registers.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use half::bf16;

use super::{Kernel, Product, for_each_tile, with_rows};
use crate::simd::vector::{Avx512, WIDTH};

/// Most rows of a register tile.
const ROWS: usize = 8;

/// The kernel of AVX-512 BF16.
#[derive(Clone, Copy, Debug)]
pub struct Dot(Avx512<true>);

impl Dot {
    /// The kernel, where the level in force has it.
    pub fn detect() -> Option<Dot> {
        Avx512::detect().map(Dot)
    }
}

impl Kernel for Dot {
    type Simd = Avx512<true>;
    type Element = bf16;
    type Region = ();

    const RATE: usize = 2 * WIDTH;

    #[inline(always)]
    fn simd(self) -> Avx512<true> {
        self.0
    }

    #[inline(always)]
    fn enter(self) {}

    fn multiply(self, product: Product, a: &[bf16], b: &[bf16], c: &mut [f32]) {
        if product.check(a, b, c) {
            return;
        }
        // SAFETY: the token proves that the instructions exist; `check` proved the sizes.
        unsafe { multiply(product, a.as_ptr(), b.as_ptr(), c.as_mut_ptr()) }
    }
}

/// # Safety
/// `product` describes memory that is valid behind the three pointers.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn multiply(product: Product, a: *const bf16, b: *const bf16, c: *mut f32) {
    let mut panel = 0;
    while panel < product.panels {
        let wide = panel + 2 <= product.panels;
        // SAFETY: the panel exists.
        let (b, c) = unsafe { (b.add(panel * product.b_panel), c.add(panel * WIDTH)) };
        for_each_tile(product.rows, ROWS, |first, rows| {
            // SAFETY: rows first..first + rows exist, and with them the tile.
            unsafe {
                let (a, c) = (a.add(first * product.a_row), c.add(first * product.c_row));
                if wide {
                    with_rows!(rows, R in 1 2 3 4 5 6 7 8 => tile::<R, 2>(&product, a, b, c));
                } else {
                    with_rows!(rows, R in 1 2 3 4 5 6 7 8 => tile::<R, 1>(&product, a, b, c));
                }
            }
        });
        panel += if wide { 2 } else { 1 };
    }
}

/// `R` rows of A times `V` panels.
///
/// # Safety
/// The tile lies within the operands.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn tile<const R: usize, const V: usize>(
    product: &Product,
    a: *const bf16,
    b: *const bf16,
    c: *mut f32,
) {
    // SAFETY: every address lies in the tile or its operands, as the caller promises.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); V]; R];
        if product.add {
            for r in 0..R {
                for v in 0..V {
                    sums[r][v] = _mm512_loadu_ps(c.add(r * product.c_row + WIDTH * v));
                }
            }
        }
        let (mut a_at, mut b_at) = (a, b);
        for _ in 0..product.k / 2 {
            let mut columns = [_mm512_setzero_si512(); V];
            for v in 0..V {
                columns[v] = _mm512_loadu_si512(b_at.add(v * product.b_panel).cast());
            }
            for r in 0..R {
                let pair = a_at.add(r * product.a_row).cast::<i32>().read_unaligned();
                let row = _mm512_set1_epi32(pair);
                for v in 0..V {
                    sums[r][v] = _mm512_dpbf16_ps(
                        sums[r][v],
                        std::mem::transmute::<__m512i, __m512bh>(row),
                        std::mem::transmute::<__m512i, __m512bh>(columns[v]),
                    );
                }
            }
            a_at = a_at.add(2);
            b_at = b_at.add(2 * WIDTH);
        }
        for r in 0..R {
            for v in 0..V {
                _mm512_storeu_ps(c.add(r * product.c_row + WIDTH * v), sums[r][v]);
            }
        }
    }
}
