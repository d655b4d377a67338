//! Sums that are stored, or added to something and stored.

use super::{check_read, prefetch_read};
use crate::Error;
use crate::float::{Float, load_padded, store_cut};
use crate::matmul::operands::part;
use crate::matmul::{Block, Columns, Epilogue, Target};
use crate::microkernel::pack::{Strided, StridedMut};
use crate::simd::vector::{Simd, WIDTH, per_level};

/// `c = round(sum)`, `[rows, columns]` in T.
pub struct Store<'a, T>(pub Target<'a, T>);

/// `c = round(c + sum)`, `[rows, columns]` in T; in fp32 a gradient that several calls add to.
pub struct AddTo<'a, T>(pub Target<'a, T>);

/// `out = round(residual + sum)`, `[rows, columns]` in R, the dtype of the residual stream.
pub struct AddResidual<'a, R> {
    /// What the sums are added to.
    pub residual: Strided<'a, R>,
    /// Where the result goes.
    pub out: Target<'a, R>,
}

impl<T: Float> Epilogue for Store<'_, T> {
    unsafe fn finish<S: Simd>(&self, simd: S, block: &Block, sums: &mut [f32]) {
        for run in block.runs() {
            // SAFETY: these columns of these rows are in this block alone.
            let c = unsafe { self.0.part(block.rows.clone(), run.columns.clone()) };
            store::<S, T>(simd, run.sums(sums), block, run.columns.len(), c);
        }
    }

    fn prefetch(&self, block: &Block) {
        self.0.prefetch_block(block);
    }

    fn check(&self, rows: usize, columns: Columns) -> Result<(), Error> {
        self.0.check("c", [rows, columns.count()])
    }
}

impl<T: Float> Epilogue for AddTo<'_, T> {
    unsafe fn finish<S: Simd>(&self, simd: S, block: &Block, sums: &mut [f32]) {
        for run in block.runs() {
            // SAFETY: these columns of these rows are in this block alone.
            let c = unsafe { self.0.part(block.rows.clone(), run.columns.clone()) };
            add_to::<S, T>(simd, run.sums(sums), block, run.columns.len(), c);
        }
    }

    fn prefetch(&self, block: &Block) {
        self.0.prefetch_block(block);
    }

    fn check(&self, rows: usize, columns: Columns) -> Result<(), Error> {
        self.0.check("c", [rows, columns.count()])
    }
}

impl<R: Float> Epilogue for AddResidual<'_, R> {
    unsafe fn finish<S: Simd>(&self, simd: S, block: &Block, sums: &mut [f32]) {
        for run in block.runs() {
            let before = part(self.residual, block.rows.clone(), run.columns.clone());
            // SAFETY: these columns of these rows are in this block alone.
            let out = unsafe { self.out.part(block.rows.clone(), run.columns.clone()) };
            add_residual::<S, R>(simd, run.sums(sums), block, before, out);
        }
    }

    fn prefetch(&self, block: &Block) {
        self.out.prefetch_block(block);
        prefetch_read(self.residual, block, 0);
    }

    fn check(&self, rows: usize, columns: Columns) -> Result<(), Error> {
        let shape = [rows, columns.count()];
        check_read("residual", self.residual, shape)?;
        self.out.check("out", shape)
    }
}

per_level! {
fn store[S, T: Float](
    simd: S, sums: &[f32], block: &Block, width: usize, to: StridedMut<'_, T>,
) {
    let mut to = to;
    for r in 0..block.rows.len() {
        store_row(simd, &sums[r * block.stride..][..width], to.row(r));
    }
}
}

/// `to = round(sums)`, of the same length.
#[inline(always)]
pub(super) fn store_row<S: Simd, T: Float>(simd: S, sums: &[f32], to: &mut [T]) {
    // Whole vectors as arrays: the loop has no tests inside, which took two thirds of its time.
    let (sums, sums_rest) = sums.as_chunks::<WIDTH>();
    let (to, to_rest) = to.as_chunks_mut::<WIDTH>();
    for (sums, to) in sums.iter().zip(to) {
        T::store(simd, simd.load(sums), to);
    }
    if !sums_rest.is_empty() {
        store_cut(simd, load_padded(simd, sums_rest, 0), to_rest, 0);
    }
}

per_level! {
fn add_to[S, T: Float](
    simd: S, sums: &[f32], block: &Block, width: usize, to: StridedMut<'_, T>,
) {
    let mut to = to;
    for r in 0..block.rows.len() {
        let (sums, sums_rest) = sums[r * block.stride..][..width].as_chunks::<WIDTH>();
        let (to, to_rest) = to.row(r).as_chunks_mut::<WIDTH>();
        for (sums, to) in sums.iter().zip(to) {
            T::store(simd, simd.add(T::load(simd, to), simd.load(sums)), to);
        }
        if !sums_rest.is_empty() {
            let x = simd.add(load_padded(simd, to_rest, 0), load_padded(simd, sums_rest, 0));
            store_cut(simd, x, to_rest, 0);
        }
    }
}
}

per_level! {
fn add_residual[S, R: Float](
    simd: S, sums: &[f32], block: &Block, residual: Strided<'_, R>, out: StridedMut<'_, R>,
) {
    let (mut out, width) = (out, residual.d);
    for r in 0..block.rows.len() {
        let (residual, residual_rest) = residual.row(r).as_chunks::<WIDTH>();
        let (sums, sums_rest) = sums[r * block.stride..][..width].as_chunks::<WIDTH>();
        let (out, out_rest) = out.row(r).as_chunks_mut::<WIDTH>();
        for ((sums, residual), out) in sums.iter().zip(residual).zip(out) {
            R::store(simd, simd.add(R::load(simd, residual), simd.load(sums)), out);
        }
        if !sums_rest.is_empty() {
            let before = load_padded(simd, residual_rest, 0);
            let x = simd.add(before, load_padded(simd, sums_rest, 0));
            store_cut(simd, x, out_rest, 0);
        }
    }
}
}
