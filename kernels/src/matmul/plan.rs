//! Sizes of blocks and of scratch, from the sizes of the product, the caches and the threads.

use crate::microkernel::Element;
use crate::simd::vector::WIDTH;
use crate::sys::caches::Caches;
use crate::sys::scratch::{Area, Layout};

use super::operands::{depth, left_stride, packed_elements};
use super::{Columns, Shape};

/// Rows of a block are a multiple of it: two register tiles, or a tile of AMX.
const GRAIN: usize = 16;

/// Rows of a piece that goes to the epilogue: four register tiles, or two tiles of AMX. Its stores
/// (of two panels, one or two per row) fit in the store buffer.
pub(super) const PIECE_ROWS: usize = 32;

/// Where a task finds its panels of B.
#[derive(Clone, Copy)]
pub(super) enum Panels<E> {
    /// In the caller's packed buffer.
    Given,
    /// In an area that is packed before the first task.
    Shared(Area<E>),
    /// In an area of its thread, which the task packs block by block of k.
    Own(Area<E>),
}

/// Blocks and areas of a product.
pub(super) struct Plan<E> {
    /// Rows of a block.
    pub(super) rows: usize,
    /// Panels of a block.
    pub(super) panels: usize,
    /// Panels of a piece that goes to the epilogue.
    pub(super) piece: usize,
    /// Tasks along the rows.
    pub(super) down: usize,
    /// Tasks along the columns.
    pub(super) across: usize,
    /// Whether neighbouring tasks are those of one block of columns.
    pub(super) rows_first: bool,
    /// Panels of B.
    pub(super) b: Panels<E>,
    /// Of a thread: a block of A, empty if A is read in place.
    pub(super) a: Area<E>,
    /// Of a thread: sums of a block.
    pub(super) sums: Area<f32>,
    /// From one thread's areas to the next one's.
    pub(super) per_thread: usize,
    /// fp32 numbers of the buffer.
    pub(super) len: usize,
}

/// What a block costs, in cycles of one core.
struct Cost {
    k: f64,
    /// Products per cycle.
    rate: f64,
    /// Bytes of an operand.
    size: f64,
    /// Whether A is packed.
    pack: bool,
}

impl Cost {
    fn of(&self, rows: usize, panels: usize) -> f64 {
        let (rows, columns) = (rows as f64, (panels * WIDTH) as f64);
        // A product waits for its predecessor in the same sum: fewer than three rows leave the unit
        // idle.
        let products = rows.max(3.0) * columns * self.k / self.rate;
        // Bytes per cycle, as measured: a block of A comes from L3 or memory, in part behind the
        // products; one that is packed is waited for, turned, written and read again.
        let bytes = |numbers: f64, rate: f64| numbers * self.k * self.size / rate;
        let left = bytes(rows, if self.pack { 2.5 } else { 8.0 });
        let right = bytes(columns, 12.0);
        let fixed = 3000.0;
        products + left + right + rows * columns / 8.0 + fixed
    }
}

impl<E: Element> Plan<E> {
    /// `in_place` says that A needs no packing, `rate` is that of the kernel.
    pub(super) fn new(
        shape: Shape,
        in_place: bool,
        threads: usize,
        rate: usize,
        caches: Caches,
    ) -> Self {
        let Shape {
            rows, k, columns, ..
        } = shape;
        let (size, unit) = (size_of::<E>(), columns.unit());
        let units = columns.panels().div_ceil(unit);
        let cost = Cost {
            k: k as f64,
            rate: rate as f64,
            size: size as f64,
            pack: !in_place,
        };
        // A block of A and, if there are several blocks of k, the sums stay in L2, with room for the
        // panels that pass. The larger the block, the less often operands come from L3: 256 × 512
        // is ahead of 128 × 256 by 4% on Zen 4.
        let fits = |rows: usize, panels: usize| {
            let height = k.min(depth::<E>());
            let kept = if k > height { 4 * panels * WIDTH } else { 0 };
            rows * (height * size + kept) <= caches.l2 * 3 / 4
        };
        let mut best = (GRAIN, unit);
        let mut least = f64::MAX;
        for down in sizes(rows.div_ceil(GRAIN)) {
            for across in sizes(units) {
                let block = (
                    rows.div_ceil(GRAIN).div_ceil(down) * GRAIN,
                    units.div_ceil(across) * unit,
                );
                let smallest = block.0 == GRAIN && block.1 == unit;
                if !smallest && !fits(block.0, block.1) {
                    continue;
                }
                let tasks = rows.div_ceil(block.0) * units.div_ceil(block.1 / unit);
                // Whole rounds, and a part of one more: threads are not equally fast.
                let rounds = tasks.div_ceil(threads) as f64 + 0.25;
                let time = rounds * cost.of(block.0.min(rows), block.1);
                if time < least {
                    (best, least) = (block, time);
                }
            }
        }
        let (block_rows, panels) = best;
        let (down, across) = (rows.div_ceil(block_rows), columns.panels().div_ceil(panels));

        let mut layout = Layout::default();
        let height = k.min(depth::<E>());
        let single = down <= 1;
        let shared = match (shape.packed, single) {
            (false, false) => layout.take(packed_elements::<E>(k, columns)),
            _ => layout.take(0),
        };
        let start = layout.end();
        let a = layout.take(if in_place {
            0
        } else {
            block_rows * left_stride::<E>(height)
        });
        let own = layout.take(match (shape.packed, single) {
            (false, true) => panels * WIDTH * height.next_multiple_of(E::PER_WORD),
            _ => 0,
        });
        // Whole lines of bf16 rows: 32 columns, of each half.
        let piece = match columns {
            Columns::Halves { .. } => 4,
            _ => 2usize.next_multiple_of(unit),
        };
        let sums = layout.take(if k <= depth::<E>() {
            PIECE_ROWS * piece * WIDTH
        } else {
            block_rows * panels * WIDTH
        });
        let per_thread = layout.end() - start;
        let b = match (shape.packed, single) {
            (true, _) => Panels::Given,
            (false, true) => Panels::Own(own),
            (false, false) => Panels::Shared(shared),
        };
        Plan {
            rows: block_rows,
            panels,
            piece,
            down,
            across,
            // The larger operand comes from farther away: neighbours share its blocks.
            rows_first: columns.count() >= rows,
            b,
            a,
            sums,
            per_thread,
            len: Layout::buffer_len(start + threads * per_thread),
        }
    }
}

/// Numbers of parts into which `n` may be cut, so that sizes of parts grow by a fifth or so.
fn sizes(n: usize) -> impl Iterator<Item = usize> {
    let mut part = 1;
    std::iter::from_fn(move || {
        if n == 0 || part > n {
            return None;
        }
        let parts = n.div_ceil(part);
        part = (part + 1).max(part * 6 / 5).max(n.div_ceil(parts) + 1);
        Some(parts)
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    /// The share of its threads' time in which a product is computed, as the plan has it.
    fn busy<E: Element>(size: [usize; 3], threads: usize, rate: usize) -> f64 {
        let [rows, k, columns] = size;
        let shape = Shape {
            rows,
            k,
            columns: Columns::Any(columns),
            packed: false,
        };
        let caches = Caches {
            l1: 32 << 10,
            l2: 1 << 20,
        };
        let plan = Plan::<E>::new(shape, true, threads, rate, caches);
        let rounds = (plan.down * plan.across).div_ceil(threads);
        (rows * columns) as f64 / (rounds * threads * plan.rows * plan.panels * WIDTH) as f64
    }

    #[test]
    fn many_threads_find_enough_blocks_of_one_size() {
        // The gradient of a small weight: 512 of the smallest blocks, for up to 96 threads.
        const SMALL: [usize; 3] = [512, 2048, 512];
        // Products of a small and of a wide model, 2048 tokens.
        let sizes = [
            [2048, 512, 768],
            [2048, 512, 512],
            [2048, 512, 2816],
            [2048, 1408, 512],
            SMALL,
            [2048, 2048, 3072],
            [2048, 2048, 11008],
            [2048, 5504, 2048],
            [1024, 512, 32000],
        ];
        for threads in 1..=96 {
            for size in sizes {
                let bound = if size == SMALL { 0.7 } else { 0.8 };
                for (name, busy) in [
                    ("fp32", busy::<f32>(size, threads, 16)),
                    ("bf16", busy::<half::bf16>(size, threads, 32)),
                    ("tiles", busy::<half::bf16>(size, threads, 512)),
                ] {
                    assert!(
                        busy > bound,
                        "{name} {size:?} on {threads} threads: {busy:.2}"
                    );
                }
            }
        }
    }
}
