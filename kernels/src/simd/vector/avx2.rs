//! Two AVX2 registers.

use std::arch::x86_64::*;

use half::bf16;

use super::{EXP2, EXP2_SMALLEST, Portable, Simd, WIDTH};
use crate::simd::{Level, level};

/// AVX2 with fused multiply-add; proof that the processor has both.
#[derive(Clone, Copy, Debug)]
pub struct Avx2(());

impl Avx2 {
    /// The token, where the level in force contains AVX2.
    pub fn detect() -> Option<Avx2> {
        (level() >= Level::Avx2).then_some(Avx2(()))
    }
}

/// Both registers through one expression.
macro_rules! both {
    (|$i:ident| $body:expr) => {{
        // SAFETY: the token proves that the instructions exist.
        unsafe {
            [
                {
                    let $i = 0usize;
                    $body
                },
                {
                    let $i = 1usize;
                    $body
                },
            ]
        }
    }};
}

/// Eight lanes of ones where the mask has bits `8 · part ..`.
#[inline(always)]
unsafe fn lanes(mask: u16, part: usize) -> __m256 {
    // SAFETY: the caller holds the token.
    unsafe {
        let bits = _mm256_set1_epi32(i32::from(mask) >> (8 * part));
        let bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(bits, bit), bit))
    }
}

/// Turns an 8 × 8 square.
#[inline(always)]
unsafe fn transpose8(r: [__m256; 8]) -> [__m256; 8] {
    // SAFETY: the caller holds the token.
    unsafe {
        let mut t = r;
        for i in 0..4 {
            t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
        }
        let mut u = t;
        for i in 0..2 {
            let [a, b, c, d] = [t[4 * i], t[4 * i + 1], t[4 * i + 2], t[4 * i + 3]];
            u[4 * i] = _mm256_shuffle_ps::<0x44>(a, c);
            u[4 * i + 1] = _mm256_shuffle_ps::<0xee>(a, c);
            u[4 * i + 2] = _mm256_shuffle_ps::<0x44>(b, d);
            u[4 * i + 3] = _mm256_shuffle_ps::<0xee>(b, d);
        }
        let mut out = u;
        for i in 0..4 {
            out[i] = _mm256_permute2f128_ps::<0x20>(u[i], u[i + 4]);
            out[i + 4] = _mm256_permute2f128_ps::<0x31>(u[i], u[i + 4]);
        }
        out
    }
}

impl Simd for Avx2 {
    type F = [__m256; 2];

    const LEVEL: Level = Level::Avx2;
    // Sixteen registers: twelve sums, two of the panel, one broadcast.
    const TILE: (usize, usize) = (6, 1);

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        both!(|_i| _mm256_set1_ps(x))
    }

    #[inline(always)]
    fn load(self, from: &[f32; WIDTH]) -> Self::F {
        both!(|i| _mm256_loadu_ps(from.as_ptr().add(8 * i)))
    }

    #[inline(always)]
    fn store(self, x: Self::F, to: &mut [f32; WIDTH]) {
        both!(|i| _mm256_storeu_ps(to.as_mut_ptr().add(8 * i), x[i]));
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        both!(|i| _mm256_add_ps(a[i], b[i]))
    }

    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        both!(|i| _mm256_sub_ps(a[i], b[i]))
    }

    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        both!(|i| _mm256_mul_ps(a[i], b[i]))
    }

    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        both!(|i| _mm256_fmadd_ps(a[i], b[i], c[i]))
    }

    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        both!(|i| _mm256_max_ps(a[i], b[i]))
    }

    #[inline(always)]
    fn greater(self, a: Self::F, b: Self::F) -> u16 {
        let bits = both!(|i| _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(a[i], b[i])));
        (bits[0] | bits[1] << 8) as u16
    }

    #[inline(always)]
    fn select(self, mask: u16, a: Self::F, b: Self::F) -> Self::F {
        both!(|i| _mm256_blendv_ps(b[i], a[i], lanes(mask, i)))
    }

    #[inline(always)]
    fn exp2(self, x: Self::F) -> Self::F {
        both!(|i| {
            let low = _mm256_set1_ps(EXP2_SMALLEST);
            // NaN must come from the second operand to survive.
            let inside = _mm256_max_ps(low, x[i]);
            let n = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(inside);
            let r = _mm256_sub_ps(inside, n);
            let mut p = _mm256_set1_ps(EXP2[4]);
            for c in [EXP2[3], EXP2[2], EXP2[1], EXP2[0]] {
                p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(c));
            }
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            let power = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent));
            let tiny = _mm256_cmp_ps::<_CMP_LT_OQ>(x[i], low);
            _mm256_andnot_ps(tiny, _mm256_mul_ps(p, power))
        })
    }

    #[inline(always)]
    fn load_bf16(self, from: &[bf16; WIDTH]) -> Self::F {
        both!(|i| {
            let words = _mm_loadu_si128(from.as_ptr().add(8 * i).cast());
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(words)))
        })
    }

    #[inline(always)]
    fn store_bf16(self, x: Self::F, to: &mut [bf16; WIDTH]) {
        let mut lanes = [0.0; WIDTH];
        self.store(x, &mut lanes);
        Portable.store_bf16(lanes, to);
    }

    #[inline(always)]
    fn store_bf16_pairs(self, even: Self::F, odd: Self::F, to: &mut [bf16; 2 * WIDTH]) {
        let mut lanes = [[0.0; WIDTH]; 2];
        self.store(even, &mut lanes[0]);
        self.store(odd, &mut lanes[1]);
        Portable.store_bf16_pairs(lanes[0], lanes[1], to);
    }

    #[inline(always)]
    fn round_words(self, low: Self::F, high: Self::F) -> Self::F {
        let mut lanes = [[0.0; WIDTH]; 2];
        self.store(low, &mut lanes[0]);
        self.store(high, &mut lanes[1]);
        self.load(&Portable.round_words(lanes[0], lanes[1]))
    }

    #[inline(always)]
    fn transpose(self, rows: [Self::F; WIDTH]) -> [Self::F; WIDTH] {
        // SAFETY: the token proves that the instructions exist.
        unsafe {
            let quarter = |row: usize, part: usize| -> [__m256; 8] {
                transpose8(std::array::from_fn(|i| rows[row + i][part]))
            };
            let (a, b, c, d) = (quarter(0, 0), quarter(8, 0), quarter(0, 1), quarter(8, 1));
            std::array::from_fn(|i| {
                if i < 8 {
                    [a[i], b[i]]
                } else {
                    [c[i - 8], d[i - 8]]
                }
            })
        }
    }

    #[inline(always)]
    fn pair_words(self, a: Self::F, b: Self::F) -> [Self::F; 2] {
        let mut lanes = [[0.0; WIDTH]; 2];
        self.store(a, &mut lanes[0]);
        self.store(b, &mut lanes[1]);
        let [low, high] = Portable.pair_words(lanes[0], lanes[1]);
        [self.load(&low), self.load(&high)]
    }
}
