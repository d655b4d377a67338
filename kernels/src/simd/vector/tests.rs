#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use super::*;

/// Runs a generic check at every level of this processor.
macro_rules! at_every_level {
    ($check:ident) => {
        $check(Portable);
        #[cfg(target_arch = "x86_64")]
        {
            Avx2::detect().into_iter().for_each($check);
            Avx512::<false>::detect().into_iter().for_each($check);
            Avx512::<true>::detect().into_iter().for_each($check);
        }
    };
}

per_level! {
fn exp2_of[S](simd: S, x: &[f32; WIDTH], to: &mut [f32; WIDTH]) {
    let y = simd.exp2(simd.load(x));
    simd.store(y, to);
}
}

fn check_exp2<S: Simd>(simd: S) {
    let exp2 = |x: f32| {
        let mut y = [f32::NAN; WIDTH];
        exp2_of(simd, &[x; WIDTH], &mut y);
        assert!(y.iter().all(|other| other.to_bits() == y[0].to_bits()));
        y[0]
    };
    let mut x = -100.0f32;
    let mut worst = 0f64;
    while x <= 126.0 {
        worst = worst.max((f64::from(exp2(x)) / f64::from(x).exp2() - 1.0).abs());
        x += 0.011_718_75;
    }
    assert!(worst < 3e-6, "{:?}: relative error {worst:e}", S::LEVEL);
    for x in [
        -100.01,
        -126.5,
        -130.0,
        -1e4,
        -1e30,
        f32::MIN,
        f32::NEG_INFINITY,
    ] {
        assert_eq!(exp2(x), 0.0, "{:?}: 2^{x}", S::LEVEL);
    }
    assert!(exp2(f32::NAN).is_nan());
}

#[test]
fn exp2_is_accurate_and_flushes_what_is_tiny() {
    at_every_level!(check_exp2);
}

per_level! {
fn exp_of[S](simd: S, x: &[f32; WIDTH], to: &mut [f32; WIDTH]) {
    let y = simd.exp(simd.load(x));
    simd.store(y, to);
}
}

fn check_exp<S: Simd>(simd: S) {
    let exp = |x: f32| {
        let mut y = [f32::NAN; WIDTH];
        exp_of(simd, &[x; WIDTH], &mut y);
        assert!(y.iter().all(|other| other.to_bits() == y[0].to_bits()));
        y[0]
    };
    let mut x = -69.0f32;
    let mut worst = 0f64;
    while x <= 87.9 {
        worst = worst.max((f64::from(exp(x)) / f64::from(x).exp() - 1.0).abs());
        x += 0.001_953_125;
    }
    assert!(worst < 2e-7, "{:?}: relative error {worst:e}", S::LEVEL);
    for x in [
        -70.0,
        -88.0,
        -111.0,
        -1e4,
        -1e30,
        f32::MIN,
        f32::NEG_INFINITY,
    ] {
        assert_eq!(exp(x), 0.0, "{:?}: e^{x}", S::LEVEL);
    }
    assert!((f64::from(exp(0.0)) - 1.0).abs() < 1e-7 && exp(f32::NAN).is_nan());
}

#[test]
fn exp_is_accurate_to_fp32() {
    at_every_level!(check_exp);
}

per_level! {
fn moves[S](simd: S, rows: &[[f32; WIDTH]; WIDTH], turned: &mut [[f32; WIDTH]; WIDTH],
            paired: &mut [[f32; WIDTH]; 2], pairs: &mut [bf16; 2 * WIDTH], rounded: &mut [f32; WIDTH], one: &mut [bf16; WIDTH]) {
    let rows: [S::F; WIDTH] = std::array::from_fn(|i| simd.load(&rows[i]));
    for (to, row) in turned.iter_mut().zip(simd.transpose(rows)) {
        simd.store(row, to);
    }
    let [low, high] = simd.pair_words(rows[0], rows[1]);
    simd.store(low, &mut paired[0]);
    simd.store(high, &mut paired[1]);
    simd.store_bf16_pairs(rows[2], rows[3], pairs);
    simd.store_bf16(rows[2], one);
    simd.store(simd.round_words(rows[2], rows[3]), rounded);
}
}

fn check_moves<S: Simd>(simd: S) {
    let rows: [[f32; WIDTH]; WIDTH] =
        std::array::from_fn(|i| std::array::from_fn(|j| 1.0 + (i * 17 + j) as f32 / 311.0));
    let (mut turned, mut paired) = ([[0.0; WIDTH]; WIDTH], [[0.0; WIDTH]; 2]);
    let (mut pairs, mut one) = ([bf16::ZERO; 2 * WIDTH], [bf16::ZERO; WIDTH]);
    let mut rounded = [0.0; WIDTH];
    moves(
        simd,
        &rows,
        &mut turned,
        &mut paired,
        &mut pairs,
        &mut rounded,
        &mut one,
    );
    for i in 0..WIDTH {
        for j in 0..WIDTH {
            assert_eq!(turned[i][j], rows[j][i], "{:?} {i} {j}", S::LEVEL);
        }
        assert_eq!(pairs[2 * i], bf16::from_f32(rows[2][i]));
        assert_eq!(pairs[2 * i + 1], bf16::from_f32(rows[3][i]));
        assert_eq!(one[i], bf16::from_f32(rows[2][i]));
    }
    for word in 0..2 * WIDTH {
        let half = |x: &[f32; WIDTH]| x[word / 2].to_bits() >> (16 * (word % 2)) & 0xffff;
        let expected = half(&rows[0]) | half(&rows[1]) << 16;
        assert_eq!(paired[word / WIDTH][word % WIDTH].to_bits(), expected);
        let single = rounded[word / 2].to_bits() >> (16 * (word % 2)) & 0xffff;
        let expected = bf16::from_f32(rows[2 + word / WIDTH][word % WIDTH]);
        assert_eq!(single as u16, expected.to_bits());
    }
}

#[test]
fn words_move_alike_at_every_level() {
    at_every_level!(check_moves);
}
