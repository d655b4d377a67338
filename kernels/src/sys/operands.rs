//! From tensors to slices: the one place where a kernel's arguments are checked.
//!
//! An op makes one [`Operands`] and passes every argument through it. What comes out is a plain
//! Rust slice of the right type and length, and no output shares memory with another argument.
//! (Memory shared with a tensor that another thread uses at the same time cannot be seen from
//! here; a tensor is `Send` but not `Sync`, so that takes two handles on purpose.)

use tch::{Device, Tensor};

use super::split::Grid;
use crate::{Error, Scalar};

mod claims;
mod views;

pub(crate) use claims::{Claims, check_dtype};
pub(crate) use views::reach;

/// The arguments of one call, checked one by one.
pub struct Operands {
    claims: Claims,
}

impl Operands {
    /// Starts the check of a call to `op`.
    pub fn new(op: &'static str) -> Self {
        Operands {
            claims: Claims::new(op, Device::Cpu),
        }
    }

    /// The op that is called.
    pub(crate) fn op(&self) -> &'static str {
        self.claims.op()
    }

    /// A contiguous tensor of exactly this shape, to be read.
    ///
    /// # Errors
    /// Any of the argument errors of [`Error`].
    pub fn read<'t, E: Scalar>(
        &mut self,
        name: &'static str,
        tensor: &'t Tensor,
        shape: &[usize],
    ) -> Result<&'t [E], Error> {
        let len = self.claims.dense(name, tensor, E::KIND, shape, false)?;
        if len == 0 {
            return Ok(&[]);
        }
        // SAFETY: a defined, contiguous CPU tensor of this dtype owns `len` aligned elements for as
        // long as it is borrowed; `claim` saw no written argument among them.
        Ok(unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast(), len) })
    }

    /// A contiguous tensor of exactly this shape, to be written.
    ///
    /// # Errors
    /// Any of the argument errors of [`Error`].
    pub fn write<'t, E: Scalar>(
        &mut self,
        name: &'static str,
        tensor: &'t mut Tensor,
        shape: &[usize],
    ) -> Result<&'t mut [E], Error> {
        let len = self.claims.dense(name, tensor, E::KIND, shape, true)?;
        if len == 0 {
            return Ok(&mut []);
        }
        // SAFETY: as in `read`; the borrow is unique and `claim` saw no other argument in it.
        Ok(unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast(), len) })
    }

    /// A `[rows, heads, dim]` view whose rows may lie apart (a part of a wider buffer), to be
    /// written as `rows` rows of `heads * dim` elements.
    ///
    /// # Errors
    /// Any of the argument errors of [`Error`].
    pub fn write_heads<'t, E: Scalar>(
        &mut self,
        name: &'static str,
        tensor: &'t mut Tensor,
        [rows, heads, dim]: [usize; 3],
    ) -> Result<Grid<'t, E>, Error> {
        let shape = [rows, heads, dim];
        let (width, stride) = self.claims.heads(name, tensor, E::KIND, shape, true)?;
        if rows * width == 0 {
            return Ok(Grid::new(&mut [], width));
        }
        // SAFETY: the strides just checked put row r at r * stride with `width` dense elements; the
        // borrow is unique and `claim` saw no other argument in it.
        Ok(unsafe { Grid::from_raw(tensor.data_ptr().cast(), rows, width, stride) })
    }

    /// A `[rows, columns]` matrix whose rows may lie apart but are dense, to be read: the elements
    /// from its first to its last, and from one row to the next.
    ///
    /// # Errors
    /// Any of the argument errors of [`Error`].
    pub fn read_matrix<'t, E: Scalar>(
        &mut self,
        name: &'static str,
        tensor: &'t Tensor,
        shape: [usize; 2],
    ) -> Result<(&'t [E], usize), Error> {
        let (len, stride) = self.claims.matrix(name, tensor, E::KIND, shape, false)?;
        if len == 0 {
            return Ok((&[], stride));
        }
        // SAFETY: a defined CPU tensor of this dtype owns all elements that its strides reach for as
        // long as it is borrowed; `claim` saw no written argument among them.
        let elements = unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast(), len) };
        Ok((elements, stride))
    }

    /// As [`Operands::read_matrix`], to be written: where the matrix begins, and from one row to the
    /// next. What lies between its rows may belong to others.
    ///
    /// # Errors
    /// Any of the argument errors of [`Error`].
    pub fn write_matrix<E: Scalar>(
        &mut self,
        name: &'static str,
        tensor: &mut Tensor,
        shape: [usize; 2],
    ) -> Result<(*mut E, usize), Error> {
        let (_, stride) = self.claims.matrix(name, tensor, E::KIND, shape, true)?;
        Ok((tensor.data_ptr().cast(), stride))
    }
}

/// The elements of a contiguous CPU tensor, whatever its shape. While the slice lives, nothing may
/// write to them through another handle of the same memory.
///
/// # Errors
/// Any of the argument errors of [`Error`].
pub fn as_slice<E: Scalar>(tensor: &Tensor) -> Result<&[E], Error> {
    let shape = shape_of(tensor);
    Operands::new("as_slice").read("tensor", tensor, &shape)
}

/// The elements of a contiguous CPU tensor, whatever its shape, to be written. While the slice
/// lives, nothing may touch them through another handle of the same memory.
///
/// # Errors
/// Any of the argument errors of [`Error`].
pub fn as_mut_slice<E: Scalar>(tensor: &mut Tensor) -> Result<&mut [E], Error> {
    let shape = shape_of(tensor);
    Operands::new("as_mut_slice").write("tensor", tensor, &shape)
}

/// A tensor's own shape; empty for an undefined tensor, which later checks refuse.
pub(crate) fn shape_of(tensor: &Tensor) -> Vec<usize> {
    if !tensor.defined() {
        return Vec::new();
    }
    tensor
        .size()
        .into_iter()
        .map(|size| usize::try_from(size).unwrap_or(0))
        .collect()
}

/// Refuses a tensor of another shape.
///
/// # Errors
/// [`Error::Shape`].
pub fn check_shape(
    op: &'static str,
    name: &'static str,
    tensor: &Tensor,
    expected: &[usize],
) -> Result<(), Error> {
    let found = tensor.size();
    let same = found.len() == expected.len()
        && found
            .iter()
            .zip(expected)
            .all(|(&f, &e)| usize::try_from(f) == Ok(e));
    if same {
        return Ok(());
    }
    let expected = expected.iter().map(|&e| e as i64).collect();
    Err(Error::Shape {
        op,
        tensor: name,
        expected,
        found,
    })
}

/// The sizes of a tensor that must have `N` dimensions.
///
/// # Errors
/// [`Error::Shape`] for another number of dimensions.
pub fn sizes<const N: usize>(
    op: &'static str,
    name: &'static str,
    tensor: &Tensor,
) -> Result<[usize; N], Error> {
    let wrong = |found| Error::Shape {
        op,
        tensor: name,
        expected: vec![-1; N],
        found,
    };
    if !tensor.defined() {
        return Err(wrong(vec![]));
    }
    let found = tensor.size();
    let mut sizes = [0; N];
    if found.len() != N {
        return Err(wrong(found));
    }
    for (size, value) in sizes.iter_mut().zip(found) {
        *size = usize::try_from(value).unwrap_or(0);
    }
    Ok(sizes)
}

#[cfg(test)]
mod tests;
