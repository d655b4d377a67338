//! Products of small matrices that lie in the nearest caches: the one loop that attention (and any
//! matrix product of this crate) spends its time in.
//!
//! `C[rows × 16·panels] (+)= A[rows × k] · B[k × 16·panels]` with fp32 sums. A and C are row-major;
//! B lies in panels of sixteen columns, each `[k][16]` for fp32 and `[k/2][16][2]` for bf16: the
//! pairs that `vdpbf16ps` takes from a register and that AMX takes from a tile, so one packed
//! layout serves every processor. Who calls cuts the work so that A, B and C of one call fit in
//! L1 and L2 and pads with zeros; there is no blocking for caches here.
//!
//! | kernel | operands | level |
//! |---|---|---|
//! | [`fp32::Fp32`] | fp32 (bf16 is widened when it is packed) | every one |
//! | `dot::Dot` | bf16 | AVX-512 BF16 |
//! | `amx::Tiles` | bf16 | AMX |
//!
//! What is around a product (softmax, packing) uses the [`Simd`] token that belongs to the kernel.

mod dispatch;
pub mod fp32;
pub mod pack;

#[cfg(target_arch = "x86_64")]
pub mod amx;
#[cfg(target_arch = "x86_64")]
pub mod dot;

pub use dispatch::{Dtype, Visitor};

use half::bf16;

use crate::simd::vector::{Simd, WIDTH};

/// What a kernel multiplies: fp32, or bf16 in pairs.
pub trait Element: Copy + Default + Send + Sync + 'static {
    /// Elements in a 32-bit word; the inner length `k` is a multiple of it.
    const PER_WORD: usize;

    /// Reads sixteen words as they are, whatever they hold.
    fn load_words<S: Simd>(simd: S, from: &[Self]) -> S::F;

    /// Writes sixteen words as they are.
    fn store_words<S: Simd>(simd: S, words: S::F, to: &mut [Self]);

    /// Rounds sixteen numbers and writes them side by side.
    fn store<S: Simd>(simd: S, x: S::F, to: &mut [Self]);

    /// Rounds rows `2i` and `2i + 1` of sixteen columns and writes them where a panel has them.
    fn store_row_pair<S: Simd>(simd: S, even: S::F, odd: S::F, to: &mut [Self]);

    /// Rounds two rows of 32 columns and writes them twice: as two rows, and where two panels have
    /// them.
    fn store_row_pair_twice<S: Simd>(
        simd: S,
        even: [S::F; 2],
        odd: [S::F; 2],
        rows: [&mut [Self]; 2],
        panels: [&mut [Self]; 2],
    );
}

/// The first `N` elements as an array. A slice that is too short is a mistake of this crate.
#[inline(always)]
#[track_caller]
pub(crate) fn head<T, const N: usize>(x: &[T]) -> &[T; N] {
    let Some(head) = x.first_chunk() else {
        short(x.len(), N)
    };
    head
}

/// As [`head`], to be written.
#[inline(always)]
#[track_caller]
pub(crate) fn head_mut<T, const N: usize>(x: &mut [T]) -> &mut [T; N] {
    let len = x.len();
    let Some(head) = x.first_chunk_mut() else {
        short(len, N)
    };
    head
}

#[cold]
#[track_caller]
fn short(found: usize, expected: usize) -> ! {
    // An assertion, as for any index out of bounds.
    assert!(found >= expected, "{found} elements, expected {expected}");
    unreachable!()
}

impl Element for f32 {
    const PER_WORD: usize = 1;

    #[inline(always)]
    fn load_words<S: Simd>(simd: S, from: &[f32]) -> S::F {
        simd.load(head(from))
    }

    #[inline(always)]
    fn store_words<S: Simd>(simd: S, words: S::F, to: &mut [f32]) {
        simd.store(words, head_mut(to));
    }

    #[inline(always)]
    fn store<S: Simd>(simd: S, x: S::F, to: &mut [f32]) {
        simd.store(x, head_mut(to));
    }

    #[inline(always)]
    fn store_row_pair<S: Simd>(simd: S, even: S::F, odd: S::F, to: &mut [f32]) {
        let (first, second) = head_mut::<f32, { 2 * WIDTH }>(to).split_at_mut(WIDTH);
        simd.store(even, head_mut(first));
        simd.store(odd, head_mut(second));
    }

    #[inline(always)]
    fn store_row_pair_twice<S: Simd>(
        simd: S,
        even: [S::F; 2],
        odd: [S::F; 2],
        [even_row, odd_row]: [&mut [f32]; 2],
        panels: [&mut [f32]; 2],
    ) {
        Self::store_row_pair(simd, even[0], even[1], even_row);
        Self::store_row_pair(simd, odd[0], odd[1], odd_row);
        for (p, panel) in panels.into_iter().enumerate() {
            Self::store_row_pair(simd, even[p], odd[p], panel);
        }
    }
}

impl Element for bf16 {
    const PER_WORD: usize = 2;

    #[inline(always)]
    fn load_words<S: Simd>(simd: S, from: &[bf16]) -> S::F {
        let pairs: &[bf16; 2 * WIDTH] = head(from);
        // SAFETY: 32 bf16 are the bytes of 16 fp32, any bits are valid, and the copy asks for no
        // alignment.
        let words: [f32; WIDTH] = unsafe {
            std::ptr::from_ref(pairs)
                .cast::<[f32; WIDTH]>()
                .read_unaligned()
        };
        simd.load(&words)
    }

    #[inline(always)]
    fn store_words<S: Simd>(simd: S, words: S::F, to: &mut [bf16]) {
        let pairs: &mut [bf16; 2 * WIDTH] = head_mut(to);
        let mut lanes = [0.0; WIDTH];
        simd.store(words, &mut lanes);
        // SAFETY: as in `load_words`.
        unsafe {
            std::ptr::from_mut(pairs)
                .cast::<[f32; WIDTH]>()
                .write_unaligned(lanes)
        };
    }

    #[inline(always)]
    fn store<S: Simd>(simd: S, x: S::F, to: &mut [bf16]) {
        simd.store_bf16(x, head_mut(to));
    }

    #[inline(always)]
    fn store_row_pair<S: Simd>(simd: S, even: S::F, odd: S::F, to: &mut [bf16]) {
        simd.store_bf16_pairs(even, odd, head_mut(to));
    }

    #[inline(always)]
    fn store_row_pair_twice<S: Simd>(
        simd: S,
        even: [S::F; 2],
        odd: [S::F; 2],
        [even_row, odd_row]: [&mut [bf16]; 2],
        panels: [&mut [bf16]; 2],
    ) {
        let (even, odd) = (
            simd.round_words(even[0], even[1]),
            simd.round_words(odd[0], odd[1]),
        );
        Self::store_words(simd, even, even_row);
        Self::store_words(simd, odd, odd_row);
        for (pairs, panel) in simd.pair_words(even, odd).into_iter().zip(panels) {
            Self::store_words(simd, pairs, panel);
        }
    }
}

/// Sizes and strides of one product, strides in elements.
#[derive(Clone, Copy, Debug)]
pub struct Product {
    /// Rows of A and C.
    pub rows: usize,
    /// Panels of B, each sixteen columns of C.
    pub panels: usize,
    /// Columns of A, rows of B.
    pub k: usize,
    /// From one row of A to the next.
    pub a_row: usize,
    /// From one panel of B to the next.
    pub b_panel: usize,
    /// From one row of C to the next.
    pub c_row: usize,
    /// Whether the product is added to C or replaces it.
    pub add: bool,
}

impl Product {
    /// Refuses sizes that reach past the operands, before any pointer is used. True if there is
    /// nothing to do.
    #[inline(always)]
    fn check<E: Element>(&self, a: &[E], b: &[E], c: &[f32]) -> bool {
        if self.rows == 0 || self.panels == 0 {
            return true;
        }
        let width = WIDTH * self.panels;
        assert!(self.k.is_multiple_of(E::PER_WORD), "{self:?}");
        assert!((self.rows - 1) * self.a_row + self.k <= a.len(), "{self:?}");
        assert!(
            (self.panels - 1) * self.b_panel + WIDTH * self.k <= b.len(),
            "{self:?}"
        );
        assert!((self.rows - 1) * self.c_row + width <= c.len(), "{self:?}");
        assert!(self.rows == 1 || self.c_row >= width, "{self:?}");
        false
    }
}

/// A way to multiply, with the vectors that belong to it. Like [`Simd`], a token.
pub trait Kernel: Copy + Send + Sync + 'static {
    /// Vectors for everything around the products.
    type Simd: Simd;

    /// Operands of the products.
    type Element: Element;

    /// State of the processor that products need; dropped when a thread is through with them.
    type Region;

    /// Products of two numbers that a core adds up per cycle, about: decides sizes of blocks alone.
    const RATE: usize;

    /// The token of the vectors.
    fn simd(self) -> Self::Simd;

    /// Prepares the calling thread for products.
    fn enter(self) -> Self::Region;

    /// One product. The calling thread holds a region.
    fn multiply(self, product: Product, a: &[Self::Element], b: &[Self::Element], c: &mut [f32]);
}

/// Evaluates an expression with a constant for a number of rows known only at run time:
/// `with_rows!(rows, R in 1 2 3 => f::<R>())`.
macro_rules! with_rows {
    ($rows:expr, $R:ident in $($r:literal)+ => $body:expr) => {
        match $rows {
            $($r => {
                const $R: usize = $r;
                $body
            })+
            _ => {}
        }
    };
}
pub(crate) use with_rows;

/// Cuts `rows` into as few tiles of at most `most` as possible, of nearly equal height: a last tile
/// of one row would wait for the latency of its few sums.
#[inline(always)]
pub(crate) fn for_each_tile(rows: usize, most: usize, mut f: impl FnMut(usize, usize)) {
    let tiles = rows.div_ceil(most);
    let (height, taller) = (rows / tiles, rows % tiles);
    let mut first = 0;
    for tile in 0..tiles {
        let rows = height + usize::from(tile < taller);
        f(first, rows);
        first += rows;
    }
}

#[cfg(test)]
mod tests;
