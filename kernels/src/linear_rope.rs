//! The fused projection of queries, keys and values, with queries and keys rotated
//! ([`crate::rope`]).

use tch::{Kind, Tensor};

use crate::cuda::{Pointers, float};
use crate::error::torch;
use crate::float::with_float;
use crate::matmul::Columns;
use crate::matmul::epilogue::Rope;
use crate::product::{self, Input, Product, on_gpu, target};
use crate::rope::{self, Angles};
use crate::sys::operands::{Operands, sizes};
use crate::{Error, RopeTable, Workspace, WorkspacePlan, cuda, linear};

const FORWARD: &str = "linear_rope.forward";
const BACKWARD: &str = "linear_rope.backward";

/// Which heads turn, and how far.
#[derive(Clone, Copy)]
pub struct Rotation<'a> {
    /// Angles of every position; tells the size of a head.
    pub table: &'a RopeTable,
    /// `[n]` int64.
    pub positions: &'a Tensor,
    /// The first so many heads of a row turn: those of queries and keys.
    pub heads: usize,
}

/// `qkv = x·wᵀ`, its first heads rotated: `x: [n, i]`, `w: [o, i]`, `qkv: [n, o]` (written), all fp32
/// or all bf16; `o` is a multiple of the size of a head.
///
/// # Errors
/// The argument errors of [`Error`]; [`Error::Index`] for a position outside the table.
pub fn forward(
    x: &Tensor,
    w: &Tensor,
    rotation: &Rotation<'_>,
    qkv: &mut Tensor,
    workspace: &mut Workspace,
) -> Result<(), Error> {
    let [n, i] = sizes(FORWARD, "x", x)?;
    let [o, _] = sizes(FORWARD, "w", w)?;
    let columns = heads(FORWARD, rotation, o)?;
    if let Some(gpu) = cuda::of(FORWARD, "x", x)? {
        let (t, _) = float(FORWARD, "x", x)?;
        let mut pointers = Pointers::new(FORWARD, &gpu);
        pointers.read_matrix("x", x, t, [n, i])?;
        pointers.read_matrix("w", w, t, [o, i])?;
        pointers.write("qkv", qkv, t, &[n, o])?;
        on_gpu::forward(&gpu, FORWARD, x, w, qkv)?;
        let mut turned = turned(FORWARD, rotation, qkv)?;
        return rope::forward(rotation.table, rotation.positions, &mut turned);
    }
    with_float!(FORWARD, "x", x => T: {
        let mut operands = Operands::new(FORWARD);
        let product = Product::Forward(
            Input::<T>::new(&mut operands, "x", x, [n, i])?,
            Input::<T>::new(&mut operands, "w", w, [o, i])?,
        );
        let Angles { cos, sin, positions } =
            rotation.table.angles(&mut operands, rotation.positions, n)?;
        let qkv = target::<T>(&mut operands, "qkv", qkv, [n, o])?;
        let turned = [rotation.heads, rotation.table.head_dim()];
        let rope = Rope::new(qkv, turned, [cos, sin], positions)?;
        product::multiply(FORWARD, &product, columns, &rope, workspace)
    })
}

/// Turns the gradient of `qkv` back in place, `[n, o]` contiguous: what is left is that of a dense
/// layer, for [`linear::backward_input`] and [`linear::backward_weight`].
///
/// # Errors
/// As [`forward`].
pub fn backward(rotation: &Rotation<'_>, dqkv: &mut Tensor) -> Result<(), Error> {
    let [n, o] = sizes(BACKWARD, "dqkv", dqkv)?;
    heads(BACKWARD, rotation, o)?;
    match cuda::of(BACKWARD, "dqkv", dqkv)? {
        Some(gpu) => {
            let (t, _) = float(BACKWARD, "dqkv", dqkv)?;
            Pointers::new(BACKWARD, &gpu).write("dqkv", dqkv, t, &[n, o])?;
        }
        None => with_float!(BACKWARD, "dqkv", dqkv => T: {
            Operands::new(BACKWARD).write::<T>("dqkv", dqkv, &[n, o]).map(drop)
        })?,
    }
    let mut turned = turned(BACKWARD, rotation, dqkv)?;
    rope::backward(rotation.table, rotation.positions, &mut turned)
}

/// The heads that turn, `[n, heads, d]`.
fn turned(op: &'static str, rotation: &Rotation<'_>, qkv: &Tensor) -> Result<Tensor, Error> {
    let d = rotation.table.head_dim() as i64;
    qkv.f_view([qkv.size()[0], -1, d])
        .and_then(|all| all.f_narrow(1, 0, rotation.heads as i64))
        .map_err(torch(op))
}

/// What [`forward`] and the gradients take from the workspace for `n` rows, `w: [o, i]` of `kind` and
/// heads of `d` elements.
pub fn plan(workspace: &mut WorkspacePlan, kind: Kind, n: usize, [o, i]: [usize; 2], d: usize) {
    let columns = Columns::Groups {
        count: o / d,
        width: d,
    };
    product::plan(workspace, kind, [n, i], columns);
    linear::plan_backward(workspace, kind, n, [o, i]);
}

/// Rows of `o` elements as heads.
fn heads(op: &'static str, rotation: &Rotation<'_>, o: usize) -> Result<Columns, Error> {
    let width = rotation.table.head_dim();
    let count = o / width;
    if count * width == o && rotation.heads <= count {
        return Ok(Columns::Groups { count, width });
    }
    let message = format!(
        "{} heads of {width} elements cannot be rotated in rows of {o}",
        rotation.heads
    );
    Err(Error::Argument { op, message })
}

/// The same function by libtorch, for autograd to differentiate.
///
/// # Errors
/// [`Error::Torch`].
pub fn reference(x: &Tensor, w: &Tensor, rotation: &Rotation<'_>) -> Result<Tensor, Error> {
    let qkv = linear::reference(x, w)?;
    let d = rotation.table.head_dim() as i64;
    let split = || {
        let all = qkv.f_view([qkv.size()[0], -1, d])?;
        let turned = rotation.heads as i64;
        let rest = all.size()[1] - turned;
        Ok((all.f_narrow(1, 0, turned)?, all.f_narrow(1, turned, rest)?))
    };
    let (turned, rest) = split().map_err(torch("linear_rope.reference"))?;
    let turned = rope::reference(rotation.table, rotation.positions, &turned)?;
    Tensor::f_cat(&[turned, rest], 1)
        .and_then(|all| all.f_view(qkv.size().as_slice()))
        .map_err(torch("linear_rope.reference"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::testing::*;

    #[test]
    fn agrees_with_fp64_autograd_whoever_multiplies() {
        whoever_multiplies(agrees_with_fp64_autograd);
    }

    fn agrees_with_fp64_autograd() {
        for (kind, bound) in DTYPES {
            for (n, i, d, turned, heads) in
                [(1, 1, 2, 1, 1), (40, 24, 18, 3, 4), (67, 33, 64, 4, 6)]
            {
                let table = RopeTable::new(100.0, d as usize, 50, device()).unwrap();
                let positions = Tensor::arange(n, (Kind::Int64, device())).remainder(50);
                let rotation = Rotation {
                    table: &table,
                    positions: &positions,
                    heads: turned,
                };
                let (x, w) = (
                    normal("x", &[n, i], kind),
                    normal("w", &[heads * d, i], kind),
                );
                let mut qkv = poison(&[n, heads * d], kind);
                let mut workspace = workspace();
                forward(&x, &w, &rotation, &mut qkv, &mut workspace).unwrap();
                let mut planned = WorkspacePlan::new(device());
                let weight = [(heads * d) as usize, i as usize];
                plan(&mut planned, kind, n as usize, weight, d as usize);
                assert!(workspace.bytes() <= planned.bytes() as u64);
                let (x64, w64) = (leaf(&x), leaf(&w));
                let expected = reference(&x64, &w64, &rotation).unwrap();
                assert_close("qkv", &qkv, &expected, bound);

                let mut dqkv = normal("dqkv", &[n, heads * d], kind);
                let expected = gradients(&expected, &dqkv, &[&x64]);
                backward(&rotation, &mut dqkv).unwrap();
                let dx = dqkv.to_kind(Kind::Double).matmul(&w.to_kind(Kind::Double));
                assert_close("dx", &dx, &expected[0], bound);
            }
        }
    }

    #[test]
    fn heads_and_positions_must_fit() {
        let table = RopeTable::new(1e4, 8, 4, device()).unwrap();
        let mut workspace = workspace();
        let mut message = |positions: &[i64], heads: usize, o: i64| {
            let rotation = Rotation {
                table: &table,
                positions: &numbers(positions),
                heads,
            };
            let (x, w) = (zeros(&[2, 3], Kind::Float), zeros(&[o, 3], Kind::Float));
            let mut qkv = zeros(&[2, o], Kind::Float);
            forward(&x, &w, &rotation, &mut qkv, &mut workspace)
                .err()
                .map(|error| error.to_string())
                .unwrap_or_default()
        };
        assert_eq!(message(&[0, 3], 2, 24), "");
        assert!(message(&[0, 4], 2, 24).contains("`positions`[1] is 4"));
        assert!(message(&[0, 3], 4, 24).contains("4 heads of 8"));
        assert!(message(&[0, 3], 2, 20).contains("rows of 20"));
    }
}
