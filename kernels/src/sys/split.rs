//! Mutable buffers that a parallel loop may cut into disjoint parts.

use std::marker::PhantomData;
use std::ops::Range;

/// Something writable that can be cut along the index of a parallel loop.
///
/// # Safety
/// Parts of ranges that do not overlap must not share memory, as long as `covers(n)` is true and
/// the ranges lie in `0..n`.
pub unsafe trait Split: Sync {
    /// What one range gets; it lives as long as the borrow that was cut.
    type Part;

    /// Whether every range in `0..n` has a part.
    fn covers(&self, n: usize) -> bool;

    /// The part of `range`.
    ///
    /// # Safety
    /// `covers(n)` is true for an `n` not below the range's end, and no other live part overlaps.
    unsafe fn part(&self, range: Range<usize>) -> Self::Part;
}

/// A buffer of rows of `width` elements without gaps; a part is a plain slice of whole rows. The
/// last row may be short, so "row" also serves for a block of a flat buffer.
pub struct Rows<'a, T> {
    start: *mut T,
    len: usize,
    width: usize,
    owner: PhantomData<&'a mut [T]>,
}

impl<'a, T> Rows<'a, T> {
    /// Reads `buffer` as rows of `width` elements.
    pub fn new(buffer: &'a mut [T], width: usize) -> Self {
        Rows {
            start: buffer.as_mut_ptr(),
            len: buffer.len(),
            width,
            owner: PhantomData,
        }
    }
}

// SAFETY: the pointer comes from a `&mut [T]`; parts of disjoint ranges are disjoint slices.
unsafe impl<T: Send> Sync for Rows<'_, T> {}

// SAFETY: row r occupies [r * width, (r + 1) * width) cut at the end of the buffer, so disjoint
// ranges share nothing.
unsafe impl<'a, T: Send> Split for Rows<'a, T> {
    type Part = &'a mut [T];

    fn covers(&self, n: usize) -> bool {
        self.width == 0 || n <= self.len.div_ceil(self.width)
    }

    unsafe fn part(&self, range: Range<usize>) -> &'a mut [T] {
        let start = (range.start * self.width).min(self.len);
        let end = (range.end * self.width).min(self.len);
        // SAFETY: start <= end <= len, and by the caller's promise nobody else holds these rows.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), end - start) }
    }
}

/// A matrix whose rows may lie apart (`stride` elements from one row to the next).
pub struct Grid<'a, T> {
    start: *mut T,
    rows: usize,
    width: usize,
    stride: usize,
    owner: PhantomData<&'a mut [T]>,
}

impl<'a, T> Grid<'a, T> {
    /// A `[rows, width]` matrix without gaps.
    pub fn new(buffer: &'a mut [T], width: usize) -> Self {
        let rows = buffer.len().checked_div(width).unwrap_or(0);
        Grid {
            start: buffer.as_mut_ptr(),
            rows,
            width,
            stride: width,
            owner: PhantomData,
        }
    }

    /// A `[rows, width]` matrix with `stride` elements between the starts of rows.
    ///
    /// # Safety
    /// For `'a`, all `rows` rows are valid for writing, no one else uses them, and `stride >=
    /// width`.
    pub unsafe fn from_raw(start: *mut T, rows: usize, width: usize, stride: usize) -> Self {
        Grid {
            start,
            rows,
            width,
            stride,
            owner: PhantomData,
        }
    }

    /// Cuts along the rows: a part owns some rows in full width.
    pub fn by_rows(self) -> GridRows<'a, T> {
        GridRows(self)
    }

    /// Cuts along the columns: a part owns some columns of every row.
    pub fn by_columns(self) -> GridColumns<'a, T> {
        GridColumns(self)
    }
}

/// A [`Grid`] cut along its rows.
pub struct GridRows<'a, T>(Grid<'a, T>);

/// A [`Grid`] cut along its columns.
pub struct GridColumns<'a, T>(Grid<'a, T>);

/// A rectangle of a [`Grid`], written row by row.
pub struct GridPart<'p, T> {
    start: *mut T,
    rows: usize,
    width: usize,
    stride: usize,
    owner: PhantomData<&'p mut [T]>,
}

impl<T> GridPart<'_, T> {
    /// Row `r` of this part, counted from the part's own first row.
    pub fn row(&mut self, r: usize) -> &mut [T] {
        assert!(r < self.rows, "row {r} of a part with {} rows", self.rows);
        // SAFETY: the row exists, belongs to this part, and `&mut self` keeps it unique.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(r * self.stride), self.width) }
    }
}

// SAFETY: a grid stands for a unique borrow; its parts are handed out disjoint.
unsafe impl<T: Send> Sync for GridRows<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for GridColumns<'_, T> {}

// SAFETY: rows of disjoint ranges do not overlap because stride >= width.
unsafe impl<'a, T: Send> Split for GridRows<'a, T> {
    type Part = GridPart<'a, T>;

    fn covers(&self, n: usize) -> bool {
        n <= self.0.rows
    }

    unsafe fn part(&self, range: Range<usize>) -> GridPart<'a, T> {
        // SAFETY: the range lies within the rows.
        let start = unsafe { self.0.start.add(range.start * self.0.stride) };
        GridPart {
            start,
            rows: range.len(),
            width: self.0.width,
            stride: self.0.stride,
            owner: PhantomData,
        }
    }
}

// SAFETY: column ranges that do not overlap are disjoint in every row, and rows do not overlap.
unsafe impl<'a, T: Send> Split for GridColumns<'a, T> {
    type Part = GridPart<'a, T>;

    fn covers(&self, n: usize) -> bool {
        n <= self.0.width
    }

    unsafe fn part(&self, range: Range<usize>) -> GridPart<'a, T> {
        // SAFETY: the range lies within the width.
        let start = unsafe { self.0.start.add(range.start) };
        GridPart {
            start,
            rows: self.0.rows,
            width: range.len(),
            stride: self.0.stride,
            owner: PhantomData,
        }
    }
}

// SAFETY: an absent output has no memory; a present one is a Split of its own.
unsafe impl<S: Split> Split for Option<S> {
    type Part = Option<S::Part>;

    fn covers(&self, n: usize) -> bool {
        self.as_ref().is_none_or(|inner| inner.covers(n))
    }

    unsafe fn part(&self, range: Range<usize>) -> Self::Part {
        // SAFETY: the caller's promise holds for the inner value.
        self.as_ref().map(|inner| unsafe { inner.part(range) })
    }
}

/// Several outputs of one loop: cut each alike.
macro_rules! split_tuple {
    ($($name:ident $field:tt),+) => {
        // SAFETY: every member is a Split, and members are distinct unique borrows.
        unsafe impl<$($name: Split),+> Split for ($($name,)+) {
            type Part = ($($name::Part,)+);

            fn covers(&self, n: usize) -> bool {
                $(self.$field.covers(n))&&+
            }

            unsafe fn part(&self, range: Range<usize>) -> Self::Part {
                // SAFETY: the caller's promise holds for each member.
                unsafe { ($(self.$field.part(range.clone()),)+) }
            }
        }
    };
}

split_tuple!(A 0, B 1);
split_tuple!(A 0, B 1, C 2);
split_tuple!(A 0, B 1, C 2, D 3);
