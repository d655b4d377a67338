//! Rotary embedding of the query and key heads of a fused projection.

use super::store::store_row;
use crate::Error;
use crate::float::{Float, load_padded, store_cut};
use crate::matmul::{Block, Columns, Epilogue, Target, refuse};
use crate::microkernel::pack::StridedMut;
use crate::simd::vector::{Simd, WIDTH, per_level};

/// Turns the first `rotated` heads of every row as `crate::rope` does (element `i` of a head with
/// element `i + d/2`) and stores the others as they are, from fp32 sums, rounded once. The product
/// has [`Columns::Groups`] of whole heads.
pub struct Rope<'a, T> {
    out: Target<'a, T>,
    rotated: usize,
    cos: &'a [f32],
    sin: &'a [f32],
    positions: &'a [i64],
    half: usize,
}

impl<'a, T: Float> Rope<'a, T> {
    /// `out: [n, heads · d]` in T; `cos` and `sin`: tables `[positions, d/2]` fp32 of all positions
    /// that may occur; `positions: [n]`.
    ///
    /// # Errors
    /// [`Error::Argument`] if sizes do not fit, [`Error::Index`] for a position outside the tables.
    pub fn new(
        out: Target<'a, T>,
        [rotated, dim]: [usize; 2],
        [cos, sin]: [&'a [f32]; 2],
        positions: &'a [i64],
    ) -> Result<Self, Error> {
        const ROPE: &str = "matmul.rope";
        let [n, width] = out.shape();
        if dim == 0 || !dim.is_multiple_of(2) || !width.is_multiple_of(dim) || rotated > width / dim
        {
            return refuse(format!(
                "{rotated} heads of {dim} numbers cannot be turned in rows of {width}"
            ));
        }
        let half = dim / 2;
        if cos.len() != sin.len() || !cos.len().is_multiple_of(half) || positions.len() != n {
            return refuse(format!(
                "tables of {} and {} numbers and {} positions do not fit {n} rows of heads of {dim}",
                cos.len(),
                sin.len(),
                positions.len()
            ));
        }
        let limit = (cos.len() / half) as i64;
        if let Some(at) = positions.iter().position(|p| !(0..limit).contains(p)) {
            return Err(Error::Index {
                op: ROPE,
                tensor: "positions",
                at,
                value: positions[at],
                limit,
            });
        }
        Ok(Rope {
            out,
            rotated,
            cos,
            sin,
            positions,
            half,
        })
    }

    /// How the product's columns must be cut.
    pub fn columns(&self) -> Columns {
        let width = 2 * self.half;
        Columns::Groups {
            count: self.out.shape()[1] / width,
            width,
        }
    }
}

impl<T: Float> Epilogue for Rope<'_, T> {
    unsafe fn finish<S: Simd>(&self, simd: S, block: &Block, sums: &mut [f32]) {
        let width = 2 * self.half;
        let panels = width.div_ceil(WIDTH);
        for group in 0..block.panels.len() / panels {
            let head = block.panels.start / panels + group;
            let columns = head * width..(head + 1) * width;
            // SAFETY: these columns of these rows are in this block alone.
            let out = unsafe { self.out.part(block.rows.clone(), columns) };
            let sums = &sums[group * panels * WIDTH..];
            rotate::<S, T>(simd, self, head < self.rotated, block, sums, out);
        }
    }

    fn prefetch(&self, block: &Block) {
        self.out.prefetch_block(block);
    }

    fn check(&self, rows: usize, columns: Columns) -> Result<(), Error> {
        if columns != self.columns() {
            return refuse(format!(
                "the product's columns must be {:?}, found {columns:?}",
                self.columns()
            ));
        }
        self.out.check("out", [rows, columns.count()])
    }
}

per_level! {
/// One head of every row of a block.
fn rotate[S, T: Float](
    simd: S, rope: &Rope<'_, T>, turn: bool, block: &Block, sums: &[f32],
    out: StridedMut<'_, T>,
) {
    let (mut out, half) = (out, rope.half);
    for (r, row) in block.rows.clone().enumerate() {
        let (sums, out) = (&sums[r * block.stride..][..2 * half], out.row(r));
        if !turn {
            store_row(simd, sums, out);
            continue;
        }
        let at = rope.positions[row] as usize * half;
        let (cos, sin) = (&rope.cos[at..at + half], &rope.sin[at..at + half]);
        let (first, second) = sums.split_at(half);
        let (out_first, out_second) = out.split_at_mut(half);
        for at in (0..half).step_by(WIDTH) {
            let (a, b) = (load_padded(simd, first, at), load_padded(simd, second, at));
            let (c, s) = (load_padded(simd, cos, at), load_padded(simd, sin, at));
            let turned = simd.sub(simd.mul(a, c), simd.mul(b, s));
            store_cut(simd, turned, out_first, at);
            store_cut(simd, simd.fma(b, c, simd.mul(a, s)), out_second, at);
        }
    }
}
}
