//! Causal attention within documents, with grouped queries (query head `h` reads key-value head
//! `h / (nq / nkv)`).
//!
//! The work is done by libtorch's CPU flash attention (Dao et al. 2022), called once per document
//! with plain causal masking. A call over the whole sample would need a dense mask and would visit
//! every block; document by document, cost follows `Σ len²` and memory is linear. Keys and values
//! are not expanded to the query heads.
//!
//! That pair has no `out` form: it returns fresh tensors of one document's size, which are copied
//! into the outputs given here. Its results do not depend on the number of threads (a test holds
//! it to that).

use tch::{Kind, Tensor};

use crate::error::torch;
use crate::linear::float_kind;
use crate::sys::operands::{check_kind, check_shape, sizes};
use crate::{DocumentStarts, Error};

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
    kind: Kind,
    query: [usize; 4],
    key: [usize; 4],
    lse: [usize; 3],
}

impl Inputs<'_> {
    fn check(&self, op: &'static str) -> Result<Shape, Error> {
        let query @ [batch, seq, heads, d] = sizes(op, "q", self.q)?;
        let [_, _, kv_heads, _] = sizes(op, "k", self.k)?;
        let key = [batch, seq, kv_heads, d];
        let kind = float_kind(op, "q", self.q)?;
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            let message = format!("{heads} query heads cannot share {kv_heads} key-value heads");
            return Err(Error::Argument { op, message });
        }
        if (self.documents.batch(), self.documents.seq()) != (batch, seq) {
            let message = format!(
                "the documents describe [{}, {}] tokens, but `q` holds [{batch}, {seq}]",
                self.documents.batch(),
                self.documents.seq()
            );
            return Err(Error::Argument { op, message });
        }
        check_heads(op, "q", self.q, kind, query)?;
        check_heads(op, "k", self.k, kind, key)?;
        check_heads(op, "v", self.v, kind, key)?;
        Ok(Shape {
            kind,
            query,
            key,
            lse: [batch, heads, seq],
        })
    }

    /// The calls to make: (first sample, samples, first token, tokens).
    fn calls(&self) -> Vec<[i64; 4]> {
        let (batch, seq) = (self.documents.batch() as i64, self.documents.seq() as i64);
        if self.documents.is_whole() && batch > 0 {
            return vec![[0, batch, 0, seq]];
        }
        let documents = self.documents.documents().iter();
        documents
            .map(|(b, t)| [*b as i64, 1, t.start as i64, t.len() as i64])
            .collect()
    }
}

/// `[batch, seq, heads, d]` with adjacent elements in a head.
fn check_heads(
    op: &'static str,
    name: &'static str,
    tensor: &Tensor,
    kind: Kind,
    shape: [usize; 4],
) -> Result<(), Error> {
    check_kind(op, name, tensor, kind)?;
    check_shape(op, name, tensor, &shape)?;
    let strides = tensor.stride();
    if strides[3] == 1 || shape[3] == 1 {
        return Ok(());
    }
    Err(Error::Layout {
        op,
        tensor: name,
        expected: "dense within a head",
        shape: tensor.size(),
        strides,
    })
}

/// Some samples and tokens of `[batch, seq, heads, d]`, as libtorch's `[batch, heads, seq, d]`.
fn cut(tensor: &Tensor, [b, samples, t, len]: [i64; 4]) -> Result<Tensor, tch::TchError> {
    tensor
        .f_narrow(0, b, samples)?
        .f_narrow(1, t, len)?
        .f_transpose(1, 2)
}

/// Some samples and tokens of `[batch, heads, seq]`.
fn cut_lse(tensor: &Tensor, [b, samples, t, len]: [i64; 4]) -> Result<Tensor, tch::TchError> {
    tensor.f_narrow(0, b, samples)?.f_narrow(2, t, len)
}

/// `out: [batch, seq, nq, d]` in T (written) and `lse: [batch, nq, seq]` fp32 (written; the
/// logarithm of the softmax denominators, for the backward pass).
///
/// # Errors
/// The argument errors of [`Error`].
pub fn forward(inputs: &Inputs<'_>, out: &mut Tensor, lse: &mut Tensor) -> Result<(), Error> {
    let shape = inputs.check(FORWARD)?;
    check_heads(FORWARD, "out", out, shape.kind, shape.query)?;
    check_kind(FORWARD, "lse", lse, Kind::Float)?;
    check_shape(FORWARD, "lse", lse, &shape.lse)?;
    let one_call = |call: [i64; 4]| {
        let (fresh_out, fresh_lse) =
            Tensor::f_internal_scaled_dot_product_flash_attention_for_cpu::<Tensor>(
                &cut(inputs.q, call)?,
                &cut(inputs.k, call)?,
                &cut(inputs.v, call)?,
                0.0,
                true,
                None,
                inputs.scale,
            )?;
        cut(out, call)?.f_copy_(&fresh_out)?;
        cut_lse(lse, call)?.f_copy_(&fresh_lse)
    };
    inputs
        .calls()
        .into_iter()
        .try_for_each(one_call)
        .map_err(torch(FORWARD))
}

/// Gradients of [`forward`], given its outputs and `dout: [batch, seq, nq, d]` in T.
///
/// # Errors
/// The argument errors of [`Error`].
pub fn backward(
    inputs: &Inputs<'_>,
    out: &Tensor,
    lse: &Tensor,
    dout: &Tensor,
    gradients: Gradients<'_>,
) -> Result<(), Error> {
    let shape = inputs.check(BACKWARD)?;
    check_heads(BACKWARD, "out", out, shape.kind, shape.query)?;
    check_heads(BACKWARD, "dout", dout, shape.kind, shape.query)?;
    check_kind(BACKWARD, "lse", lse, Kind::Float)?;
    check_shape(BACKWARD, "lse", lse, &shape.lse)?;
    let Gradients { dq, dk, dv } = gradients;
    check_heads(BACKWARD, "dq", dq, shape.kind, shape.query)?;
    check_heads(BACKWARD, "dk", dk, shape.kind, shape.key)?;
    check_heads(BACKWARD, "dv", dv, shape.kind, shape.key)?;
    let one_call = |call: [i64; 4]| {
        let (fresh_q, fresh_k, fresh_v) =
            Tensor::f_internal_scaled_dot_product_flash_attention_for_cpu_backward::<Tensor>(
                &cut(dout, call)?,
                &cut(inputs.q, call)?,
                &cut(inputs.k, call)?,
                &cut(inputs.v, call)?,
                &cut(out, call)?,
                &cut_lse(lse, call)?,
                0.0,
                true,
                None,
                inputs.scale,
            )?;
        cut(dq, call)?.f_copy_(&fresh_q)?;
        cut(dk, call)?.f_copy_(&fresh_k)?;
        cut(dv, call)?.f_copy_(&fresh_v)
    };
    inputs
        .calls()
        .into_iter()
        .try_for_each(one_call)
        .map_err(torch(BACKWARD))
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
        let ids = Tensor::f_from_slice(&document_of)?.f_view([batch, seq])?;
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
