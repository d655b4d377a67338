//! One buffer, cut into typed areas.
//!
//! A plan lays areas out without memory, so the same code predicts the size of the buffer and
//! finds its way in it. Areas begin at multiples of 64 bytes, a cache line and a vector: loads that
//! cross lines would cost a third of the products' speed.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::AtomicU32;

use crate::Error;

/// fp32 numbers in a cache line.
const LINE: usize = 16;

/// A part of the buffer that holds numbers of type E; private to a thread or shared by all.
pub(crate) struct Area<E> {
    /// Where it begins, in fp32 numbers from the buffer's first whole line.
    start: usize,
    /// Its length in numbers of type E.
    pub(crate) len: usize,
    element: PhantomData<E>,
}

// Not derived: that would ask for `E: Clone`.
impl<E> Clone for Area<E> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<E> Copy for Area<E> {}

/// Lays areas out one after the other.
#[derive(Default)]
pub(crate) struct Layout {
    /// fp32 numbers laid out so far.
    end: usize,
}

impl Layout {
    /// The next area, of `len` numbers.
    pub(crate) fn take<E>(&mut self, len: usize) -> Area<E> {
        let start = self.end;
        self.end += (len * size_of::<E>()).div_ceil(4).next_multiple_of(LINE);
        Area {
            start,
            len,
            element: PhantomData,
        }
    }

    /// Where the next area would begin.
    pub(crate) fn end(&self) -> usize {
        self.end
    }

    /// fp32 numbers of a buffer for this much, wherever it begins in its line.
    pub(crate) fn buffer_len(end: usize) -> usize {
        end + LINE - 1
    }
}

/// The buffer, while tasks share it.
pub(crate) struct Scratch<'a> {
    base: *mut f32,
    len: usize,
    owner: PhantomData<&'a mut [f32]>,
}

// SAFETY: stands for a unique borrow; `get` hands out disjoint parts.
unsafe impl Sync for Scratch<'_> {}

impl<'a> Scratch<'a> {
    /// Reads `buffer` as scratch of `len` numbers, as predicted by [`Layout::buffer_len`].
    ///
    /// # Errors
    /// [`Error::Argument`] if it is shorter.
    pub(crate) fn new(
        op: &'static str,
        buffer: &'a mut [f32],
        len: usize,
    ) -> Result<Scratch<'a>, Error> {
        if buffer.len() < len {
            let message = format!("scratch must hold {len} numbers, found {}", buffer.len());
            return Err(Error::Argument { op, message });
        }
        let skip = buffer.as_ptr().align_offset(4 * LINE).min(LINE - 1);
        let buffer = &mut buffer[skip..];
        Ok(Scratch {
            base: buffer.as_mut_ptr(),
            len: buffer.len(),
            owner: PhantomData,
        })
    }

    /// Part of an area; `shift` moves it by whole areas of a thread.
    ///
    /// # Safety
    /// No other live reference overlaps it, and E is a plain number of at most 4 bytes' alignment.
    #[allow(clippy::mut_from_ref)]
    #[inline(always)]
    pub(crate) unsafe fn get<E>(
        &self,
        area: Area<E>,
        shift: usize,
        range: Range<usize>,
    ) -> &mut [E] {
        assert!(range.start <= range.end && range.end <= area.len);
        let start = shift + area.start;
        assert!(start + (range.end * size_of::<E>()).div_ceil(4) <= self.len);
        // SAFETY: inside the buffer by the assertions; unique by the caller's promise.
        unsafe {
            let first = self.base.add(start).cast::<E>().add(range.start);
            std::slice::from_raw_parts_mut(first, range.len())
        }
    }

    /// A whole shared area, to be read.
    ///
    /// # Safety
    /// Nothing writes to it while the result lives.
    #[inline(always)]
    pub(crate) unsafe fn share<E>(&self, area: Area<E>) -> &[E] {
        assert!(area.start + (area.len * size_of::<E>()).div_ceil(4) <= self.len);
        // SAFETY: inside the buffer by the assertion; not written by the caller's promise.
        unsafe {
            let first = self.base.add(area.start).cast_const().cast::<E>();
            std::slice::from_raw_parts(first, area.len)
        }
    }

    /// One word of a shared area, for all threads.
    ///
    /// # Safety
    /// While the result lives, the word is used as an atomic only.
    #[inline(always)]
    pub(crate) unsafe fn atomic(&self, area: Area<u32>, at: usize) -> &AtomicU32 {
        assert!(at < area.len && area.start + at < self.len);
        // SAFETY: inside the buffer by the assertion, aligned like fp32; the caller promises that
        // nothing else is done with it.
        unsafe { AtomicU32::from_ptr(self.base.add(area.start + at).cast()) }
    }
}
