//! The tasks of a product.

use std::ops::Range;

use crate::Error;
use crate::float::{Float, Operand};
use crate::microkernel::{Element, Kernel, Product};
use crate::simd::vector::WIDTH;
use crate::sys::caches::Caches;
use crate::sys::parallel::{Counter, parallel_for, threads};
use crate::sys::scratch::Scratch;

use super::operands::{depth, height, left_stride, pack_all, pack_left, pack_panels, place};
use super::plan::{PIECE_ROWS, Panels, Plan};
use super::{Block, Columns, Epilogue, Matrix, OP, Right, Shape, as_elements, operands, refuse};

/// A where it lies, if the kernel can read it there: rows of its own type, in whole words.
fn in_place<'a, T: Float, E: Element>(a: Matrix<'a, T>) -> Option<(&'a [E], usize)> {
    match a {
        Matrix::Rows(a) if a.d.is_multiple_of(E::PER_WORD) => {
            as_elements(a.data).map(|data| (data, a.stride))
        }
        _ => None,
    }
}

/// The plan of a product; without A, that of any A with the longest scratch.
pub(super) fn plan<K: Kernel>(shape: Shape, in_place: Option<bool>) -> Plan<K::Element> {
    let caches = Caches::of_this_machine();
    let new = |in_place| Plan::new(shape, in_place, threads(), K::RATE, caches);
    match in_place {
        Some(in_place) => new(in_place),
        None => {
            let (packed, direct) = (new(false), new(true));
            if packed.len > direct.len {
                packed
            } else {
                direct
            }
        }
    }
}

/// What every task sees.
struct Pass<'a, T, K: Kernel, E> {
    kernel: K,
    plan: Plan<K::Element>,
    rows: usize,
    k: usize,
    columns: Columns,
    a: Matrix<'a, T>,
    a_in_place: Option<(&'a [K::Element], usize)>,
    b: Right<'a, T>,
    /// Packed B, unless tasks pack it.
    panels: &'a [K::Element],
    epilogue: &'a E,
    scratch: &'a Scratch<'a>,
}

pub(super) fn run<T, K, E>(
    kernel: K,
    a: Matrix<'_, T>,
    b: Right<'_, T>,
    epilogue: &E,
    scratch: &mut [f32],
) -> Result<(), Error>
where
    T: Operand<K::Element>,
    K: Kernel,
    E: Epilogue,
{
    let (rows, k, columns) = (a.rows(), a.columns(), b.columns());
    a.check("a")?;
    if let Right::Plain(b, columns) = b {
        operands::check(b, columns)?;
    }
    if b.k() != k {
        return refuse(format!("A has {k} columns, but B has {} rows", b.k()));
    }
    epilogue.check(rows, columns)?;
    let a_in_place = in_place::<T, K::Element>(a);
    let shape = Shape {
        rows,
        k,
        columns,
        packed: matches!(b, Right::Packed(_)),
    };
    let team = threads();
    let plan = plan::<K>(shape, Some(a_in_place.is_some()));
    let scratch = Scratch::new(OP, scratch, plan.len)?;
    let panels: &[K::Element] = match (plan.b, b) {
        (Panels::Given, Right::Packed(packed)) => packed.elements()?,
        (Panels::Shared(area), Right::Plain(b, columns)) => {
            pack_all(kernel, b, columns, &scratch, area);
            // SAFETY: packing is over, and nothing writes there again.
            unsafe { scratch.share(area) }
        }
        _ => &[],
    };
    let tasks = plan.down * plan.across;
    let pass = Pass {
        kernel,
        plan,
        rows,
        k,
        columns,
        a,
        a_in_place,
        b,
        panels,
        epilogue,
        scratch: &scratch,
    };
    let counter = Counter::new();
    parallel_for(team, 1, |workers| {
        let _region = kernel.enter();
        loop {
            let task = counter.claim();
            if task >= tasks {
                break;
            }
            pass.task(task, workers.start);
        }
    });
    Ok(())
}

impl<T, K, E> Pass<'_, T, K, E>
where
    T: Operand<K::Element>,
    K: Kernel,
    E: Epilogue,
{
    /// Rows and panels of a task.
    fn block(&self, task: usize) -> (Range<usize>, Range<usize>) {
        let plan = &self.plan;
        let (down, across) = if plan.rows_first {
            (task % plan.down, task / plan.down)
        } else {
            (task / plan.across, task % plan.across)
        };
        let (row, panel) = (down * plan.rows, across * plan.panels);
        (
            row..(row + plan.rows).min(self.rows),
            panel..(panel + plan.panels).min(self.columns.panels()),
        )
    }

    /// One block of the product.
    fn task(&self, task: usize, worker: usize) {
        let plan = &self.plan;
        let (rows, panels) = self.block(task);
        let shift = worker * plan.per_thread;
        // SAFETY: the areas of this worker are its own.
        let sums = unsafe { self.scratch.get(plan.sums, shift, 0..plan.sums.len) };
        let at = (rows.start, panels.start);
        let mut product = Product {
            rows: rows.len(),
            panels: panels.len(),
            k: 0,
            a_row: 0,
            b_panel: 0,
            c_row: WIDTH * panels.len(),
            add: false,
        };
        if self.k == 0 {
            return self.last(product, &[], &[], at, sums);
        }
        for first in (0..self.k).step_by(depth::<K::Element>()) {
            let inner = first..(first + depth::<K::Element>()).min(self.k);
            let (a, a_row) = self.left(&rows, &inner, shift);
            let b = self.right(&panels, &inner, shift);
            product.k = height::<K::Element>(inner.len());
            product.a_row = a_row;
            product.b_panel = WIDTH * product.k;
            product.add = first > 0;
            if inner.end < self.k {
                self.kernel.multiply(product, a, b, sums);
            } else {
                self.last(product, a, b, at, sums);
            }
        }
    }

    /// A block of A, and what lies from one of its rows to the next.
    #[inline(always)]
    fn left(&self, rows: &Range<usize>, k: &Range<usize>, shift: usize) -> (&[K::Element], usize) {
        if let Some((a, a_row)) = self.a_in_place {
            return (&a[rows.start * a_row + k.start..], a_row);
        }
        // SAFETY: the areas of this worker are its own.
        let to = unsafe { self.scratch.get(self.plan.a, shift, 0..self.plan.a.len) };
        let (rows, k) = (rows.clone(), k.clone());
        let a_row = left_stride::<K::Element>(k.len());
        pack_left::<K::Element, T, K::Simd>(self.kernel.simd(), self.a, rows, k, to);
        (to, a_row)
    }

    /// Panels of a block of k.
    #[inline(always)]
    fn right(&self, panels: &Range<usize>, k: &Range<usize>, shift: usize) -> &[K::Element] {
        let height = height::<K::Element>(k.len());
        match (self.plan.b, self.b) {
            (Panels::Own(area), Right::Plain(b, columns)) => {
                let len = WIDTH * panels.len() * height;
                // SAFETY: the areas of this worker are its own.
                let to = unsafe { self.scratch.get(area, shift, 0..len) };
                pack_panels::<T, K>(self.kernel, b, columns, k.clone(), panels.clone(), to);
                to
            }
            _ => &self.panels[place(self.columns, panels.start, k.start, height)..],
        }
    }

    /// The last block of k goes to the epilogue piece by piece. The lines that a piece will write
    /// are asked for before it is multiplied and are there afterwards; its stores drain while the
    /// next piece is multiplied. Stores of a whole block would wait for line after line: 12% of a
    /// product with k = 512.
    ///
    /// Sums that no other block of k needs are kept for one piece only, in L1.
    #[inline(always)]
    fn last(
        &self,
        all: Product,
        a: &[K::Element],
        b: &[K::Element],
        (row, panel): (usize, usize),
        sums: &mut [f32],
    ) {
        let wide = self.plan.piece;
        for right in (0..all.panels).step_by(wide) {
            let b = &b[right * all.b_panel..];
            for down in (0..all.rows).step_by(PIECE_ROWS) {
                let mut piece = Product {
                    rows: (all.rows - down).min(PIECE_ROWS),
                    panels: (all.panels - right).min(wide),
                    ..all
                };
                let mut at = down * all.c_row + right * WIDTH;
                if !all.add {
                    (at, piece.c_row) = (0, WIDTH * piece.panels);
                }
                let sums = &mut sums[at..];
                let block = Block {
                    rows: row + down..row + down + piece.rows,
                    panels: panel + right..panel + right + piece.panels,
                    columns: self.columns,
                    stride: piece.c_row,
                };
                self.epilogue.prefetch(&block);
                self.kernel.multiply(piece, &a[down * all.a_row..], b, sums);
                // SAFETY: every piece belongs to one task, every task to one thread, and `check`
                // accepted the product.
                unsafe { self.epilogue.finish(self.kernel.simd(), &block, sums) };
            }
        }
    }
}
