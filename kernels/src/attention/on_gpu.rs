//! Attention on a GPU: libtorch's kernels, each where it is right and fastest.
//!
//! They make their outputs themselves, so each is copied to where it belongs: one pass over memory
//! beside the many that attention takes.

use tch::{Kind, Tensor};

use super::{Gradients, Inputs, Shape};
use crate::cuda::{self, Device, Gpu, Pointers, float};
use crate::error::torch;
use crate::shim::{Attention, AttentionKernel};
use crate::{Error, WorkspacePlan};

/// The kernel for heads of `d` elements in `kind`, `dense` or packed.
///
/// cuDNN is the fastest from Hopper on, and takes dense samples alone. Flash attention takes all
/// that is bf16 otherwise, and the memory-efficient kernels take the rest: fp32 and odd sizes.
fn kernel(
    kind: Kind,
    d: usize,
    dense: bool,
    device: &Device,
    deterministic: bool,
) -> AttentionKernel {
    if kind != Kind::BFloat16 || !d.is_multiple_of(8) || d > 256 {
        return AttentionKernel::Efficient;
    }
    if dense && d <= 128 && device.is_hopper_or_newer() && !deterministic {
        return AttentionKernel::Cudnn;
    }
    AttentionKernel::Flash
}

/// Names of the kernels for samples of one document each and for packed documents.
pub(super) fn names(kind: Kind, d: usize, device: &Device) -> [&'static str; 2] {
    let deterministic = cuda::is_deterministic();
    [true, false].map(|dense| kernel(kind, d, dense, device, deterministic).name())
}

/// Name of what libtorch's kernels allocate.
const TEMPORARIES: &str = "attention.temporaries";

/// Tokens of a document, as far as a plan can know: flash attention's backward pass pads each
/// document, in fp32.
const DOCUMENT: usize = 512;

/// Rows by which it pads one.
const PADDING: usize = 128;

/// Notes what libtorch's kernels allocate at once while they run, of which nothing stays. The
/// backward pass needs most: its results before they are copied to where they belong, a gradient of
/// the queries in fp32 (once; as often as the GPU has room for in a deterministic run), and with
/// grouped queries gradients of keys and values for every query head. fp32 goes to the
/// memory-efficient kernels, which keep a number per document, head and row of the longest
/// document: that follows the documents, and is counted as if all were as long as the longest.
/// cuDNN does not say what it needs and is taken to need what flash attention does.
pub(super) fn plan(
    workspace: &mut WorkspacePlan,
    kind: Kind,
    tokens: usize,
    [nq, nkv, d]: [usize; 3],
) {
    const FP32: usize = 4;
    let width = kind.elt_size_in_bytes();
    let (queries, keys) = (tokens * nq * d * width, tokens * nkv * d * width);
    let statistics = tokens * nq * FP32;
    let results = queries + 2 * keys;
    let every_head = if nq == nkv { 0 } else { 2 * queries };
    let bytes = if kind == Kind::BFloat16 && d.is_multiple_of(8) {
        let padded = tokens + tokens.div_ceil(DOCUMENT) * PADDING;
        let sums = padded * nq * (d.next_multiple_of(32) + 1) * FP32;
        results + every_head + sums
    } else {
        // The forward pass once more, keys and values for every head, and their gradients.
        let forward = queries + statistics + every_head;
        forward + results + every_head + statistics
    };
    workspace.take(TEMPORARIES, &[bytes], Kind::Uint8);
}

/// A call, in the layout that its documents ask for.
struct Call<'a> {
    op: &'static str,
    inputs: &'a Inputs<'a>,
    shape: Shape,
    kind: Kind,
    kernel: AttentionKernel,
    /// Whether samples are laid out one after the other, as one packed row of documents.
    packed: bool,
}

impl<'a> Call<'a> {
    fn new(
        op: &'static str,
        inputs: &'a Inputs<'a>,
        device: &Device,
        shape: Shape,
    ) -> Result<Self, Error> {
        let (kind, _) = float(op, "q", inputs.q)?;
        let deterministic = cuda::is_deterministic();
        // cuDNN refuses samples of one token.
        let dense = inputs.documents.is_whole() && inputs.documents.seq() > 1;
        let kernel = kernel(kind, shape.query[3], dense, device, deterministic);
        Ok(Call {
            op,
            inputs,
            shape,
            kind,
            kernel,
            packed: !inputs.documents.is_whole(),
        })
    }

    /// `[batch, seq, heads, d]` as the kernel takes it.
    fn laid_out(&self, tensor: &Tensor) -> Result<Tensor, Error> {
        if !self.packed {
            return Ok(tensor.shallow_clone());
        }
        let size = tensor.size();
        tensor
            .f_view([-1, size[2], size[3]])
            .map_err(torch(self.op))
    }

    /// Runs `f` on the inputs in the kernel's layout.
    fn with<R>(&self, f: impl FnOnce(&Attention<'_>) -> Result<R, Error>) -> Result<R, Error> {
        let q = self.laid_out(self.inputs.q)?;
        let k = self.laid_out(self.inputs.k)?;
        let v = self.laid_out(self.inputs.v)?;
        let starts = match (self.packed, self.inputs.starts) {
            (false, _) => None,
            (true, Some(starts)) => Some((starts, self.inputs.documents.longest())),
            (true, None) => {
                let message = "packed documents on a GPU need `starts`".to_owned();
                return Err(Error::Argument {
                    op: self.op,
                    message,
                });
            }
        };
        f(&Attention {
            q: &q,
            k: &k,
            v: &v,
            starts,
            scale: self.inputs.scale,
        })
    }

    /// Refuses arguments that do not go together, before libtorch sees any of them.
    fn check(&self, pointers: &mut Pointers) -> Result<(), Error> {
        let Inputs { q, k, v, .. } = self.inputs;
        pointers.read_view("q", q, self.kind, self.shape.query)?;
        pointers.read_view("k", k, self.kind, self.shape.key)?;
        pointers.read_view("v", v, self.kind, self.shape.key)?;
        if let Some(starts) = self.inputs.starts {
            let documents = self.inputs.documents.documents().len();
            pointers.read("starts", starts, Kind::Int, &[documents + 1])?;
        }
        Ok(())
    }

    /// Copies what a kernel made to where it belongs.
    fn put(&self, made: &Tensor, to: &mut Tensor) -> Result<(), Error> {
        made.f_view_as(to)
            .and_then(|made| to.f_copy_(&made))
            .map_err(torch(self.op))
    }

    /// The statistics of the forward pass in the kernel's layout: they lie in `lse: [batch, heads,
    /// seq]`, which has as many elements.
    fn statistics(&self, lse: &Tensor) -> Result<Tensor, Error> {
        let [batch, heads, seq] = self.shape.lse.map(|size| size as i64);
        let shape = match (self.kernel, self.packed) {
            (AttentionKernel::Cudnn, _) => vec![batch, heads, seq, 1],
            (_, true) => vec![heads, batch * seq],
            (_, false) => vec![batch, heads, seq],
        };
        lse.f_view(shape.as_slice()).map_err(torch(self.op))
    }
}

pub(super) fn forward(
    op: &'static str,
    device: &'static Device,
    inputs: &Inputs<'_>,
    shape: Shape,
    out: &mut Tensor,
    lse: &mut Tensor,
) -> Result<(), Error> {
    let call = Call::new(op, inputs, device, shape)?;
    let mut pointers = Pointers::new(op, &Gpu::Real(device));
    call.check(&mut pointers)?;
    pointers.read_view("out", out, call.kind, call.shape.query)?;
    pointers.write("lse", lse, Kind::Float, &call.shape.lse)?;
    let (made, statistics) = call.with(|attention| attention.forward(op, call.kernel))?;
    call.put(&made, out)?;
    if call.kernel == AttentionKernel::Efficient {
        // Its statistics are padded and have no place here: the backward pass makes them again.
        return Ok(());
    }
    let mut lse = call.statistics(lse)?;
    lse.f_copy_(&statistics).map_err(torch(op))
}

pub(super) fn backward(
    op: &'static str,
    device: &'static Device,
    inputs: &Inputs<'_>,
    shape: Shape,
    [out, lse, dout]: [&Tensor; 3],
    gradients: Gradients<'_>,
) -> Result<(), Error> {
    let call = Call::new(op, inputs, device, shape)?;
    let mut pointers = Pointers::new(op, &Gpu::Real(device));
    call.check(&mut pointers)?;
    pointers.read_view("out", out, call.kind, call.shape.query)?;
    pointers.read("lse", lse, Kind::Float, &call.shape.lse)?;
    pointers.read_view("dout", dout, call.kind, call.shape.query)?;
    let Gradients { dq, dk, dv } = gradients;
    pointers.read_view("dq", dq, call.kind, call.shape.query)?;
    pointers.read_view("dk", dk, call.kind, call.shape.key)?;
    pointers.read_view("dv", dv, call.kind, call.shape.key)?;
    let made = call.with(|attention| {
        let (out, lse) = match call.kernel {
            AttentionKernel::Efficient => attention.forward(op, call.kernel)?,
            _ => (call.laid_out(out)?, call.statistics(lse)?),
        };
        let dout = call.laid_out(dout)?;
        attention.backward(
            op,
            call.kernel,
            [&out, &lse, &dout],
            cuda::is_deterministic(),
        )
    })?;
    for (made, gradient) in made.iter().zip([dq, dk, dv]) {
        call.put(made, gradient)?;
    }
    Ok(())
}
