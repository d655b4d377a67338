//! One AVX-512 register.

use std::arch::x86_64::*;

use half::bf16;

use super::{EXP2, EXP2_SMALLEST, Simd, WIDTH};
use crate::simd::{Level, level};

/// AVX-512 F, BW, DQ and VL, and BF16 if the parameter is true; proof that the processor has them.
#[derive(Clone, Copy, Debug)]
pub struct Avx512<const BF16: bool>(());

impl<const BF16: bool> Avx512<BF16> {
    /// The token, where the level in force contains these instructions.
    pub fn detect() -> Option<Self> {
        (level() >= Self::LEVEL).then_some(Avx512(()))
    }

    /// The token, whatever level is in force.
    ///
    /// # Safety
    /// The processor has the instructions.
    pub(crate) unsafe fn assume() -> Self {
        Avx512(())
    }
}

/// Rounds to bf16 in the low halves of the 32-bit lanes, without the instruction for it.
#[inline(always)]
unsafe fn rounded_words(x: __m512) -> __m512i {
    // SAFETY: the caller holds the token.
    unsafe {
        let bits = _mm512_castps_si512(x);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let up = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
        let rounded = _mm512_add_epi32(bits, up);
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
        let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x40_0000));
        _mm512_srli_epi32::<16>(_mm512_mask_mov_epi32(rounded, nan, quiet))
    }
}

impl<const BF16: bool> Simd for Avx512<BF16> {
    type F = __m512;

    const LEVEL: Level = if BF16 {
        Level::Avx512Bf16
    } else {
        Level::Avx512
    };
    // 16 sums of 32 registers: see the micro-kernel of bf16 pairs, which has the same tile.
    const TILE: (usize, usize) = (8, 2);

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        // SAFETY: the token proves that the instructions exist.
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    fn load(self, from: &[f32; WIDTH]) -> Self::F {
        // SAFETY: as above; the array holds sixteen numbers.
        unsafe { _mm512_loadu_ps(from.as_ptr()) }
    }

    #[inline(always)]
    fn store(self, x: Self::F, to: &mut [f32; WIDTH]) {
        // SAFETY: as above.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), x) }
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token proves that the instructions exist.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token proves that the instructions exist.
        unsafe { _mm512_sub_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token proves that the instructions exist.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // SAFETY: the token proves that the instructions exist.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token proves that the instructions exist.
        unsafe { _mm512_max_ps(a, b) }
    }

    #[inline(always)]
    fn greater(self, a: Self::F, b: Self::F) -> u16 {
        // SAFETY: the token proves that the instructions exist.
        unsafe { _mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b) }
    }

    #[inline(always)]
    fn select(self, mask: u16, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token proves that the instructions exist.
        unsafe { _mm512_mask_mov_ps(b, mask, a) }
    }

    #[inline(always)]
    fn exp2(self, x: Self::F) -> Self::F {
        // SAFETY: the token proves that the instructions exist.
        unsafe {
            let n = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
            let r = _mm512_sub_ps(x, n);
            let mut p = _mm512_set1_ps(EXP2[4]);
            for c in [EXP2[3], EXP2[2], EXP2[1], EXP2[0]] {
                p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
            }
            // Not less than: NaN stays, and so does the zero of a lane that is left out.
            let kept = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, _mm512_set1_ps(EXP2_SMALLEST));
            _mm512_maskz_scalef_ps(kept, p, n)
        }
    }

    #[inline(always)]
    fn load_bf16(self, from: &[bf16; WIDTH]) -> Self::F {
        // SAFETY: as above; the array holds sixteen numbers.
        unsafe {
            let words = _mm256_loadu_si256(from.as_ptr().cast());
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(words)))
        }
    }

    #[inline(always)]
    fn store_bf16(self, x: Self::F, to: &mut [bf16; WIDTH]) {
        // SAFETY: as above.
        unsafe {
            let words = if BF16 {
                std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(x))
            } else {
                _mm512_cvtepi32_epi16(rounded_words(x))
            };
            _mm256_storeu_si256(to.as_mut_ptr().cast(), words);
        }
    }

    #[inline(always)]
    fn store_bf16_pairs(self, even: Self::F, odd: Self::F, to: &mut [bf16; 2 * WIDTH]) {
        // SAFETY: as above; without the instruction the words are joined by a shift.
        unsafe {
            let pairs = if BF16 {
                // The instruction puts its second operand first and gives 2 × 16 words; a
                // permutation of words puts the halves in turn.
                let halves: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(odd, even));
                const TURNS: [u16; 2 * WIDTH] = {
                    let mut turns = [0; 2 * WIDTH];
                    let mut i = 0;
                    while i < 2 * WIDTH {
                        turns[i] = (i / 2 + i % 2 * WIDTH) as u16;
                        i += 1;
                    }
                    turns
                };
                _mm512_permutexvar_epi16(_mm512_loadu_si512(TURNS.as_ptr().cast()), halves)
            } else {
                let high = _mm512_slli_epi32::<16>(rounded_words(odd));
                _mm512_or_si512(rounded_words(even), high)
            };
            _mm512_storeu_si512(to.as_mut_ptr().cast(), pairs);
        }
    }

    #[inline(always)]
    fn round_words(self, low: Self::F, high: Self::F) -> Self::F {
        // SAFETY: the token proves that the instructions exist.
        unsafe {
            if BF16 {
                return std::mem::transmute::<__m512bh, __m512>(_mm512_cvtne2ps_pbh(high, low));
            }
            let low = _mm512_castsi256_si512(_mm512_cvtepi32_epi16(rounded_words(low)));
            let high = _mm512_cvtepi32_epi16(rounded_words(high));
            _mm512_castsi512_ps(_mm512_inserti64x4::<1>(low, high))
        }
    }

    #[inline(always)]
    fn transpose(self, r: [Self::F; WIDTH]) -> [Self::F; WIDTH] {
        // Four rounds of 16 shuffles: pairs of words, pairs of pairs, then quarters of registers.
        // SAFETY: the token proves that the instructions exist.
        unsafe {
            let mut t = r;
            for i in 0..8 {
                t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
                t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
            }
            // u[4g + c]: column c of each quarter, rows 4g..4g + 4.
            let mut u = t;
            for g in 0..4 {
                let [a, b, c, d] = [t[4 * g], t[4 * g + 1], t[4 * g + 2], t[4 * g + 3]];
                u[4 * g] = _mm512_shuffle_ps::<0x44>(a, c);
                u[4 * g + 1] = _mm512_shuffle_ps::<0xee>(a, c);
                u[4 * g + 2] = _mm512_shuffle_ps::<0x44>(b, d);
                u[4 * g + 3] = _mm512_shuffle_ps::<0xee>(b, d);
            }
            let mut out = u;
            for c in 0..4 {
                let [a, b] = [u[c], u[4 + c]];
                let [d, e] = [u[8 + c], u[12 + c]];
                let low = _mm512_shuffle_f32x4::<0x88>(a, b); // a0 a2 b0 b2
                let high = _mm512_shuffle_f32x4::<0xdd>(a, b); // a1 a3 b1 b3
                let low2 = _mm512_shuffle_f32x4::<0x88>(d, e);
                let high2 = _mm512_shuffle_f32x4::<0xdd>(d, e);
                out[c] = _mm512_shuffle_f32x4::<0x88>(low, low2); // a0 b0 d0 e0
                out[8 + c] = _mm512_shuffle_f32x4::<0xdd>(low, low2); // a2 b2 d2 e2
                out[4 + c] = _mm512_shuffle_f32x4::<0x88>(high, high2);
                out[12 + c] = _mm512_shuffle_f32x4::<0xdd>(high, high2);
            }
            out
        }
    }

    #[inline(always)]
    fn pair_words(self, a: Self::F, b: Self::F) -> [Self::F; 2] {
        // Words of `a` count from 0, words of `b` from 32.
        const ORDER: [[u16; 2 * WIDTH]; 2] = {
            let mut order = [[0; 2 * WIDTH]; 2];
            let mut i = 0;
            while i < 4 * WIDTH {
                order[i / (2 * WIDTH)][i % (2 * WIDTH)] = (i / 2 + i % 2 * 2 * WIDTH) as u16;
                i += 1;
            }
            order
        };
        // SAFETY: the token proves that the instructions exist; each index array fills a register.
        unsafe {
            let [a, b] = [_mm512_castps_si512(a), _mm512_castps_si512(b)];
            let low = _mm512_loadu_si512(ORDER[0].as_ptr().cast());
            let high = _mm512_loadu_si512(ORDER[1].as_ptr().cast());
            [
                _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, low, b)),
                _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, high, b)),
            ]
        }
    }
}
