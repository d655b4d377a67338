#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use super::*;
use crate::simd::vector::Portable;
use crate::testing::uniform;

/// A number of the element type, and back.
pub(super) trait Number: Element {
    fn new(x: f32) -> Self;
    fn get(self) -> f64;
}

impl Number for f32 {
    fn new(x: f32) -> f32 {
        x
    }
    fn get(self) -> f64 {
        f64::from(self)
    }
}

impl Number for bf16 {
    fn new(x: f32) -> bf16 {
        bf16::from_f32(x)
    }
    fn get(self) -> f64 {
        f64::from(self.to_f32())
    }
}

pub(super) fn check<K: Kernel<Element: Number>>(kernel: K) {
    let _region = kernel.enter();
    let per_word = K::Element::PER_WORD;
    for (rows, panels, words) in [
        (1, 1, 1),
        (2, 2, 3),
        (5, 1, 8),
        (12, 2, 32),
        (13, 3, 17),
        (16, 2, 16),
        (31, 4, 40),
        (64, 5, 33),
        (7, 2, 0),
    ] {
        for add in [false, true] {
            let k = words * per_word;
            let (a_row, c_row) = (k + 3 * per_word, 16 * panels + 5);
            let b_panel = 16 * k + 32;
            let number = |x: &f32| K::Element::new(*x);
            let a: Vec<_> = uniform("a", rows * a_row).iter().map(number).collect();
            let b: Vec<_> = uniform("b", panels * b_panel).iter().map(number).collect();
            let before = uniform("c", rows * c_row);
            let mut c = before.clone();
            let product = Product {
                rows,
                panels,
                k,
                a_row,
                b_panel,
                c_row,
                add,
            };
            kernel.multiply(product, &a, &b, &mut c);
            for r in 0..rows {
                for column in 0..c_row {
                    let at = r * c_row + column;
                    if column >= 16 * panels {
                        assert_eq!(c[at], before[at], "wrote past the row: {product:?}");
                        continue;
                    }
                    let mut expected = if add { f64::from(before[at]) } else { 0.0 };
                    for i in 0..k {
                        let word = (i / per_word * 16 + column % 16) * per_word + i % per_word;
                        let b = b[column / 16 * b_panel + word];
                        expected += a[r * a_row + i].get() * b.get();
                    }
                    let error = (f64::from(c[at]) - expected).abs();
                    assert!(error < 2e-5, "{product:?} {r} {column}: {error:e}");
                }
            }
        }
    }
}

#[test]
fn every_kernel_multiplies() {
    check(fp32::Fp32(Portable));
    #[cfg(target_arch = "x86_64")]
    {
        use crate::simd::vector::{Avx2, Avx512};
        Avx2::detect().map(fp32::Fp32).into_iter().for_each(check);
        Avx512::<false>::detect()
            .map(fp32::Fp32)
            .into_iter()
            .for_each(check);
        dot::Dot::detect().into_iter().for_each(check);
        amx::Amx::detect().into_iter().for_each(check);
    }
}

#[test]
fn tiles_are_nearly_equal() {
    for rows in 1..100 {
        let mut next = 0;
        let mut heights = Vec::new();
        for_each_tile(rows, 12, |first, height| {
            assert_eq!(first, next);
            next += height;
            heights.push(height);
        });
        assert_eq!(next, rows);
        assert!(heights.iter().max().unwrap() - heights.iter().min().unwrap() <= 1);
        assert!(heights.iter().all(|&h| (1..=12).contains(&h)));
    }
}

#[test]
#[should_panic(expected = "rows: 2")]
fn sizes_past_the_operands_are_refused() {
    let product = Product {
        rows: 2,
        panels: 1,
        k: 4,
        a_row: 4,
        b_panel: 0,
        c_row: 16,
        add: false,
    };
    fp32::Fp32(Portable).multiply(product, &[0.0; 7], &[0.0; 64], &mut [0.0; 32]);
}
