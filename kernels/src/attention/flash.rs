//! Causal attention within documents, with grouped queries (query head `h` reads key-value head
//! `h / (nq / nkv)`).
//!
//! The method is flash attention (Dao et al. 2022; backward as in Dao 2023): scores exist only for
//! one block of queries and keys at a time, the forward pass keeps a running maximum and sum, the
//! backward pass computes probabilities again from the log-sum-exp. Memory beside the arguments is
//! linear in the number of tokens.
//!
//! * **Documents.** Each document is attended to on its own: blocks start at its first token, so no
//!   block lies outside it, the only mask is the diagonal's, and a document gives the same bits
//!   wherever it lies in a sample. Cost follows `Σ len²`.
//! * **Products** are those of [`crate::microkernel`]: bf16 operands with fp32 sums where the
//!   processor multiplies bf16, fp32 otherwise. Probabilities and their gradients are rounded to
//!   the operand's dtype before they are multiplied, as on every accelerator. Softmax is fp32, with
//!   2ˣ by range reduction (relative error 3e-6).
//! * **Threads** take tasks from one counter, in an order that starts with the heavy ones of a
//!   document; a triangle is therefore balanced without arithmetic on its area, also when another
//!   process takes a core for a while. Each task is computed alike whoever takes it, and sums that
//!   several tasks add to are added to in a fixed order, so results have the same bits on any
//!   number of threads. (They do depend on the level and on the sizes of the caches, from which
//!   the blocks follow.)
//! * **Range.** Scores must be finite in fp32. Probabilities below 2⁻¹⁰⁰ are zero.
//!   The backward pass knows a probability only as well as fp32 knows the log-sum-exp: to 6e-8 times
//!   its size.

use std::marker::PhantomData;

use crate::float::Operand;
use crate::microkernel::pack::{Strided, StridedMut};
use crate::microkernel::{Dtype, Kernel, Visitor};
use crate::sys::caches::Caches;
use crate::sys::operands::reach;
use crate::{DocumentStarts, Error, Float};

mod backward;
mod forward;
mod plan;
mod tasks;

pub use plan::Passes;

const FORWARD: &str = "attention.forward";
const BACKWARD: &str = "attention.backward";

/// Largest head dimension.
pub const MOST_DIM: usize = 256;

/// A view `[batch, seq, heads, d]` whose heads are dense, to be read.
#[derive(Clone, Copy, Debug)]
pub struct Heads<'a, T> {
    data: &'a [T],
    shape: [usize; 4],
    strides: [usize; 3],
}

impl<'a, T: Float> Heads<'a, T> {
    /// `strides` are those of sample, token and head, in elements of `data`, which begins with the
    /// view's first element.
    ///
    /// # Errors
    /// [`Error::Argument`] if the view reaches past `data`.
    pub fn new(data: &'a [T], shape: [usize; 4], strides: [usize; 3]) -> Result<Self, Error> {
        check_reach("heads", shape, strides, data.len())?;
        Ok(Heads {
            data,
            shape,
            strides,
        })
    }

    /// A view of adjacent elements.
    ///
    /// # Errors
    /// As [`Heads::new`].
    pub fn dense(data: &'a [T], shape: [usize; 4]) -> Result<Self, Error> {
        Heads::new(data, shape, dense_strides(shape))
    }

    /// Tokens `first..first + n` of one head.
    #[inline(always)]
    fn rows(&self, sample: usize, first: usize, n: usize, head: usize) -> Strided<'a, T> {
        let [batch, token, per_head] = self.strides;
        Strided {
            data: &self.data[sample * batch + first * token + head * per_head..],
            stride: token,
            n,
            d: self.shape[3],
        }
    }
}

/// A view `[batch, seq, heads, d]` whose heads are dense, to be written. Elements between the
/// heads are not touched, so that several views may interleave in one buffer.
#[derive(Debug)]
pub struct HeadsMut<'a, T> {
    data: *mut T,
    shape: [usize; 4],
    strides: [usize; 3],
    owner: PhantomData<&'a mut [T]>,
}

// SAFETY: stands for unique borrows of the heads; `rows` hands them out disjoint.
unsafe impl<T: Send> Sync for HeadsMut<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for HeadsMut<'_, T> {}

impl<'a, T: Float> HeadsMut<'a, T> {
    /// As [`Heads::new`]; no two heads may overlap.
    ///
    /// # Errors
    /// [`Error::Argument`] if the view reaches past `data` or heads overlap.
    pub fn new(data: &'a mut [T], shape: [usize; 4], strides: [usize; 3]) -> Result<Self, Error> {
        check_reach("heads", shape, strides, data.len())?;
        // SAFETY: the borrow is unique and the view lies inside.
        unsafe { HeadsMut::from_raw(data.as_mut_ptr(), shape, strides) }
    }

    /// A view of adjacent elements.
    ///
    /// # Errors
    /// As [`HeadsMut::new`].
    pub fn dense(data: &'a mut [T], shape: [usize; 4]) -> Result<Self, Error> {
        HeadsMut::new(data, shape, dense_strides(shape))
    }

    /// A view of memory that other views share, for instance of dk beside dq in one fused buffer.
    ///
    /// # Safety
    /// For `'a`, every head of the view is valid for writing and no one else uses it.
    ///
    /// # Errors
    /// [`Error::Argument`] if heads of the view overlap.
    pub unsafe fn from_raw(
        data: *mut T,
        shape: [usize; 4],
        strides: [usize; 3],
    ) -> Result<Self, Error> {
        check_disjoint(shape, strides)?;
        Ok(HeadsMut {
            data,
            shape,
            strides,
            owner: PhantomData,
        })
    }

    /// Tokens `first..first + n` of one head.
    ///
    /// # Safety
    /// They exist, and nothing else uses them while the result lives.
    #[inline(always)]
    unsafe fn rows(&self, sample: usize, first: usize, n: usize, head: usize) -> StridedMut<'a, T> {
        let [batch, token, per_head] = self.strides;
        // SAFETY: the caller's promise, for rows that the view's maker has promised.
        unsafe {
            let data = self
                .data
                .add(sample * batch + first * token + head * per_head);
            StridedMut::from_raw(data, token, n, self.shape[3])
        }
    }
}

fn dense_strides([_, seq, heads, d]: [usize; 4]) -> [usize; 3] {
    [seq * heads * d, heads * d, d]
}

fn check_reach(
    op: &'static str,
    shape: [usize; 4],
    strides: [usize; 3],
    len: usize,
) -> Result<(), Error> {
    let reach = reach(shape, strides);
    if reach <= len {
        return Ok(());
    }
    let message = format!(
        "a view of shape {shape:?} with strides {strides:?} needs {reach} elements, found {len}"
    );
    Err(Error::Argument { op, message })
}

/// Refuses strides by which two heads share elements: from the smallest stride to the greatest,
/// each must step over all that the ones before it reach.
fn check_disjoint(shape: [usize; 4], strides: [usize; 3]) -> Result<(), Error> {
    if shape.contains(&0) {
        return Ok(());
    }
    let mut steps = [0, 1, 2].map(|axis| (strides[axis], shape[axis]));
    steps.sort_unstable();
    let mut covered = shape[3];
    for (stride, size) in steps {
        if size > 1 && stride < covered {
            let message = format!("heads overlap: shape {shape:?} with strides {strides:?}");
            return Err(Error::Argument {
                op: "heads",
                message,
            });
        }
        if size > 1 {
            covered += (size - 1) * stride;
        }
    }
    Ok(())
}

/// What attention reads.
#[derive(Clone, Copy)]
pub struct Inputs<'a, T> {
    /// Queries `[batch, seq, nq, d]`.
    pub q: Heads<'a, T>,
    /// Keys `[batch, seq, nkv, d]`; `nkv` divides `nq`.
    pub k: Heads<'a, T>,
    /// Values, as the keys.
    pub v: Heads<'a, T>,
    /// Where documents begin; its batch and length are those of the views.
    pub documents: &'a DocumentStarts,
    /// Factor of the scores, positive, usually `1 / √d`.
    pub scale: f32,
}

/// Gradients of the inputs, all written, in their shapes.
pub struct Gradients<'a, T> {
    /// Gradient of the queries.
    pub dq: HeadsMut<'a, T>,
    /// Gradient of the keys.
    pub dk: HeadsMut<'a, T>,
    /// Gradient of the values.
    pub dv: HeadsMut<'a, T>,
}

/// Sizes that the arguments agree on.
#[derive(Clone, Copy, Debug)]
struct Shape {
    batch: usize,
    seq: usize,
    nq: usize,
    nkv: usize,
    d: usize,
}

impl Shape {
    /// Query heads that share a key-value head.
    fn group(&self) -> usize {
        self.nq / self.nkv
    }

    fn query(&self) -> [usize; 4] {
        [self.batch, self.seq, self.nq, self.d]
    }

    fn key(&self) -> [usize; 4] {
        [self.batch, self.seq, self.nkv, self.d]
    }

    fn new(
        op: &'static str,
        [batch, seq]: [usize; 2],
        [nq, nkv, d]: [usize; 3],
    ) -> Result<Shape, Error> {
        let refuse = |message| Err(Error::Argument { op, message });
        if nkv == 0 || nq == 0 || !nq.is_multiple_of(nkv) {
            return refuse(format!(
                "{nq} query heads cannot share {nkv} key-value heads"
            ));
        }
        if d == 0 || d > MOST_DIM {
            return refuse(format!(
                "the head dimension must be in 1..={MOST_DIM}, found {d}"
            ));
        }
        Ok(Shape {
            batch,
            seq,
            nq,
            nkv,
            d,
        })
    }
}

impl<T: Float> Inputs<'_, T> {
    fn check(&self, op: &'static str) -> Result<Shape, Error> {
        let [batch, seq, nq, d] = self.q.shape;
        let sizes = [self.documents.batch(), self.documents.seq()];
        let shape = Shape::new(op, sizes, [nq, self.k.shape[2], d])?;
        let refuse = |message| Err(Error::Argument { op, message });
        if (shape.batch, shape.seq) != (batch, seq) {
            return refuse(format!(
                "the documents describe [{}, {}] tokens, but `q` holds [{batch}, {seq}]",
                shape.batch, shape.seq
            ));
        }
        check_shape(op, "k", self.k.shape, shape.key())?;
        check_shape(op, "v", self.v.shape, shape.key())?;
        if !(self.scale > 0.0 && self.scale.is_finite()) {
            return refuse(format!("the scale must be positive, found {}", self.scale));
        }
        Ok(shape)
    }
}

fn check_shape(
    op: &'static str,
    name: &str,
    found: [usize; 4],
    expected: [usize; 4],
) -> Result<(), Error> {
    if found == expected {
        return Ok(());
    }
    let message = format!("`{name}` must have shape {expected:?}, found {found:?}");
    Err(Error::Argument { op, message })
}

fn check_len(op: &'static str, name: &str, found: usize, expected: usize) -> Result<(), Error> {
    if found >= expected {
        return Ok(());
    }
    let message = format!("`{name}` must hold {expected} numbers, found {found}");
    Err(Error::Argument { op, message })
}

/// fp32 numbers of scratch that [`forward`] and [`backward`] need for so many tokens, in whatever
/// samples and documents, for heads `[nq, nkv, d]` and passes, with the calling thread's thread
/// count and level.
///
/// # Errors
/// The argument errors of [`Error`].
pub fn scratch_len<T: Dtype>(
    tokens: usize,
    heads: [usize; 3],
    passes: Passes,
) -> Result<usize, Error> {
    struct Len(Shape, Passes);
    impl<T> Visitor<T> for Len {
        type Out = usize;
        fn visit<K: Kernel>(self, _: K) -> usize
        where
            T: Operand<K::Element>,
        {
            let Len(shape, passes) = self;
            let threads = crate::sys::parallel::threads();
            let caches = Caches::of_this_machine();
            let forward = plan::Forward::<K::Element>::new(shape, threads, caches);
            match passes {
                Passes::Forward => forward.len,
                Passes::Both => {
                    let backward = plan::Backward::<K::Element>::new(shape, threads, caches);
                    forward.len.max(backward.len)
                }
            }
        }
    }
    let shape = Shape::new("attention.scratch_len", [1, tokens], heads)?;
    Ok(T::with_kernel(Len(shape, passes)))
}

/// `out: [batch, seq, nq, d]` in T (written) and `lse: [batch, nq, seq]` fp32 (written; the
/// logarithm of the softmax denominators, for the backward pass). `scratch` is as long as
/// [`scratch_len`] says; its contents do not matter.
///
/// # Errors
/// The argument errors of [`Error`].
pub fn forward<T: Dtype>(
    inputs: &Inputs<'_, T>,
    out: &mut HeadsMut<'_, T>,
    lse: &mut [f32],
    scratch: &mut [f32],
) -> Result<(), Error> {
    struct Run<'a, 'i, 'o, T>(
        Shape,
        &'a Inputs<'i, T>,
        &'a mut HeadsMut<'o, T>,
        &'a mut [f32],
        &'a mut [f32],
    );
    impl<T: Float> Visitor<T> for Run<'_, '_, '_, T> {
        type Out = Result<(), Error>;
        fn visit<K: Kernel>(self, kernel: K) -> Result<(), Error>
        where
            T: Operand<K::Element>,
        {
            let Run(shape, inputs, out, lse, scratch) = self;
            forward::run(kernel, shape, inputs, out, lse, scratch)
        }
    }
    let shape = inputs.check(FORWARD)?;
    check_shape(FORWARD, "out", out.shape, shape.query())?;
    check_len(
        FORWARD,
        "lse",
        lse.len(),
        shape.batch * shape.nq * shape.seq,
    )?;
    T::with_kernel(Run(shape, inputs, out, lse, scratch))
}

/// Gradients of [`forward`], given its outputs and `dout: [batch, seq, nq, d]`. `scratch` is as
/// long as [`scratch_len`] says; its contents do not matter.
///
/// # Errors
/// The argument errors of [`Error`].
pub fn backward<T: Dtype>(
    inputs: &Inputs<'_, T>,
    out: &Heads<'_, T>,
    lse: &[f32],
    dout: &Heads<'_, T>,
    gradients: &mut Gradients<'_, T>,
    scratch: &mut [f32],
) -> Result<(), Error> {
    struct Run<'a, 'g, T>(
        Shape,
        backward::Arguments<'a, T>,
        &'a mut Gradients<'g, T>,
        &'a mut [f32],
    );
    impl<T: Float> Visitor<T> for Run<'_, '_, T> {
        type Out = Result<(), Error>;
        fn visit<K: Kernel>(self, kernel: K) -> Result<(), Error>
        where
            T: Operand<K::Element>,
        {
            let Run(shape, arguments, gradients, scratch) = self;
            backward::run(kernel, shape, arguments, gradients, scratch)
        }
    }
    let shape = inputs.check(BACKWARD)?;
    check_shape(BACKWARD, "out", out.shape, shape.query())?;
    check_shape(BACKWARD, "dout", dout.shape, shape.query())?;
    check_len(
        BACKWARD,
        "lse",
        lse.len(),
        shape.batch * shape.nq * shape.seq,
    )?;
    check_shape(BACKWARD, "dq", gradients.dq.shape, shape.query())?;
    check_shape(BACKWARD, "dk", gradients.dk.shape, shape.key())?;
    check_shape(BACKWARD, "dv", gradients.dv.shape, shape.key())?;
    let arguments = backward::Arguments {
        inputs,
        out,
        lse,
        dout,
    };
    T::with_kernel(Run(shape, arguments, gradients, scratch))
}

#[cfg(test)]
mod tests;
