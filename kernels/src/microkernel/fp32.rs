//! fp32 operands by multiply-add, at every level.
//!
//! The tile follows the number of registers ([`Simd::TILE`]): 8 × 2 panels of AVX-512's 32 (16 sums,
//! two vectors of B, a broadcast of A), 6 × 1 of AVX2's 16, 2 × 1 of SSE's 16.

// Rows and vectors of a register tile are counted by constants; indices unroll into registers.
#![allow(clippy::needless_range_loop)]

use super::{Kernel, Product, for_each_tile, with_rows};
use crate::simd::vector::{Simd, WIDTH, per_level};

/// fp32 products with the vectors `S`.
#[derive(Clone, Copy, Debug)]
pub struct Fp32<S>(pub S);

impl<S: Simd> Kernel for Fp32<S> {
    type Simd = S;
    type Element = f32;
    type Region = ();

    const RATE: usize = WIDTH;

    #[inline(always)]
    fn simd(self) -> S {
        self.0
    }

    #[inline(always)]
    fn enter(self) {}

    fn multiply(self, product: Product, a: &[f32], b: &[f32], c: &mut [f32]) {
        if product.check(a, b, c) {
            return;
        }
        multiply(self.0, product, a, b, c);
    }
}

fn multiply<S: Simd>(simd: S, product: Product, a: &[f32], b: &[f32], c: &mut [f32]) {
    let (most, width) = S::TILE;
    let mut panel = 0;
    while panel < product.panels {
        let wide = width == 2 && panel + 2 <= product.panels;
        let b = &b[panel * product.b_panel..];
        for_each_tile(product.rows, most, |first, rows| {
            let a = &a[first * product.a_row..];
            let c = &mut c[first * product.c_row + panel * WIDTH..];
            // The match on `most` lets a level compile only the tiles that it uses.
            if most <= 2 {
                with_rows!(rows, R in 1 2 => tile::<S, R, 1>(simd, &product, a, b, c));
            } else if most <= 6 {
                with_rows!(rows, R in 1 2 3 4 5 6 => tile::<S, R, 1>(simd, &product, a, b, c));
            } else if wide {
                with_rows!(rows, R in 1 2 3 4 5 6 7 8 => tile::<S, R, 2>(simd, &product, a, b, c));
            } else {
                with_rows!(rows, R in 1 2 3 4 5 6 7 8 => tile::<S, R, 1>(simd, &product, a, b, c));
            }
        });
        panel += if wide { 2 } else { 1 };
    }
}

per_level! {
/// `R` rows of A times `V` panels; [`Product::check`] has proved the sizes.
fn tile[S; const R: usize; const V: usize](
    simd: S, product: &Product, a: &[f32], b: &[f32], c: &mut [f32],
) {
    let (a, b, c) = (a.as_ptr(), b.as_ptr(), c.as_mut_ptr());
    let mut sums = [[simd.splat(0.0); V]; R];
    // SAFETY: `check` held for the whole product and the tile lies in it, so every row of A has k
    // elements, every panel k · 16, every row of C 16 · V.
    unsafe {
        let cell = |r: usize, v: usize| c.add(r * product.c_row + WIDTH * v).cast::<[f32; WIDTH]>();
        if product.add {
            for r in 0..R {
                for v in 0..V {
                    sums[r][v] = simd.load(&*cell(r, v));
                }
            }
        }
        for k in 0..product.k {
            let mut columns = [simd.splat(0.0); V];
            for v in 0..V {
                columns[v] = simd.load(&*b.add(v * product.b_panel + WIDTH * k).cast());
            }
            for r in 0..R {
                let row = simd.splat(*a.add(r * product.a_row + k));
                for v in 0..V {
                    sums[r][v] = simd.fma(row, columns[v], sums[r][v]);
                }
            }
        }
        for r in 0..R {
            for v in 0..V {
                simd.store(sums[r][v], &mut *cell(r, v));
            }
        }
    }
}
}
