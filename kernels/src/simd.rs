//! One source, several instruction sets.
//!
//! Inner loops are plain Rust over slices, written so that the compiler vectorises them (fixed
//! lanes for sums, selects instead of branches). the macro `simd!` compiles such a function once per level
//! and picks one at run time. No loop uses fused multiply-add or reorders a sum by itself, so
//! every level gives the same bits; only the speed differs.

use std::sync::OnceLock;

/// Instruction sets that inner loops are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// What every processor of the target has.
    Portable,
    /// AVX2.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
}

/// The best level of this processor, asked once.
pub fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(detect)
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Level {
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    if avx512 {
        Level::Avx512
    } else if is_x86_feature_detected!("avx2") {
        Level::Avx2
    } else {
        Level::Portable
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Level {
    Level::Portable
}

/// Compiles a function at every [`Level`] and calls the best one. Whatever it calls in its inner
/// loops must be `#[inline(always)]`, or it stays at the portable level.
macro_rules! simd {
    ($(#[$meta:meta])* fn $name:ident $(<$($g:ident: $bound:path),+>)? (
        $($arg:ident: $ty:ty),* $(,)?
    ) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        fn $name $(<$($g: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn portable $(<$($g: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
            #[allow(clippy::too_many_arguments)]
            fn avx512 $(<$($g: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? {
                portable($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2")]
            #[allow(clippy::too_many_arguments)]
            fn avx2 $(<$($g: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? {
                portable($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            match $crate::simd::level() {
                // SAFETY: `level` found these features on this processor.
                $crate::simd::Level::Avx512 => return unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                $crate::simd::Level::Avx2 => return unsafe { avx2($($arg),*) },
                $crate::simd::Level::Portable => {}
            }
            portable($($arg),*)
        }
    };
}
pub(crate) use simd;

/// Lanes of a sum: one AVX-512 register of fp32. Part of the rounding, hence fixed.
pub const LANES: usize = 16;

/// `Σ f(x)` over a slice in fp32, in an order that does not depend on the instruction set: lane
/// `i % 16` takes element `i`, then the lanes are added pairwise.
///
/// Chunks of fixed size, not indices: a bounds check in the loop would keep it scalar.
#[inline(always)]
pub fn sum<A: Copy>(x: &[A], f: impl Fn(A) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] += f(chunk[lane]);
        }
    }
    for (lane, &x) in rest.iter().enumerate() {
        lanes[lane] += f(x);
    }
    fold(lanes, |a, b| a + b)
}

/// `Σ f(x, y, z)` over three slices, up to the end of the shortest, in the order of [`sum`].
#[inline(always)]
pub fn sum3<A: Copy, B: Copy, C: Copy>(
    x: &[A],
    y: &[B],
    z: &[C],
    f: impl Fn(A, B, C) -> f32,
) -> f32 {
    let n = x.len().min(y.len()).min(z.len());
    let mut lanes = [0f32; LANES];
    let (xs, x_rest) = x[..n].as_chunks::<LANES>();
    let (ys, y_rest) = y[..n].as_chunks::<LANES>();
    let (zs, z_rest) = z[..n].as_chunks::<LANES>();
    for ((x, y), z) in xs.iter().zip(ys).zip(zs) {
        for lane in 0..LANES {
            lanes[lane] += f(x[lane], y[lane], z[lane]);
        }
    }
    for (lane, ((&x, &y), &z)) in x_rest.iter().zip(y_rest).zip(z_rest).enumerate() {
        lanes[lane] += f(x, y, z);
    }
    fold(lanes, |a, b| a + b)
}

/// `max f(x)` over a slice, or negative infinity; a NaN is passed over.
#[inline(always)]
pub fn max<A: Copy>(x: &[A], f: impl Fn(A) -> f32) -> f32 {
    let greater = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] = greater(lanes[lane], f(chunk[lane]));
        }
    }
    for (lane, &x) in rest.iter().enumerate() {
        lanes[lane] = greater(lanes[lane], f(x));
    }
    fold(lanes, greater)
}

#[inline(always)]
fn fold(mut lanes: [f32; LANES], combine: impl Fn(f32, f32) -> f32) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] = combine(lanes[lane], lanes[lane + half]);
        }
        half /= 2;
    }
    lanes[0]
}

/// `eˣ` in fp32 with a relative error below 2e-7, branch-free so that loops over it vectorise.
///
/// Results below the smallest normal number are zero (denormals would make a softmax over far
/// apart logits ten times slower); arguments above 88.376 give infinity, and NaN stays NaN.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // Cephes expf: x = n·ln 2 + r with |r| ≤ ln 2 / 2, then a polynomial in r, then times 2ⁿ.
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2²³: adding it rounds to the nearest integer
    const LN2_HIGH: f32 = 355.0 / 512.0;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    const LARGEST: f32 = 88.376_26;
    const SMALLEST: f32 = -87.336_54;
    let inside = if x > LARGEST { LARGEST } else { x };
    let inside = if inside < SMALLEST { SMALLEST } else { inside };
    let shifted = inside * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = inside - n * LN2_HIGH - n * LN2_LOW;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let mantissa = p * r * r + r + 1.0;
    // n lies in -126..=127: the bits of 2ⁿ are its biased exponent alone.
    let exponent = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let power = f32::from_bits((exponent.wrapping_add(127) << 23) as u32);
    let value = mantissa * power;
    let value = if x < SMALLEST { 0.0 } else { value };
    if x > LARGEST { f32::INFINITY } else { value }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn exp_is_accurate_to_fp32() {
        let mut worst = 0f64;
        let mut x = -87.3f32;
        while x < 88.37 {
            let expected = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) / expected - 1.0).abs());
            x += 1.0 / 1024.0;
        }
        assert!(worst < 2e-7, "relative error {worst:e}");
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-88.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(88.5), f32::INFINITY);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
    }

    simd! {
    fn total(x: &[f32]) -> f32 {
        sum(x, exp)
    }
    }

    #[test]
    fn every_level_gives_the_same_bits() {
        let x: Vec<f32> = (0..1003).map(|i| (i as f32 * 0.37).sin() * 5.0).collect();
        // The portable level, since this function is compiled without features.
        let portable = sum(&x, exp);
        assert_eq!(total(&x).to_bits(), portable.to_bits(), "{:?}", level());
        assert_eq!(max(&x, |x| x), x.iter().copied().fold(f32::MIN, f32::max));
        assert_eq!(max(&[0f32; 0], |x| x), f32::NEG_INFINITY);
    }
}
