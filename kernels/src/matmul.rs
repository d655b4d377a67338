//! Products of large matrices, cut into blocks for the caches and the threads, each block finished
//! by an epilogue while its sums are near.
//!
//! `C[rows × columns] = A[rows × k] · B[k × columns]`, operands in T (f32 or bf16), sums in fp32.
//! The three products of a linear layer with weights `W: [o, i]` are
//!
//! | product | A | B |
//! |---|---|---|
//! | `Y[n × o] = X · Wᵀ` | `Rows(X)` | `Turned(W)` |
//! | `dX[n × i] = dY · W` | `Rows(dY)` | `Rows(W)` |
//! | `dW[o × i] = dYᵀ · X` | `Turned(dY)` | `Rows(X)` |
//!
//! * **B** is packed in panels of sixteen columns ([`crate::microkernel`]), in blocks of k. That is
//!   a pass of its own, by [`pack`] where a weight serves several products, else by [`multiply`].
//!   If A has so few rows that each panel is used once, a task packs its own columns instead:
//!   reading B is then all the work there is.
//! * **A task** is a block of rows times a block of columns, over all of k: each element of C is one
//!   chain of sums in the order of k, whatever the blocks, so it has the same bits on any number of
//!   threads. Threads take tasks from one counter.
//! * **A** is read where it lies if the kernel can; else (transposed, or bf16 to be widened) the
//!   task packs it, block by block of k.
//! * **An epilogue** ([`Epilogue`]) gets finished sums in small pieces, from the nearest cache
//!   instead of from memory: it rounds and stores, adds to a gradient, rotates heads, or applies
//!   the activation. [`Columns`] tells which columns an epilogue needs side by side.
//!
//! On Zen 4, products of a few GFLOP reach 87–96% of the micro-kernel's speed in L2 on one thread
//! when B is packed (85–94% with its packing) in bf16, 88–97% in fp32.

use std::any::TypeId;
use std::ops::Range;

use crate::Error;
use crate::float::{Float, Operand};
use crate::microkernel::pack::Strided;
use crate::microkernel::{Dtype, Element, Kernel, Visitor};
use crate::simd::vector::Simd;

mod columns;
pub mod epilogue;
mod operands;
mod plan;
mod run;
mod target;

pub use columns::{Columns, Run};
pub use operands::Packed;
pub use target::Target;

const OP: &str = "matmul";

/// An operand in memory, as it is or transposed.
#[derive(Clone, Copy)]
pub enum Matrix<'a, T> {
    /// The rows in memory are the rows of the matrix.
    Rows(Strided<'a, T>),
    /// The rows in memory are its columns.
    Turned(Strided<'a, T>),
}

impl<T> Matrix<'_, T> {
    /// Rows of the matrix.
    pub fn rows(&self) -> usize {
        match self {
            Matrix::Rows(m) => m.n,
            Matrix::Turned(m) => m.d,
        }
    }

    /// Columns of the matrix.
    pub fn columns(&self) -> usize {
        match self {
            Matrix::Rows(m) => m.d,
            Matrix::Turned(m) => m.n,
        }
    }

    fn check(&self, name: &str) -> Result<(), Error> {
        let (Matrix::Rows(m) | Matrix::Turned(m)) = self;
        if m.n == 0 || m.d == 0 {
            return Ok(());
        }
        let needed = (m.n - 1)
            .checked_mul(m.stride)
            .and_then(|last| last.checked_add(m.d));
        match needed {
            Some(needed) if needed <= m.data.len() => Ok(()),
            _ => refuse(format!(
                "`{name}`: {} rows of {} numbers, {} apart, do not lie in {} numbers",
                m.n,
                m.d,
                m.stride,
                m.data.len()
            )),
        }
    }
}

/// B of a product.
#[derive(Clone, Copy)]
pub enum Right<'a, T> {
    /// In memory. Its columns are those of the description, in their order.
    Plain(Matrix<'a, T>, Columns),
    /// Packed before.
    Packed(Packed<'a, T>),
}

impl<T: Float> Right<'_, T> {
    /// Rows of B.
    pub fn k(&self) -> usize {
        match self {
            Right::Plain(matrix, _) => matrix.rows(),
            Right::Packed(packed) => packed.k(),
        }
    }

    /// Columns of B.
    pub fn columns(&self) -> Columns {
        match self {
            Right::Plain(_, columns) => *columns,
            Right::Packed(packed) => packed.columns(),
        }
    }
}

/// Sizes of a product, from which the length of its scratch follows.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Rows of A and C.
    pub rows: usize,
    /// Columns of A, rows of B.
    pub k: usize,
    /// Columns of B and C.
    pub columns: Columns,
    /// Whether B comes packed.
    pub packed: bool,
}

/// Part of a product: some rows, and some panels of sixteen columns.
#[derive(Debug)]
pub struct Block {
    /// Rows of C.
    pub rows: Range<usize>,
    /// Panels of C.
    pub panels: Range<usize>,
    /// How columns lie in panels.
    pub columns: Columns,
    /// From one row of the sums to the next.
    pub stride: usize,
}

impl Block {
    /// The block's columns in runs of neighbours, first to last.
    pub fn runs(&self) -> impl Iterator<Item = Run> {
        self.columns.runs(self.panels.clone())
    }
}

/// What is done with the sums of a product.
pub trait Epilogue: Sync {
    /// Takes a block of finished sums: row `r` of the block begins at `sums[r · stride]`, and where
    /// its columns lie in that row [`Block::runs`] tells. Every element of the product is in
    /// exactly one block. The sums may be overwritten.
    ///
    /// # Safety
    /// Blocks of calls that run at the same time do not overlap, and lie in the product that the
    /// epilogue was made for.
    unsafe fn finish<S: Simd>(&self, simd: S, block: &Block, sums: &mut [f32]);

    /// Called some time before a block is finished: asks for the lines that will be written, so
    /// that they are there by then.
    fn prefetch(&self, block: &Block);

    /// Refuses a product of other sizes than the epilogue was made for.
    ///
    /// # Errors
    /// [`Error::Argument`].
    fn check(&self, rows: usize, columns: Columns) -> Result<(), Error>;
}

/// fp32 numbers of the buffer that [`pack`] needs for B of `k` rows, at the calling thread's level.
pub fn packed_len<T: Dtype>(k: usize, columns: Columns) -> usize {
    struct Len(usize, Columns);
    impl<T> Visitor<T> for Len {
        type Out = usize;
        fn visit<K: Kernel>(self, _: K) -> usize
        where
            T: Operand<K::Element>,
        {
            operands::buffer_len::<K::Element>(self.0, self.1)
        }
    }
    T::with_kernel(Len(k, columns))
}

/// Packs B into `buffer`, which is as long as [`packed_len`] says.
///
/// # Errors
/// [`Error::Argument`] if sizes do not fit.
pub fn pack<'a, T: Dtype>(
    b: Matrix<'_, T>,
    columns: Columns,
    buffer: &'a mut [f32],
) -> Result<Packed<'a, T>, Error> {
    struct Pack<'b, 'm, T>(Matrix<'m, T>, Columns, &'b mut [f32]);
    impl<T: Float> Visitor<T> for Pack<'_, '_, T> {
        type Out = Result<(), Error>;
        fn visit<K: Kernel>(self, kernel: K) -> Result<(), Error>
        where
            T: Operand<K::Element>,
        {
            operands::pack(kernel, self.0, self.1, self.2)
        }
    }
    let k = b.rows();
    T::with_kernel(Pack(b, columns, &mut *buffer))?;
    Ok(Packed::new(buffer, k, columns))
}

/// fp32 numbers of scratch that [`multiply`] needs, with the calling thread's thread count and
/// level.
pub fn scratch_len<T: Dtype>(shape: Shape) -> usize {
    struct Len(Shape);
    impl<T: 'static> Visitor<T> for Len {
        type Out = usize;
        fn visit<K: Kernel>(self, _: K) -> usize
        where
            T: Operand<K::Element>,
        {
            run::plan::<K>(self.0, None).len
        }
    }
    T::with_kernel(Len(shape))
}

/// `A · B`, every block of it handed to the epilogue. `scratch` is as long as [`scratch_len`] says;
/// its contents do not matter. Same bits on any number of threads.
///
/// # Errors
/// [`Error::Argument`] if sizes do not fit.
pub fn multiply<T: Dtype, E: Epilogue>(
    a: Matrix<'_, T>,
    b: Right<'_, T>,
    epilogue: &E,
    scratch: &mut [f32],
) -> Result<(), Error> {
    struct Multiply<'m, 's, T, E>(Matrix<'m, T>, Right<'m, T>, &'s E, &'s mut [f32]);
    impl<T: Float, E: Epilogue> Visitor<T> for Multiply<'_, '_, T, E> {
        type Out = Result<(), Error>;
        fn visit<K: Kernel>(self, kernel: K) -> Result<(), Error>
        where
            T: Operand<K::Element>,
        {
            run::run(kernel, self.0, self.1, self.2, self.3)
        }
    }
    T::with_kernel(Multiply(a, b, epilogue, scratch))
}

/// The same numbers as elements of products, if T is that type.
#[inline(always)]
fn as_elements<T: 'static, E: Element>(data: &[T]) -> Option<&[E]> {
    // SAFETY: the types are the same.
    (TypeId::of::<T>() == TypeId::of::<E>())
        .then(|| unsafe { std::slice::from_raw_parts(data.as_ptr().cast(), data.len()) })
}

fn refuse<R>(message: String) -> Result<R, Error> {
    Err(Error::Argument { op: OP, message })
}

#[cfg(test)]
mod tests;
