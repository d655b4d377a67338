//! What a kernel is called with: pointers to tensors that were checked, and plain numbers.

use std::ffi::c_void;

use tch::{Kind, Tensor};

use super::{Gpu, grid::GROUP};
use crate::Error;
use crate::sys::operands::{Claims, check_dtype};

/// The address of a tensor's first element, on whatever device; 0 where there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct Pointer(u64);

impl Pointer {
    /// Where a tensor may be left out.
    pub(crate) const NULL: Pointer = Pointer(0);

    /// The address of an element further on, within the same tensor.
    pub(crate) fn after<E>(self, elements: usize) -> Pointer {
        Pointer(self.0 + (elements * size_of::<E>()) as u64)
    }

    /// Whether 16 bytes can be read at once from here on.
    pub(crate) fn is_aligned(self) -> bool {
        self.0.is_multiple_of(16)
    }
}

/// Whether kernels may move the groups of rows of `width` elements at once, all rows dense and all
/// tensors given: as they take it, a number.
pub(crate) fn aligned<const N: usize>(width: usize, tensors: [Pointer; N]) -> i32 {
    let all = tensors.iter().all(|tensor| tensor.is_aligned());
    i32::from(all && width.is_multiple_of(GROUP))
}

/// A plain value that a kernel takes as it lies in memory.
///
/// # Safety
/// The type has no padding bytes that matter, and the kernel's parameter has its size and layout.
pub(crate) unsafe trait Plain: Copy {}

// SAFETY: one 64-bit number.
unsafe impl Plain for Pointer {}
/// Numbers, of the width that the kernels' types have.
macro_rules! plain {
    ($($number:ty),+) => {
        // SAFETY: plain numbers of the same width on both sides.
        $(unsafe impl Plain for $number {})+
    };
}
plain!(i32, u32, i64, u64, f32, f64);

/// One argument: where it lies and how long it is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Argument {
    pub(crate) at: *mut c_void,
    pub(crate) bytes: u32,
}

impl Argument {
    pub(crate) fn new<P: Plain>(value: &P) -> Self {
        Argument {
            at: std::ptr::from_ref(value).cast_mut().cast(),
            bytes: size_of::<P>() as u32,
        }
    }
}

/// The arguments of a launch; they live until the end of the statement.
macro_rules! arguments {
    ($($value:expr),+ $(,)?) => {
        &[$($crate::cuda::Argument::new(&$value)),+]
    };
}
pub(crate) use arguments;

/// The twin of [`Operands`](crate::sys::operands::Operands) for kernels: every tensor of a call
/// goes through the same checks, and what comes out is an address.
pub(crate) struct Pointers(Claims);

impl Pointers {
    /// Starts the check of a call to `op` on `gpu`.
    pub(crate) fn new(op: &'static str, gpu: &Gpu) -> Self {
        Pointers(Claims::new(op, gpu.device()))
    }

    /// A contiguous tensor of exactly this shape and dtype, to be read.
    pub(crate) fn read(
        &mut self,
        name: &'static str,
        tensor: &Tensor,
        kind: Kind,
        shape: &[usize],
    ) -> Result<Pointer, Error> {
        self.0.dense(name, tensor, kind, shape, false)?;
        Ok(address(tensor))
    }

    /// A contiguous tensor of exactly this shape and dtype, to be written.
    pub(crate) fn write(
        &mut self,
        name: &'static str,
        tensor: &mut Tensor,
        kind: Kind,
        shape: &[usize],
    ) -> Result<Pointer, Error> {
        self.0.dense(name, tensor, kind, shape, true)?;
        Ok(address(tensor))
    }

    /// As [`Pointers::read`], where it is given.
    pub(crate) fn read_optional(
        &mut self,
        name: &'static str,
        tensor: Option<&Tensor>,
        kind: Kind,
        shape: &[usize],
    ) -> Result<Pointer, Error> {
        tensor.map_or(Ok(Pointer::NULL), |tensor| {
            self.read(name, tensor, kind, shape)
        })
    }

    /// As [`Pointers::write`], where it is given.
    pub(crate) fn write_optional(
        &mut self,
        name: &'static str,
        tensor: Option<&mut Tensor>,
        kind: Kind,
        shape: &[usize],
    ) -> Result<Pointer, Error> {
        tensor.map_or(Ok(Pointer::NULL), |tensor| {
            self.write(name, tensor, kind, shape)
        })
    }

    /// A matrix whose rows may lie apart but are dense, to be read: its address, and elements from
    /// one row to the next.
    pub(crate) fn read_matrix(
        &mut self,
        name: &'static str,
        tensor: &Tensor,
        kind: Kind,
        shape: [usize; 2],
    ) -> Result<(Pointer, usize), Error> {
        let (_, stride) = self.0.matrix(name, tensor, kind, shape, false)?;
        Ok((address(tensor), stride))
    }

    /// As [`Pointers::read_matrix`], to be written.
    pub(crate) fn write_matrix(
        &mut self,
        name: &'static str,
        tensor: &mut Tensor,
        kind: Kind,
        shape: [usize; 2],
    ) -> Result<(Pointer, usize), Error> {
        let (_, stride) = self.0.matrix(name, tensor, kind, shape, true)?;
        Ok((address(tensor), stride))
    }

    /// A view `[batch, seq, heads, d]` whose heads are dense.
    pub(crate) fn read_view(
        &mut self,
        name: &'static str,
        tensor: &Tensor,
        kind: Kind,
        shape: [usize; 4],
    ) -> Result<(), Error> {
        self.0.view(name, tensor, kind, shape).map(drop)
    }

    /// A tensor `[rows, heads, dim]` whose rows may lie apart but are dense, to be written: its
    /// address, and elements from one row to the next.
    pub(crate) fn write_heads(
        &mut self,
        name: &'static str,
        tensor: &mut Tensor,
        kind: Kind,
        shape: [usize; 3],
    ) -> Result<(Pointer, usize), Error> {
        let (_, stride) = self.0.heads(name, tensor, kind, shape, true)?;
        Ok((address(tensor), stride))
    }
}

fn address(tensor: &Tensor) -> Pointer {
    Pointer(if tensor.numel() == 0 {
        0
    } else {
        tensor.data_ptr() as u64
    })
}

/// The dtype of a tensor that kernels compute with, and its name in theirs.
///
/// # Errors
/// [`Error::Unsupported`] for one that is neither fp32 nor bf16.
pub(crate) fn float(
    op: &'static str,
    name: &'static str,
    tensor: &Tensor,
) -> Result<(Kind, &'static str), Error> {
    match check_dtype(op, name, tensor)? {
        Kind::Float => Ok((Kind::Float, "f32")),
        Kind::BFloat16 => Ok((Kind::BFloat16, "bf16")),
        dtype => Err(Error::Unsupported {
            op,
            tensor: name,
            dtype,
        }),
    }
}
