//! The language model's head and loss in one op, chunk by chunk of tokens.
//!
//! Logits of a whole batch would be the largest tensor of a training step. Here a chunk's logits
//! (in the compute dtype) are turned into their own gradient where they lie and used up before the
//! next chunk begins, so memory is bounded by `chunk · vocab` and no fp32 copy of bf16 logits ever
//! exists.
//!
//! The loss of a token is `log Σ exp(logits) − logits[target]`, in fp32; rows of the head at or
//! past `vocab_size` are padding and take no part. Gradients are those of the (weighted) **sum**
//! of token losses: the caller divides by the number of valid targets of the whole global batch.

use tch::{Device, Kind, Tensor};

use crate::error::torch;
use crate::float::with_float;
use crate::linear::{self, PackedWeight};
use crate::sys::operands::{Operands, check_dtype, sizes};
use crate::{Error, Workspace, WorkspacePlan, cuda};
use softmax::Tokens;

mod on_gpu;
mod softmax;

const OP: &str = "linear_cross_entropy";

/// Names of buffers.
const LOSSES: &str = "linear_cross_entropy.losses";
const LOGITS: &str = "linear_cross_entropy.logits";

/// A target that is not to be predicted.
pub const IGNORE: i64 = -100;

/// Tokens per chunk that cost little speed: smaller chunks read the head and its gradient more
/// often (1.2 times the time at 512, 1.5 at 256).
const CHUNK_ON_CPU: usize = 1024;

/// The same for a GPU, where each chunk also adds to the head's whole gradient in memory.
const CHUNK_ON_GPU: usize = 8192;

/// Tokens per chunk that cost little speed on `device`.
pub fn default_chunk(device: Device) -> usize {
    match device {
        Device::Cpu => CHUNK_ON_CPU,
        _ => CHUNK_ON_GPU,
    }
}

/// What the op reads.
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    /// Hidden states `[n, h]` in T (fp32 or bf16), rows may lie apart.
    pub x: &'a Tensor,
    /// The head `[v, h]` in T.
    pub w: &'a Tensor,
    /// Targets `[n]` int64: a token below `vocab_size`, or [`IGNORE`].
    pub targets: &'a Tensor,
    /// A factor per token `[n]` fp32, where wanted.
    pub weights: Option<&'a Tensor>,
    /// Rows of `w` that are real tokens; the rest is padding.
    pub vocab_size: usize,
    /// Tokens per chunk, at least 1.
    pub chunk: usize,
}

/// Where the losses go.
pub struct Losses<'a> {
    /// `[1]` fp64, **added to**: the sum of weighted token losses. Summed token by token in order.
    pub sum: &'a mut Tensor,
    /// `[n]` fp32, written where wanted: weighted loss per token, 0 where ignored.
    pub per_token: Option<&'a mut Tensor>,
}

/// Where the gradients go. Both may be absent (a frozen model that is only evaluated).
#[derive(Default)]
pub struct Gradients<'a> {
    /// `[n, h]` in T, written.
    pub dx: Option<&'a mut Tensor>,
    /// `[v, h]` fp32, **added to**.
    pub dw: Option<&'a mut Tensor>,
}

/// The loss alone.
///
/// # Errors
/// As [`forward_backward`].
pub fn forward(
    inputs: &Inputs<'_>,
    losses: Losses<'_>,
    workspace: &mut Workspace,
) -> Result<(), Error> {
    run(inputs, losses, None, workspace)
}

/// The loss and its gradients in one pass over the chunks.
///
/// # Errors
/// The argument errors of [`Error`]; [`Error::Index`] for a target outside the vocabulary, whose loss
/// and gradient on a GPU are NaN instead.
pub fn forward_backward(
    inputs: &Inputs<'_>,
    losses: Losses<'_>,
    gradients: Gradients<'_>,
    workspace: &mut Workspace,
) -> Result<(), Error> {
    run(inputs, losses, Some(gradients), workspace)
}

/// Plain logits `out: [n, v] = x·wᵀ` (for generation); [`linear::forward`] under the name that a
/// reader looks for.
///
/// # Errors
/// The argument errors of [`Error`].
pub fn logits(
    x: &Tensor,
    w: &Tensor,
    out: &mut Tensor,
    workspace: &mut Workspace,
) -> Result<(), Error> {
    linear::forward(x, w, out, workspace)
}

/// What the op takes from the workspace for `n` tokens over `v` rows of a head of `kind` and `h`
/// columns, `chunk` tokens at a time and without losses per token.
pub fn plan(workspace: &mut WorkspacePlan, kind: Kind, n: usize, [v, h]: [usize; 2], chunk: usize) {
    workspace.take(LOSSES, &[n], Kind::Float);
    workspace.take(LOGITS, &[n.min(chunk), v], kind);
    if workspace.on_gpu() {
        return;
    }
    // The last chunk may be a shorter one, whose blocks are cut otherwise.
    for rows in [n.min(chunk), n % chunk.max(1)] {
        linear::plan_packed(workspace, kind, rows, [v, h]);
    }
}

fn run(
    inputs: &Inputs<'_>,
    losses: Losses<'_>,
    gradients: Option<Gradients<'_>>,
    workspace: &mut Workspace,
) -> Result<(), Error> {
    let [n, h] = sizes(OP, "x", inputs.x)?;
    let [v, _] = sizes(OP, "w", inputs.w)?;
    let kind = check_dtype(OP, "x", inputs.x)?;
    let vocab = inputs.vocab_size;
    if inputs.chunk == 0 || vocab == 0 || vocab > v {
        let message = format!(
            "chunk must be at least 1 and vocab_size between 1 and the {v} rows of `w`, found \
             chunk {} and vocab_size {vocab}",
            inputs.chunk
        );
        return Err(Error::Argument { op: OP, message });
    }
    if let Some(gpu) = cuda::of(OP, "x", inputs.x)? {
        return on_gpu::run(&gpu, [n, h, v], inputs, losses, gradients, workspace);
    }
    let wants_gradients = gradients.is_some();
    let mut gradients = gradients.unwrap_or_default();
    // Everything is checked before the first write: a bad target must not leave half a gradient.
    let mut operands = Operands::new(OP);
    with_float!(OP, "x", inputs.x => T: {
        operands.read_matrix::<T>("x", inputs.x, [n, h])?;
        operands.read_matrix::<T>("w", inputs.w, [v, h])?;
        if let Some(dx) = gradients.dx.as_deref_mut() {
            operands.write_matrix::<T>("dx", dx, [n, h])?;
        }
        if let Some(dw) = gradients.dw.as_deref_mut() {
            operands.write::<f32>("dw", dw, &[v, h])?;
        }
        Ok(())
    })?;
    let targets = operands.read::<i64>("targets", inputs.targets, &[n])?;
    let weights = inputs
        .weights
        .map(|w| operands.read::<f32>("weights", w, &[n]))
        .transpose()?;
    let total = operands.write::<f64>("sum", losses.sum, &[1])?;
    let limit = vocab as i64;
    if let Some(at) = targets
        .iter()
        .position(|&t| t != IGNORE && !(0..limit).contains(&t))
    {
        return Err(Error::Index {
            op: OP,
            tensor: "targets",
            at,
            value: targets[at],
            limit,
        });
    }
    let mut scratch;
    let per_token = match losses.per_token {
        Some(per_token) => per_token,
        None => {
            scratch = workspace.take(LOSSES, &[n], Kind::Float)?;
            &mut scratch
        }
    };
    let per_token = operands.write::<f32>("per_token", per_token, &[n])?;

    let head = PackedWeight::new(inputs.w, gradients.dx.is_some(), workspace)?;
    for start in (0..n).step_by(inputs.chunk) {
        let len = inputs.chunk.min(n - start);
        let rows = |t: &Tensor| t.f_narrow(0, start as i64, len as i64).map_err(torch(OP));
        let x = rows(inputs.x)?;
        let mut chunk = workspace.take(LOGITS, &[len, v], kind)?;
        head.forward(&x, &mut chunk, workspace)?;
        let tokens = Tokens {
            targets: &targets[start..start + len],
            weights: weights.map(|weights| &weights[start..start + len]),
            vocab,
            gradient: wants_gradients,
        };
        with_float!(OP, "logits", &chunk => T: {
            let logits = Operands::new(OP).write::<T>("logits", &mut chunk, &[len, v])?;
            softmax::losses(logits, v, tokens, &mut per_token[start..start + len]);
            Ok(())
        })?;
        if let Some(dx) = gradients.dx.as_deref_mut() {
            head.backward_input(&chunk, &mut rows(dx)?, workspace)?;
        }
        if let Some(dw) = gradients.dw.as_deref_mut() {
            linear::backward_weight(&chunk, &x, dw, workspace)?;
        }
    }
    total[0] += per_token.iter().map(|&loss| f64::from(loss)).sum::<f64>();
    Ok(())
}

/// The weighted sum of token losses as a composition of libtorch ops, for autograd to
/// differentiate; any floating dtype.
///
/// # Errors
/// [`Error::Torch`].
pub fn reference(inputs: &Inputs<'_>) -> Result<Tensor, Error> {
    let compose = || {
        let head = inputs.w.f_narrow(0, 0, inputs.vocab_size as i64)?;
        let logits = inputs.x.f_matmul(&head.f_tr()?)?;
        let log_probabilities = logits.f_log_softmax(-1, logits.f_kind()?)?;
        let valid = inputs.targets.f_ne(IGNORE)?;
        let targets = inputs.targets.f_clamp_min(0)?.f_unsqueeze(1)?;
        let picked = log_probabilities
            .f_gather(1, &targets, false)?
            .f_squeeze_dim(1)?;
        let mut factor = valid.f_to_kind(picked.f_kind()?)?;
        if let Some(weights) = inputs.weights {
            factor = factor.f_mul(weights)?;
        }
        picked.f_mul(&factor)?.f_sum(picked.f_kind()?)?.f_neg()
    };
    compose().map_err(torch("linear_cross_entropy.reference"))
}

#[cfg(test)]
mod tests;
