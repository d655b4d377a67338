//! Sixteen fp32 numbers as one value, at every level.
//!
//! A type that implements [`Simd`] is a token: it can only be had where its instructions exist
//! ([`Portable`] always, the others through `detect`), so its methods are safe to call. They are
//! `#[inline(always)]` and carry no target feature themselves; they become single instructions once
//! inlined into a function that has it. The macro `per_level!` writes that function: whatever it
//! wraps is compiled with the features of its token and must reach its vectors only through
//! `#[inline(always)]` functions, since a vector that crosses a real call goes through memory.
//!
//! Sixteen lanes at every level (one register, two, or four) keep packed layouts the same
//! everywhere: a panel is sixteen columns wide whatever multiplies it.

use half::bf16;

use super::Level;

/// Lanes of a vector.
pub const WIDTH: usize = 16;

/// Operations on sixteen fp32 numbers. Masks are bits: lane `i` is bit `i`.
pub trait Simd: Copy + Send + Sync + 'static {
    /// Sixteen fp32 numbers.
    type F: Copy;

    /// The level whose instructions the methods use.
    const LEVEL: Level;

    /// Most rows of a register tile of fp32 products, and its width in panels of sixteen columns.
    const TILE: (usize, usize);

    /// The same number in every lane.
    fn splat(self, x: f32) -> Self::F;

    /// Reads sixteen numbers.
    fn load(self, from: &[f32; WIDTH]) -> Self::F;

    /// Writes sixteen numbers.
    fn store(self, x: Self::F, to: &mut [f32; WIDTH]);

    /// `a + b`
    fn add(self, a: Self::F, b: Self::F) -> Self::F;

    /// `a - b`
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;

    /// `a · b`
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;

    /// `a · b + c`, rounded once where the level can.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;

    /// The greater of the two; one of them if the other is NaN.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;

    /// Lanes with `a > b`.
    fn greater(self, a: Self::F, b: Self::F) -> u16;

    /// `a` in the lanes of the mask, `b` in the others.
    fn select(self, mask: u16, a: Self::F, b: Self::F) -> Self::F;

    /// `2ˣ` for `x ≤ 127` with a relative error below 3e-6, zero below 2⁻¹⁰⁰, NaN for NaN. Smaller
    /// weights change no sum in fp32, and they or their products would be denormals, which take a
    /// hundred times as long on some processors.
    fn exp2(self, x: Self::F) -> Self::F;

    /// Reads sixteen bf16 numbers, exactly.
    fn load_bf16(self, from: &[bf16; WIDTH]) -> Self::F;

    /// Writes sixteen numbers rounded to nearest, ties to even.
    fn store_bf16(self, x: Self::F, to: &mut [bf16; WIDTH]);

    /// Writes `even` and `odd` lane by lane in turn, rounded as by [`Simd::store_bf16`]: two rows
    /// become one row of pairs.
    fn store_bf16_pairs(self, even: Self::F, odd: Self::F, to: &mut [bf16; 2 * WIDTH]);

    /// Rounds 32 numbers to bf16 and puts them side by side, two to a word.
    fn round_words(self, low: Self::F, high: Self::F) -> Self::F;

    /// Turns a square of 32-bit words: lane `j` of vector `i` becomes lane `i` of vector `j`.
    fn transpose(self, rows: [Self::F; WIDTH]) -> [Self::F; WIDTH];

    /// Takes two rows of 32 half-width words and pairs them: word `i` of `a` and word `i` of `b`
    /// become one 32-bit word, `a`'s in the low half; words 0..16, then 16..32.
    fn pair_words(self, a: Self::F, b: Self::F) -> [Self::F; 2];

    /// `eˣ` for `x ≤ 88` with a relative error below 2e-7; zero below 2⁻¹⁰⁰, NaN for NaN.
    #[inline(always)]
    fn exp(self, x: Self::F) -> Self::F {
        // As `crate::simd::exp`: x = n·ln 2 + r with |r| ≤ ln 2 / 2, a polynomial in r, times 2ⁿ.
        const ROUND: f32 = 12_582_912.0; // 1.5 · 2²³: adding it rounds to the nearest integer
        const LN2_HIGH: f32 = 355.0 / 512.0;
        const LN2_LOW: f32 = -2.121_944_4e-4;
        const POLYNOMIAL: [f32; 6] = [
            1.987_569_1e-4,
            1.398_199_9e-3,
            8.333_452e-3,
            4.166_579_6e-2,
            1.666_666_5e-1,
            0.5,
        ];
        // Infinity less infinity would be NaN. The second of two is taken if one is NaN.
        let x = self.max(self.splat(-110.0), x);
        let shifted = self.add(
            self.mul(x, self.splat(std::f32::consts::LOG2_E)),
            self.splat(ROUND),
        );
        let n = self.sub(shifted, self.splat(ROUND));
        let r = self.fma(n, self.splat(-LN2_HIGH), x);
        let r = self.fma(n, self.splat(-LN2_LOW), r);
        let mut p = self.splat(POLYNOMIAL[0]);
        for c in &POLYNOMIAL[1..] {
            p = self.fma(p, r, self.splat(*c));
        }
        let mantissa = self.add(self.fma(self.mul(p, r), r, r), self.splat(1.0));
        // At whole numbers `exp2` is its first coefficient times the exact power.
        let power = self.mul(self.exp2(n), self.splat(1.0 / EXP2[0]));
        self.mul(mantissa, power)
    }

    /// Sum of the lanes, pairwise.
    #[inline(always)]
    fn sum(self, x: Self::F) -> f32 {
        let mut lanes = [0.0; WIDTH];
        self.store(x, &mut lanes);
        let mut half = WIDTH / 2;
        while half > 0 {
            for lane in 0..half {
                lanes[lane] += lanes[lane + half];
            }
            half /= 2;
        }
        lanes[0]
    }
}

/// Minimax polynomial of 2ˣ on [-½, ½], lowest power first: relative error 2.6e-6. One degree more
/// would reach 7e-8, but the fp32 rounding of a score of size 30 already costs 2e-6.
const EXP2: [f32; 5] = [
    0.999_999_3,
    0.693_121_8,
    0.240_247_44,
    0.055_917_86,
    0.009_570_102,
];

/// Below this, [`Simd::exp2`] gives zero.
const EXP2_SMALLEST: f32 = -100.0;

/// Compiles a function with the features of its token's level and calls that version.
///
/// `per_level! { fn name[S, …](simd: S, …) where … { body } }`: the bracket holds the generic
/// parameters, the first of them bound to [`Simd`].
///
/// No closure in the body may touch vectors (`std::array::from_fn` included): a closure is a
/// function without the features, and if the compiler does not happen to inline it, every operation
/// in it becomes a call.
macro_rules! per_level {
    ($(#[$meta:meta])* $vis:vis fn $name:ident [
        $S:ident $(, $g:ident: $bound:path)* $(; const $c:ident: $cty:ty)*
    ] ( $($arg:ident: $ty:ty),* $(,)? ) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        #[inline]
        $vis fn $name<$S: $crate::simd::vector::Simd $(, $g: $bound)* $(, const $c: $cty)*>(
            $($arg: $ty),*
        ) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body<$S: $crate::simd::vector::Simd $(, $g: $bound)* $(, const $c: $cty)*>(
                $($arg: $ty),*
            ) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
            #[allow(clippy::too_many_arguments)]
            fn avx512bf16<$S: $crate::simd::vector::Simd $(, $g: $bound)* $(, const $c: $cty)*>(
                $($arg: $ty),*
            ) $(-> $ret)? {
                body::<$S $(, $g)* $(, $c)*>($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
            #[allow(clippy::too_many_arguments)]
            fn avx512<$S: $crate::simd::vector::Simd $(, $g: $bound)* $(, const $c: $cty)*>(
                $($arg: $ty),*
            ) $(-> $ret)? {
                body::<$S $(, $g)* $(, $c)*>($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            #[allow(clippy::too_many_arguments)]
            fn avx2<$S: $crate::simd::vector::Simd $(, $g: $bound)* $(, const $c: $cty)*>(
                $($arg: $ty),*
            ) $(-> $ret)? {
                body::<$S $(, $g)* $(, $c)*>($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            match $S::LEVEL {
                $crate::simd::Level::Portable => body::<$S $(, $g)* $(, $c)*>($($arg),*),
                // SAFETY: the token `S` exists only where the processor has these features.
                $crate::simd::Level::Avx2 => unsafe {
                    avx2::<$S $(, $g)* $(, $c)*>($($arg),*)
                },
                // SAFETY: as above.
                $crate::simd::Level::Avx512 => unsafe {
                    avx512::<$S $(, $g)* $(, $c)*>($($arg),*)
                },
                // SAFETY: as above; AMX processors have AVX-512 BF16 too.
                _ => unsafe { avx512bf16::<$S $(, $g)* $(, $c)*>($($arg),*) },
            }
            #[cfg(not(target_arch = "x86_64"))]
            body::<$S $(, $g)* $(, $c)*>($($arg),*)
        }
    };
}
pub(crate) use per_level;

/// Arrays that any compiler can vectorise for the least processor of the target.
#[derive(Clone, Copy, Debug)]
pub struct Portable;

#[inline(always)]
fn each(f: impl Fn(usize) -> f32) -> [f32; WIDTH] {
    std::array::from_fn(f)
}

/// Rounds to bf16, nearest, ties to even, without branches.
#[inline(always)]
fn round_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet = (bits >> 16) | 0x40;
    (if x.is_nan() { quiet } else { rounded }) as u16
}

impl Simd for Portable {
    type F = [f32; WIDTH];

    const LEVEL: Level = Level::Portable;
    // Sixteen lanes are four SSE registers: two rows leave room for the operands.
    const TILE: (usize, usize) = (2, 1);

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        [x; WIDTH]
    }

    #[inline(always)]
    fn load(self, from: &[f32; WIDTH]) -> Self::F {
        *from
    }

    #[inline(always)]
    fn store(self, x: Self::F, to: &mut [f32; WIDTH]) {
        *to = x;
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        each(|i| a[i] + b[i])
    }

    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        each(|i| a[i] - b[i])
    }

    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        each(|i| a[i] * b[i])
    }

    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // `mul_add` would call a library function here.
        each(|i| a[i] * b[i] + c[i])
    }

    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        each(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn greater(self, a: Self::F, b: Self::F) -> u16 {
        (0..WIDTH).fold(0, |mask, i| mask | (u16::from(a[i] > b[i]) << i))
    }

    #[inline(always)]
    fn select(self, mask: u16, a: Self::F, b: Self::F) -> Self::F {
        each(|i| if mask >> i & 1 == 1 { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn exp2(self, x: Self::F) -> Self::F {
        const ROUND: f32 = 12_582_912.0; // 1.5 · 2²³: adding it rounds to the nearest integer
        each(|i| {
            let x = x[i];
            let inside = if x < EXP2_SMALLEST { EXP2_SMALLEST } else { x };
            let shifted = inside + ROUND;
            let r = inside - (shifted - ROUND);
            let [c0, c1, c2, c3, c4] = EXP2;
            let p = (((c4 * r + c3) * r + c2) * r + c1) * r + c0;
            let exponent = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
            let power = f32::from_bits((exponent.wrapping_add(127) << 23) as u32);
            if x < EXP2_SMALLEST { 0.0 } else { p * power }
        })
    }

    #[inline(always)]
    fn load_bf16(self, from: &[bf16; WIDTH]) -> Self::F {
        each(|i| f32::from_bits(u32::from(from[i].to_bits()) << 16))
    }

    #[inline(always)]
    fn store_bf16(self, x: Self::F, to: &mut [bf16; WIDTH]) {
        for (to, x) in to.iter_mut().zip(x) {
            *to = bf16::from_bits(round_bf16(x));
        }
    }

    #[inline(always)]
    fn store_bf16_pairs(self, even: Self::F, odd: Self::F, to: &mut [bf16; 2 * WIDTH]) {
        for i in 0..WIDTH {
            to[2 * i] = bf16::from_bits(round_bf16(even[i]));
            to[2 * i + 1] = bf16::from_bits(round_bf16(odd[i]));
        }
    }

    #[inline(always)]
    fn round_words(self, low: Self::F, high: Self::F) -> Self::F {
        each(|i| {
            let x = if i < WIDTH / 2 { &low } else { &high };
            let at = 2 * i % WIDTH;
            let pair = u32::from(round_bf16(x[at])) | u32::from(round_bf16(x[at + 1])) << 16;
            f32::from_bits(pair)
        })
    }

    #[inline(always)]
    fn transpose(self, rows: [Self::F; WIDTH]) -> [Self::F; WIDTH] {
        std::array::from_fn(|i| each(|j| rows[j][i]))
    }

    #[inline(always)]
    fn pair_words(self, a: Self::F, b: Self::F) -> [Self::F; 2] {
        let half = |x: &Self::F, word: usize| x[word / 2].to_bits() >> (16 * (word % 2)) & 0xffff;
        std::array::from_fn(|part| {
            each(|i| {
                let word = WIDTH * part + i;
                f32::from_bits(half(&a, word) | half(&b, word) << 16)
            })
        })
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

#[cfg(target_arch = "x86_64")]
pub use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub use avx512::Avx512;

#[cfg(test)]
mod tests;
