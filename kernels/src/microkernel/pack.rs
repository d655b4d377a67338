//! From rows in memory to the operands of products, and from sums back to rows.
//!
//! A source is `n` rows of `d` numbers in T, [`Strided`] apart. Four packed forms are enough,
//! all padded with zeros so that products need no edges:
//!
//! | function | operand | holds |
//! |---|---|---|
//! | [`rows`] | A `[n × d]` | the rows, dense |
//! | [`turned_rows`] | A `[d × n]` | the transpose |
//! | [`panels`] | B `[n × d]` | the rows, in panels of sixteen columns |
//! | [`turned_panels`] | B `[d × n]` | the transpose, in panels of sixteen source rows |
//!
//! Attention makes dense copies even of rows that could be read in place: those of a head lie a power
//! of two apart in many models, and then all of them fall into the same few sets of L1.
//!
//! Loops over a square have constant bounds and a test inside: the compiler unrolls those and keeps
//! the square in registers.
//!
//! Everything moves 32-bit words, sixteen by sixteen: one fp32 number or one pair of bf16. A pair
//! of neighbours in a row is already the word that a panel of the transpose wants; where rows are
//! to be paired, [`Simd::pair_words`] does it first.

// Rows and vectors of a register tile are counted by constants; indices unroll into registers.
#![allow(clippy::needless_range_loop)]

use std::marker::PhantomData;

use super::Element;
use crate::float::{Float, Operand, load_padded, store_cut};
use crate::simd::vector::{Simd, WIDTH, per_level};

/// Rows of a matrix in memory, from its first element on.
#[derive(Clone, Copy)]
pub struct Strided<'a, T> {
    /// The memory.
    pub data: &'a [T],
    /// Elements from one row to the next.
    pub stride: usize,
    /// Rows.
    pub n: usize,
    /// Numbers in a row.
    pub d: usize,
}

impl<'a, T: Float> Strided<'a, T> {
    /// Row `i`; empty past the last row.
    #[inline(always)]
    pub fn row(&self, i: usize) -> &'a [T] {
        if i < self.n {
            &self.data[i * self.stride..][..self.d]
        } else {
            &[]
        }
    }

    /// Sixteen words of row `i` from word `word` on; zeros past the row's end and the last row.
    #[inline(always)]
    fn words<E: Element, S: Simd>(&self, simd: S, i: usize, word: usize) -> S::F
    where
        T: Operand<E>,
    {
        let row = self.row(i);
        let rest = &row[(word * E::PER_WORD).min(row.len())..];
        if rest.len() >= WIDTH * E::PER_WORD {
            return T::load_words(simd, rest);
        }
        let mut padded = [T::default(); 2 * WIDTH];
        padded[..rest.len()].copy_from_slice(rest);
        T::load_words(simd, &padded)
    }

    /// Asks for the line of row `i` at word `word`, which will be read soon. The hardware does not
    /// see more than a few rows as streams, and a loop of loads and shuffles alone waits for each
    /// line (two thirds of the time where the source lies beyond L2).
    #[inline(always)]
    fn prefetch<E: Element>(&self, i: usize, word: usize) {
        #[cfg(target_arch = "x86_64")]
        if i < self.n {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            let at = i * self.stride + word * E::PER_WORD;
            // SAFETY: reads nothing, whatever the address.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(self.data.as_ptr().wrapping_add(at).cast()) };
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (i, word);
    }
}

/// Rows of a matrix in memory, to be written. What lies between the rows may belong to others.
pub struct StridedMut<'a, T> {
    data: *mut T,
    stride: usize,
    n: usize,
    d: usize,
    owner: PhantomData<&'a mut [T]>,
}

impl<T> StridedMut<'_, T> {
    /// `n` rows of `d` numbers, `stride` elements apart.
    ///
    /// # Safety
    /// They are valid for writing, they do not overlap, and nothing else uses them while the
    /// result lives.
    #[inline(always)]
    pub unsafe fn from_raw(data: *mut T, stride: usize, n: usize, d: usize) -> Self {
        StridedMut {
            data,
            stride,
            n,
            d,
            owner: PhantomData,
        }
    }

    /// Row `i`.
    #[inline(always)]
    pub fn row(&mut self, i: usize) -> &mut [T] {
        assert!(i < self.n, "row {i} of {}", self.n);
        // SAFETY: the row exists and `&mut self` keeps it unique.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(i * self.stride), self.d) }
    }
}

/// How many rows ahead [`panels`] asks for lines.
const AHEAD: usize = 16;

/// Elements from one row to the next in the result of [`rows`] for rows of `d` numbers: whole
/// vectors of words.
pub const fn row_stride<E: Element>(d: usize) -> usize {
    d.next_multiple_of(WIDTH * E::PER_WORD)
}

per_level! {
/// `to[i · row_stride + c] = from[i][c]`.
pub fn rows[S, E: Element, T: Operand<E>](simd: S, from: Strided<'_, T>, to: &mut [E]) {
    let stride = row_stride::<E>(from.d);
    for (i, to) in to.chunks_exact_mut(stride).take(from.n).enumerate() {
        for (group, to) in to.chunks_exact_mut(WIDTH * E::PER_WORD).enumerate() {
            E::store_words(simd, from.words::<E, S>(simd, i, WIDTH * group), to);
        }
    }
}
}

per_level! {
/// `to[c · stride + i] = from[i][c]` for the first `d` rows of `to`; `stride` is a multiple of
/// [`row_stride`]`(1)` that is at least `n`, and columns up to it are zero.
pub fn turned_rows[S, E: Element, T: Operand<E>](
    simd: S, from: Strided<'_, T>, to: &mut [E], stride: usize,
) {
    let step = WIDTH * E::PER_WORD;
    // Along the source's rows first: each of them is one stream of lines for the prefetcher, where
    // a walk down the columns would wait for every line.
    for first in (0..stride).step_by(step) {
        for column in (0..from.d).step_by(step) {
            let word = column / E::PER_WORD;
            // One square of fp32 words; two of pairs, the second one `WIDTH` columns on.
            let mut squares = [[simd.splat(0.0); WIDTH]; 2];
            for i in 0..WIDTH {
                for ahead in 0..E::PER_WORD {
                    from.prefetch::<E>(first + step + E::PER_WORD * i + ahead, word);
                }
                if E::PER_WORD == 1 {
                    squares[0][i] = from.words::<E, S>(simd, first + i, word);
                } else {
                    let even = from.words::<E, S>(simd, first + 2 * i, word);
                    let odd = from.words::<E, S>(simd, first + 2 * i + 1, word);
                    [squares[0][i], squares[1][i]] = simd.pair_words(even, odd);
                }
            }
            for part in 0..E::PER_WORD {
                let square = simd.transpose(squares[part]);
                for c in 0..WIDTH {
                    let row = column + part * WIDTH + c;
                    if row < from.d {
                        E::store_words(simd, square[c], &mut to[row * stride + first..]);
                    }
                }
            }
        }
    }
}
}

per_level! {
/// Panel `p` holds columns `16p..16p + 16` of `from`; its row `i` is row `i` of `from`, zero from
/// `n` up to `height`, a multiple of a word's elements. Panels lie `16 · height` apart.
pub fn panels[S, E: Element, T: Operand<E>](
    simd: S, from: Strided<'_, T>, to: &mut [E], height: usize,
) {
    let panel = WIDTH * height;
    // Along the rows first, as in `turned_rows`.
    for first in (0..height).step_by(E::PER_WORD) {
        for column in (0..from.d).step_by(WIDTH * E::PER_WORD) {
            let (word, at) = (column / E::PER_WORD, column / WIDTH * panel);
            let to = &mut to[at + WIDTH * first..];
            for ahead in 0..E::PER_WORD {
                from.prefetch::<E>(first + AHEAD + ahead, word);
            }
            let even = from.words::<E, S>(simd, first, word);
            if E::PER_WORD == 1 {
                E::store_words(simd, even, to);
                continue;
            }
            let odd = from.words::<E, S>(simd, first + 1, word);
            let [low, high] = simd.pair_words(even, odd);
            E::store_words(simd, low, to);
            if column + WIDTH < from.d {
                E::store_words(simd, high, &mut to[panel..]);
            }
        }
    }
}
}

per_level! {
/// Panel `p` holds rows `16p..16p + 16` of `from` as its columns, zero from `n` up to
/// `16 · count`; its row `c` is column `c` of `from`. Panels lie `16 · height` apart, and `height`
/// is `d` rounded up to whole words.
pub fn turned_panels[S, E: Element, T: Operand<E>](
    simd: S, from: Strided<'_, T>, to: &mut [E], count: usize,
) {
    let words = from.d.div_ceil(E::PER_WORD);
    for (p, to) in to.chunks_exact_mut(WIDTH * words * E::PER_WORD).take(count).enumerate() {
        for word in (0..words).step_by(WIDTH) {
            let mut square = [simd.splat(0.0); WIDTH];
            for i in 0..WIDTH {
                from.prefetch::<E>(WIDTH * (p + 1) + i, word);
                square[i] = from.words::<E, S>(simd, WIDTH * p + i, word);
            }
            let square = simd.transpose(square);
            for c in 0..WIDTH {
                if word + c < words {
                    E::store_words(simd, square[c], &mut to[(word + c) * WIDTH * E::PER_WORD..]);
                }
            }
        }
    }
}
}

per_level! {
/// `to[i][c] = factor · from[i · c_row + c]`, rounded.
pub fn write_rows[S, T: Float](
    simd: S, from: &[f32], c_row: usize, factor: f32, to: StridedMut<'_, T>,
) {
    let mut to = to;
    let factor = simd.splat(factor);
    for i in 0..to.n {
        let from = &from[i * c_row..(i + 1) * c_row];
        let to = to.row(i);
        for at in (0..from.len().min(to.len())).step_by(WIDTH) {
            let x = simd.mul(load_padded(simd, from, at), factor);
            store_cut(simd, x, to, at);
        }
    }
}
}

per_level! {
/// `to[i][c] = factors[i] · from[c · c_row + i]`, rounded; a single factor serves for all.
pub fn write_turned[S, T: Float](
    simd: S, from: &[f32], c_row: usize, factors: &[f32], to: StridedMut<'_, T>,
) {
    let mut to = to;
    for first in (0..to.n).step_by(WIDTH) {
        let factor = match factors {
            [one] => simd.splat(*one),
            many => load_padded(simd, many, first),
        };
        for column in (0..to.d).step_by(WIDTH) {
            let mut square = [simd.splat(0.0); WIDTH];
            for c in 0..WIDTH {
                if column + c < to.d {
                    let row = &from[(column + c) * c_row..(column + c + 1) * c_row];
                    square[c] = simd.mul(load_padded(simd, row, first), factor);
                }
            }
            let square = simd.transpose(square);
            for i in 0..WIDTH {
                if first + i < to.n {
                    store_cut(simd, square[i], to.row(first + i), column);
                }
            }
        }
    }
}
}

per_level! {
/// `to[i] = Σ a[i][c] · b[i][c]`
pub fn row_dots[S, T: Float](
    simd: S, a: Strided<'_, T>, b: Strided<'_, T>, to: &mut [f32],
) {
    for (i, to) in to.iter_mut().enumerate().take(a.n) {
        let mut sum = simd.splat(0.0);
        let (a, b) = (a.row(i), b.row(i));
        for at in (0..a.len()).step_by(WIDTH) {
            sum = simd.fma(load_padded(simd, a, at), load_padded(simd, b, at), sum);
        }
        *to = simd.sum(sum);
    }
}
}
