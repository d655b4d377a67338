//! Operands in the form that the micro-kernel reads.
//!
//! Packed B lies in blocks of k of [`depth`] rows, each block `[panels][rows of the block][16]`. A
//! task reads some panels of a block after the other: one long stretch of memory.

use std::marker::PhantomData;
use std::ops::Range;

use crate::Error;
use crate::float::{Float, Operand};
use crate::microkernel::pack::{self, Strided};
use crate::microkernel::{Element, Kernel};
use crate::simd::vector::{Simd, WIDTH};
use crate::sys::parallel::{Counter, parallel_for, threads};
use crate::sys::scratch::{Area, Layout, Scratch};

use super::{Columns, Matrix, OP, refuse};

/// Rows of a block of k, 512 words. Two panels of it are 64 KiB, which the micro-kernel streams from
/// L2 without loss (8 bytes a cycle in bf16). Shorter blocks pass sums through memory more often:
/// half of it costs 1–6%, the same as twice of it, whose blocks of A crowd L2.
pub(super) const fn depth<E: Element>() -> usize {
    512 * E::PER_WORD
}

/// Rows of a block of k that holds `k`, in the packed form.
#[inline(always)]
pub(super) fn height<E: Element>(k: usize) -> usize {
    k.next_multiple_of(E::PER_WORD)
}

/// Elements of packed B.
pub(super) fn packed_elements<E: Element>(k: usize, columns: Columns) -> usize {
    height::<E>(k) * columns.panels() * WIDTH
}

/// Where a panel of a block of k begins in packed B; `first` is the block's first row, `rows` its
/// height.
#[inline(always)]
pub(super) fn place(columns: Columns, panel: usize, first: usize, rows: usize) -> usize {
    WIDTH * (first * columns.panels() + panel * rows)
}

/// fp32 numbers of a buffer for packed B.
pub(super) fn buffer_len<E: Element>(k: usize, columns: Columns) -> usize {
    let mut layout = Layout::default();
    layout.take::<E>(packed_elements::<E>(k, columns));
    Layout::buffer_len(layout.end())
}

/// B, packed by [`super::pack`].
pub struct Packed<'a, T> {
    buffer: &'a [f32],
    k: usize,
    columns: Columns,
    dtype: PhantomData<T>,
}

// Not derived: that would ask for `T: Clone`.
impl<T> Clone for Packed<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Packed<'_, T> {}

impl<'a, T> Packed<'a, T> {
    /// What [`super::pack`] has made in this buffer. It must lie where it lay then, and the level
    /// must be the same.
    pub fn new(buffer: &'a [f32], k: usize, columns: Columns) -> Self {
        Packed {
            buffer,
            k,
            columns,
            dtype: PhantomData,
        }
    }

    /// Rows of B.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Columns of B.
    pub fn columns(&self) -> Columns {
        self.columns
    }

    /// The elements.
    pub(super) fn elements<E: Element>(&self) -> Result<&'a [E], Error> {
        let (found, expected) = (self.buffer.len(), buffer_len::<E>(self.k, self.columns));
        if found < expected {
            return refuse(format!(
                "packed B must hold {expected} numbers, found {found}"
            ));
        }
        let skip = self.buffer.as_ptr().align_offset(64);
        let len = packed_elements::<E>(self.k, self.columns);
        // SAFETY: `buffer_len` leaves room for the part of a line that is skipped, as `Scratch`
        // does; elements are plain numbers that need no more alignment than fp32.
        Ok(unsafe { std::slice::from_raw_parts(self.buffer.as_ptr().add(skip).cast(), len) })
    }
}

/// Packs B into a buffer of its own.
pub(super) fn pack<T, K>(
    kernel: K,
    b: Matrix<'_, T>,
    columns: Columns,
    buffer: &mut [f32],
) -> Result<(), Error>
where
    T: Operand<K::Element>,
    K: Kernel,
{
    check(b, columns)?;
    let mut layout = Layout::default();
    let area = layout.take(packed_elements::<K::Element>(b.rows(), columns));
    let scratch = Scratch::new(OP, buffer, Layout::buffer_len(layout.end()))?;
    pack_all(kernel, b, columns, &scratch, area);
    Ok(())
}

/// Refuses B that is not what `columns` say.
pub(super) fn check<T: Float>(b: Matrix<'_, T>, columns: Columns) -> Result<(), Error> {
    b.check("b")?;
    if b.columns() != columns.count() {
        return refuse(format!(
            "B has {} columns, but is described as {columns:?}",
            b.columns()
        ));
    }
    Ok(())
}

/// Packs B into an area, on all threads.
pub(super) fn pack_all<T, K>(
    kernel: K,
    b: Matrix<'_, T>,
    columns: Columns,
    scratch: &Scratch<'_>,
    area: Area<K::Element>,
) where
    T: Operand<K::Element>,
    K: Kernel,
{
    /// Panels of a task: with a block of k, 128 KiB. An even number, since rows of bf16 are packed
    /// two panels at a time.
    const PANELS: usize = 8;
    let (k, panels) = (b.rows(), columns.panels());
    let across = panels.div_ceil(PANELS);
    let tasks = k.div_ceil(depth::<K::Element>()) * across;
    let counter = Counter::new();
    parallel_for(threads().min(tasks), 1, |_| {
        loop {
            let task = counter.claim();
            if task >= tasks {
                break;
            }
            let first = task / across * depth::<K::Element>();
            let rows = first..(first + depth::<K::Element>()).min(k);
            let panel = task % across * PANELS;
            let group = panel..(panel + PANELS).min(panels);
            let height = height::<K::Element>(rows.len());
            let start = place(columns, panel, first, height);
            let len = WIDTH * group.len() * height;
            // SAFETY: these panels of this block of k belong to this task alone.
            let to = unsafe { scratch.get(area, 0, start..start + len) };
            pack_panels::<T, K>(kernel, b, columns, rows, group, to);
        }
    });
}

/// Packs some panels of some rows of B.
pub(super) fn pack_panels<T, K>(
    kernel: K,
    b: Matrix<'_, T>,
    columns: Columns,
    rows: Range<usize>,
    panels: Range<usize>,
    to: &mut [K::Element],
) where
    T: Operand<K::Element>,
    K: Kernel,
{
    let (simd, height) = (kernel.simd(), height::<K::Element>(rows.len()));
    for run in columns.runs(panels) {
        let to = &mut to[run.panel * WIDTH * height..][..run.panels * WIDTH * height];
        match b {
            Matrix::Rows(b) => {
                let b = part(b, rows.clone(), run.columns);
                pack::panels::<K::Simd, K::Element, T>(simd, b, to, height);
            }
            Matrix::Turned(b) => {
                let b = part(b, run.columns, rows.clone());
                pack::turned_panels::<K::Simd, K::Element, T>(simd, b, to, run.panels);
            }
        }
    }
}

/// From one row of packed A to the next, for a block of `k` columns.
#[inline(always)]
pub(super) fn left_stride<E: Element>(k: usize) -> usize {
    pack::row_stride::<E>(k)
}

/// Packs a block of A as dense rows of [`left_stride`].
#[inline(always)]
pub(super) fn pack_left<E: Element, T: Operand<E>, S: Simd>(
    simd: S,
    a: Matrix<'_, T>,
    rows: Range<usize>,
    k: Range<usize>,
    to: &mut [E],
) {
    let stride = left_stride::<E>(k.len());
    match a {
        Matrix::Rows(a) => pack::rows::<S, E, T>(simd, part(a, rows, k), to),
        Matrix::Turned(a) => pack::turned_rows::<S, E, T>(simd, part(a, k, rows), to, stride),
    }
}

/// Some columns of some rows; neither range is empty.
#[inline(always)]
pub(super) fn part<'a, T>(
    from: Strided<'a, T>,
    rows: Range<usize>,
    columns: Range<usize>,
) -> Strided<'a, T> {
    Strided {
        data: &from.data[rows.start * from.stride + columns.start..],
        stride: from.stride,
        n: rows.len(),
        d: columns.len(),
    }
}
