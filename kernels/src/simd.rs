//! One source, several instruction sets.
//!
//! Two ways lead from one source to several levels:
//!
//! * The macro `simd!` compiles plain Rust over slices, written so that the compiler vectorises it
//!   (fixed lanes for sums, selects instead of branches), once per level and picks one at run time.
//!   No such loop uses fused multiply-add or reorders a sum by itself, so every level gives the
//!   same bits; only the speed differs.
//! * [`vector`] names the operations on sixteen fp32 numbers and implements them per level with
//!   intrinsics, for the few loops that live on fused multiply-add, transposes and bf16 pairs (the
//!   micro-kernels and what surrounds them). Levels differ there in the last bits.
//!
//! [`level`] is the best level of this processor, unless the environment variable `OXITRON_SIMD`
//! (`portable`, `avx2`, `avx512`, `avx512bf16`, `amx`) or [`with_level`] asks for a lower one.
//! Both can only lower it: no setting makes a program use instructions that are absent.

use std::cell::Cell;
use std::str::FromStr;
use std::sync::OnceLock;

pub mod vector;

/// Instruction sets that inner loops are compiled for. Each contains the ones before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// What every processor of the target has.
    Portable,
    /// AVX2 with fused multiply-add.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// The dot products of bf16 pairs (`vdpbf16ps`) of AVX-512 BF16.
    Avx512Bf16,
    /// The tiles of AMX with bf16 products, where the kernel of the system grants them and a first
    /// product comes out right.
    Amx,
}

impl Level {
    /// Every level, lowest first.
    pub const ALL: [Level; 5] = [
        Level::Portable,
        Level::Avx2,
        Level::Avx512,
        Level::Avx512Bf16,
        Level::Amx,
    ];

    /// The name that `OXITRON_SIMD` takes.
    pub fn name(self) -> &'static str {
        match self {
            Level::Portable => "portable",
            Level::Avx2 => "avx2",
            Level::Avx512 => "avx512",
            Level::Avx512Bf16 => "avx512bf16",
            Level::Amx => "amx",
        }
    }
}

impl FromStr for Level {
    type Err = String;

    fn from_str(text: &str) -> Result<Level, String> {
        let found = Level::ALL.into_iter().find(|level| level.name() == text);
        found.ok_or_else(|| {
            let names = Level::ALL.map(Level::name).join(", ");
            format!("OXITRON_SIMD is {text:?}, but must be one of {names}")
        })
    }
}

thread_local! {
    static FORCED: Cell<Option<Level>> = const { Cell::new(None) };
}

/// The level that calls from this thread use: the best of this processor, lowered by
/// `OXITRON_SIMD` and [`with_level`]. An op asks once, on the thread that calls it, so its workers
/// all use the same.
pub fn level() -> Level {
    let level = allowed();
    FORCED.get().map_or(level, |forced| forced.min(level))
}

/// The best level of this processor that `OXITRON_SIMD` allows, asked once. A value that is no
/// level limits nothing; a program that wants to refuse it calls [`requested`] at its start.
fn allowed() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| match requested() {
        Ok(Some(limit)) => detect().min(limit),
        _ => detect(),
    })
}

/// What `OXITRON_SIMD` asks for, if it is set.
///
/// # Errors
/// A message with the names that it can take.
pub fn requested() -> Result<Option<Level>, String> {
    match std::env::var_os("OXITRON_SIMD") {
        Some(text) => text.to_string_lossy().parse().map(Some),
        None => Ok(None),
    }
}

/// Runs `body` with [`level`] of this thread lowered to at most `limit`, for tests and
/// measurements.
pub fn with_level<R>(limit: Level, body: impl FnOnce() -> R) -> R {
    /// Puts the former setting back, also when `body` panics.
    struct Restore(Option<Level>);
    impl Drop for Restore {
        fn drop(&mut self) {
            FORCED.set(self.0);
        }
    }
    let _restore = Restore(FORCED.replace(Some(limit)));
    body()
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Level {
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    if !avx2 {
        Level::Portable
    } else if !avx512 {
        Level::Avx2
    } else if !is_x86_feature_detected!("avx512bf16") {
        Level::Avx512
    } else {
        // SAFETY: these instructions were just found.
        let simd = unsafe { vector::Avx512::<true>::assume() };
        if crate::microkernel::amx::available(simd) {
            Level::Amx
        } else {
            Level::Avx512Bf16
        }
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
                $crate::simd::Level::Portable => {}
                // SAFETY: `level` found these features on this processor.
                $crate::simd::Level::Avx2 => return unsafe { avx2($($arg),*) },
                // SAFETY: as above; the levels after it contain it, and bring nothing for loops
                // without matrix products.
                _ => return unsafe { avx512($($arg),*) },
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

    #[test]
    fn a_level_can_be_lowered_but_not_raised() {
        let best = level();
        for limit in Level::ALL {
            assert_eq!(with_level(limit, level), best.min(limit));
            assert_eq!(limit.name().parse(), Ok(limit));
        }
        assert_eq!(level(), best);
        assert!(
            "sse9"
                .parse::<Level>()
                .unwrap_err()
                .contains("avx512bf16, amx")
        );
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
    }
}
