//! Causal attention within documents, with grouped queries (query head `h` reads key-value head
//! `h / (nq / nkv)`).
//!
//! Here are tensors, their checks and the reference; the kernel is [`flash`], on slices. Cost
//! follows `Σ len²` over documents, memory is linear in the number of tokens, keys and values are
//! not expanded to the query heads, and results have the same bits on any number of threads.

use tch::{Device, Kind, Tensor};

use crate::cuda::{self, Gpu};
use crate::error::torch;
use crate::float::with_float;
use crate::microkernel::Dtype;
use crate::sys::operands::{Operands, as_mut_slice, sizes};
use crate::{DocumentStarts, Error, Workspace, WorkspacePlan};
use flash::{Heads, HeadsMut, Passes};

pub mod flash;
mod on_gpu;

/// Name of a buffer.
const SCRATCH: &str = "attention";

const FORWARD: &str = "attention.forward";
const BACKWARD: &str = "attention.backward";

/// What attention reads. Views into one fused qkv buffer are welcome: only the elements of a head
/// must be adjacent.
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    /// Queries `[batch, seq, nq, d]` in T (fp32 or bf16).
    pub q: &'a Tensor,
    /// Keys `[batch, seq, nkv, d]` in T; `nkv` divides `nq`.
    pub k: &'a Tensor,
    /// Values, as the keys.
    pub v: &'a Tensor,
    /// Where documents begin; its batch and length are those of the tensors.
    pub documents: &'a DocumentStarts,
    /// [`DocumentStarts::cumulative`] on the device, `[documents + 1]` int32: where a GPU computes on
    /// samples of several documents.
    pub starts: Option<&'a Tensor>,
    /// Factor of the scores, usually `1 / √d`.
    pub scale: f64,
}

/// Gradients of the inputs, all written, in the shapes and dtype of the inputs; views into one
/// fused buffer are welcome.
pub struct Gradients<'a> {
    /// Gradient of the queries.
    pub dq: &'a mut Tensor,
    /// Gradient of the keys.
    pub dk: &'a mut Tensor,
    /// Gradient of the values.
    pub dv: &'a mut Tensor,
}

/// Sizes that the arguments agree on.
struct Shape {
    query: [usize; 4],
    key: [usize; 4],
    lse: [usize; 3],
}

impl Inputs<'_> {
    fn shape(&self, op: &'static str) -> Result<Shape, Error> {
        let query @ [batch, seq, heads, d] = sizes(op, "q", self.q)?;
        let [_, _, kv_heads, _] = sizes(op, "k", self.k)?;
        Ok(Shape {
            query,
            key: [batch, seq, kv_heads, d],
            lse: [batch, heads, seq],
        })
    }

    fn heads<'t, T: Dtype>(
        &'t self,
        operands: &mut Operands,
        shape: &Shape,
    ) -> Result<flash::Inputs<'t, T>, Error> {
        Ok(flash::Inputs {
            q: heads(operands, "q", self.q, shape.query)?,
            k: heads(operands, "k", self.k, shape.key)?,
            v: heads(operands, "v", self.v, shape.key)?,
            documents: self.documents,
            scale: self.scale as f32,
        })
    }
}

fn heads<'t, T: Dtype>(
    operands: &mut Operands,
    name: &'static str,
    tensor: &'t Tensor,
    shape: [usize; 4],
) -> Result<Heads<'t, T>, Error> {
    let (elements, strides) = operands.read_view::<T>(name, tensor, shape)?;
    Heads::new(elements, shape, strides)
}

/// The kernel's scratch for `tokens` tokens, enough for both passes.
fn scratch<T: Dtype>(
    workspace: &mut Workspace,
    [batch, seq, nq, d]: [usize; 4],
    nkv: usize,
) -> Result<Tensor, Error> {
    let len = flash::scratch_len::<T>(batch * seq, [nq, nkv, d], Passes::Both)?;
    workspace.take(SCRATCH, &[len], Kind::Float)
}

/// Names of the kernels of libtorch that GPU number `ordinal` computes attention with, heads of `d`
/// elements in `kind`: for samples of one document each, and for packed documents. They follow
/// [`Numerics`](crate::cuda::Numerics).
///
/// # Errors
/// [`Error::Cuda`] where there is no such GPU.
pub fn gpu_kernels(kind: Kind, d: usize, ordinal: usize) -> Result<[&'static str; 2], Error> {
    Ok(on_gpu::names(kind, d, cuda::Device::get(ordinal)?))
}

/// What [`forward`] and [`backward`] take from the workspace for `tokens` tokens of `kind`, in
/// whatever samples and documents, and heads `[nq, nkv, d]`, with the calling thread's thread count.
/// On a GPU it is what libtorch's kernels allocate while they run, for documents of 512 tokens on
/// average.
///
/// # Errors
/// The argument errors of [`Error`].
pub fn plan(
    workspace: &mut WorkspacePlan,
    kind: Kind,
    tokens: usize,
    heads: [usize; 3],
) -> Result<(), Error> {
    if workspace.device() != Device::Cpu {
        on_gpu::plan(workspace, kind, tokens, heads);
        return Ok(());
    }
    let len = match kind {
        Kind::BFloat16 => flash::scratch_len::<half::bf16>(tokens, heads, Passes::Both)?,
        _ => flash::scratch_len::<f32>(tokens, heads, Passes::Both)?,
    };
    workspace.take(SCRATCH, &[len], Kind::Float);
    Ok(())
}

/// `out: [batch, seq, nq, d]` in T (written) and `lse: [batch, nq, seq]` fp32 (written; the
/// logarithm of the softmax denominators, for the backward pass). Same bits on any number of threads.
///
/// # Errors
/// The argument errors of [`Error`].
pub fn forward(
    inputs: &Inputs<'_>,
    out: &mut Tensor,
    lse: &mut Tensor,
    workspace: &mut Workspace,
) -> Result<(), Error> {
    let shape = inputs.shape(FORWARD)?;
    if let Some(Gpu::Real(device)) = cuda::of(FORWARD, "q", inputs.q)? {
        return on_gpu::forward(FORWARD, device, inputs, shape, out, lse);
    }
    with_float!(FORWARD, "q", inputs.q => T: {
        let mut operands = Operands::new(FORWARD);
        let heads = inputs.heads::<T>(&mut operands, &shape)?;
        let lse = operands.write::<f32>("lse", lse, &shape.lse)?;
        let [(at, strides)] = operands.write_views([("out", out, shape.query)])?;
        // SAFETY: `write_views` found the view's elements in a tensor that is borrowed uniquely.
        let mut out = unsafe { HeadsMut::<T>::from_raw(at, shape.query, strides)? };
        let mut scratch = scratch::<T>(workspace, shape.query, shape.key[2])?;
        flash::forward(&heads, &mut out, lse, as_mut_slice(&mut scratch)?)
    })
}

/// Gradients of [`forward`], given its outputs and `dout: [batch, seq, nq, d]` in T. Same bits on any
/// number of threads.
///
/// # Errors
/// The argument errors of [`Error`].
pub fn backward(
    inputs: &Inputs<'_>,
    out: &Tensor,
    lse: &Tensor,
    dout: &Tensor,
    gradients: Gradients<'_>,
    workspace: &mut Workspace,
) -> Result<(), Error> {
    let shape = inputs.shape(BACKWARD)?;
    if let Some(Gpu::Real(device)) = cuda::of(BACKWARD, "q", inputs.q)? {
        return on_gpu::backward(BACKWARD, device, inputs, shape, [out, lse, dout], gradients);
    }
    with_float!(BACKWARD, "q", inputs.q => T: {
        let mut operands = Operands::new(BACKWARD);
        let arguments = inputs.heads::<T>(&mut operands, &shape)?;
        let out = heads::<T>(&mut operands, "out", out, shape.query)?;
        let lse = operands.read::<f32>("lse", lse, &shape.lse)?;
        let dout = heads::<T>(&mut operands, "dout", dout, shape.query)?;
        let Gradients { dq, dk, dv } = gradients;
        let shapes = [shape.query, shape.key, shape.key];
        let [q, k, v] = operands.write_views([
            ("dq", dq, shapes[0]),
            ("dk", dk, shapes[1]),
            ("dv", dv, shapes[2]),
        ])?;
        // SAFETY: `write_views` found the elements of each view in a tensor that is borrowed
        // uniquely, and none that two views have in common.
        let mut gradients = unsafe {
            flash::Gradients {
                dq: HeadsMut::<T>::from_raw(q.0, shapes[0], q.1)?,
                dk: HeadsMut::<T>::from_raw(k.0, shapes[1], k.1)?,
                dv: HeadsMut::<T>::from_raw(v.0, shapes[2], v.1)?,
            }
        };
        let mut scratch = scratch::<T>(workspace, shape.query, shape.key[2])?;
        let scratch = as_mut_slice(&mut scratch)?;
        flash::backward(&arguments, &out, lse, &dout, &mut gradients, scratch)
    })
}

/// The same function as a composition of libtorch ops with a dense mask, for autograd to
/// differentiate: returns `[batch, seq, nq, d]`.
///
/// # Errors
/// [`Error::Torch`].
pub fn reference(inputs: &Inputs<'_>) -> Result<Tensor, Error> {
    let Inputs {
        q,
        k,
        v,
        documents,
        scale,
        ..
    } = *inputs;
    let document_of: Vec<i64> = documents
        .documents()
        .iter()
        .enumerate()
        .flat_map(|(index, (_, tokens))| tokens.clone().map(move |_| index as i64))
        .collect();
    let compose = || {
        let (batch, seq) = (documents.batch() as i64, documents.seq() as i64);
        let groups = q.size()[2] / k.size()[2];
        let spread = |t: &Tensor| {
            t.f_repeat_interleave_self_int(groups, 2, None)?
                .f_transpose(1, 2)
        };
        let scores = q
            .f_transpose(1, 2)?
            .f_matmul(&spread(k)?.f_transpose(2, 3)?)?;
        let ids = Tensor::f_from_slice(&document_of)?
            .f_to_device(q.device())?
            .f_view([batch, seq])?;
        let same = ids.f_unsqueeze(2)?.f_eq_tensor(&ids.f_unsqueeze(1)?)?;
        let allowed = same.f_tril(0)?.f_unsqueeze(1)?;
        scores
            .f_mul_scalar(scale)?
            .f_masked_fill(&allowed.f_logical_not()?, f64::NEG_INFINITY)?
            .f_softmax(-1, q.f_kind()?)?
            .f_matmul(&spread(v)?)?
            .f_transpose(1, 2)
    };
    compose().map_err(torch("attention.reference"))
}

#[cfg(test)]
mod tests;
