//! Rows that the blocks of a product write.

use std::marker::PhantomData;
use std::ops::Range;

use crate::Error;
use crate::microkernel::pack::StridedMut;

use super::{Block, refuse};

/// A matrix `[rows, columns]` to be written, its rows dense and perhaps apart. Blocks write their
/// parts of it at the same time.
#[derive(Debug)]
pub struct Target<'a, T> {
    data: *mut T,
    rows: usize,
    columns: usize,
    stride: usize,
    owner: PhantomData<&'a mut [T]>,
}

// SAFETY: stands for a unique borrow of its rows; `part` hands them out disjoint.
unsafe impl<T: Send> Sync for Target<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Target<'_, T> {}

impl<'a, T> Target<'a, T> {
    /// `rows` rows of `columns` numbers, `stride` apart, the first of them at the beginning of
    /// `data`.
    ///
    /// # Errors
    /// [`Error::Argument`] if rows overlap or reach past `data`.
    pub fn new(
        data: &'a mut [T],
        [rows, columns]: [usize; 2],
        stride: usize,
    ) -> Result<Self, Error> {
        let len = data.len();
        let needed = match rows {
            0 => Some(0),
            _ => (rows - 1)
                .checked_mul(stride)
                .and_then(|last| last.checked_add(columns)),
        };
        if needed.is_none_or(|needed| needed > len) {
            return refuse(format!(
                "{rows} rows of {columns} numbers, {stride} apart, do not lie in {len} numbers"
            ));
        }
        // SAFETY: the borrow is unique and the rows lie in it.
        unsafe { Target::from_raw(data.as_mut_ptr(), [rows, columns], stride) }
    }

    /// Rows in memory that other views share, for instance some columns of a fused buffer.
    ///
    /// # Safety
    /// For `'a`, every row is valid for writing and no one else uses it.
    ///
    /// # Errors
    /// [`Error::Argument`] if rows overlap.
    pub unsafe fn from_raw(
        data: *mut T,
        [rows, columns]: [usize; 2],
        stride: usize,
    ) -> Result<Self, Error> {
        if rows > 1 && stride < columns {
            return refuse(format!(
                "rows of {columns} numbers overlap if they lie {stride} apart"
            ));
        }
        Ok(Target {
            data,
            rows,
            columns,
            stride,
            owner: PhantomData,
        })
    }

    /// Rows and columns.
    pub fn shape(&self) -> [usize; 2] {
        [self.rows, self.columns]
    }

    /// Some columns of some rows.
    ///
    /// # Safety
    /// Nothing else uses them while the result lives.
    #[inline(always)]
    pub unsafe fn part(&self, rows: Range<usize>, columns: Range<usize>) -> StridedMut<'_, T> {
        assert!(rows.start <= rows.end && rows.end <= self.rows);
        assert!(columns.start <= columns.end && columns.end <= self.columns);
        // SAFETY: they exist by the assertions; unique by the caller's promise.
        unsafe {
            let first = self.data.add(rows.start * self.stride + columns.start);
            StridedMut::from_raw(first, self.stride, rows.len(), columns.len())
        }
    }

    /// Asks for the lines of some columns of a row, to be written soon.
    #[inline(always)]
    pub fn prefetch(&self, row: usize, columns: Range<usize>) {
        #[cfg(target_arch = "x86_64")]
        {
            assert!(row < self.rows && columns.end <= self.columns);
            let lines = 64 / size_of::<T>();
            for column in columns.step_by(lines) {
                // SAFETY: the number exists by the assertion; the instruction reads and writes
                // nothing.
                unsafe {
                    let at = self.data.add(row * self.stride + column);
                    std::arch::asm!("prefetchw [{}]", in(reg) at, options(nostack, preserves_flags));
                }
            }
        }
    }

    /// Asks for the lines of a block.
    #[inline(always)]
    pub fn prefetch_block(&self, block: &Block) {
        for run in block.runs() {
            for row in block.rows.clone() {
                self.prefetch(row, run.columns.clone());
            }
        }
    }

    /// Refuses another shape than `[rows, columns]`.
    pub(super) fn check(&self, name: &str, expected: [usize; 2]) -> Result<(), Error> {
        if self.shape() == expected {
            return Ok(());
        }
        refuse(format!(
            "`{name}` must have shape {expected:?}, found {:?}",
            self.shape()
        ))
    }
}
