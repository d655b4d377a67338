//! A weight made ready for the products of many blocks of rows.
//!
//! Packing reads and writes the whole weight, which takes as long as its product with some eighty
//! rows; who multiplies it again and again packs it once.

use tch::{Kind, Tensor};

use super::{BACKWARD_INPUT, FORWARD, backward_input, forward};
use crate::float::{Scalar, with_float};
use crate::matmul::epilogue::Store;
use crate::matmul::{self, Columns, Matrix, Packed};
use crate::product::{self, Engine, Input, target};
use crate::sys::operands::{Operands, as_mut_slice, as_slice, sizes};
use crate::{Error, Workspace, WorkspacePlan};

const OP: &str = "linear.packed_weight";

/// Names of buffers.
const FOR_FORWARD: &str = "linear.packed_weight.forward";
const FOR_BACKWARD: &str = "linear.packed_weight.backward";

/// A weight `[o, i]`, packed where our own products take it; it lies in a workspace, which has room
/// for one.
pub(crate) struct PackedWeight<'a> {
    w: &'a Tensor,
    forward: Option<Tensor>,
    backward: Option<Tensor>,
}

impl<'a> PackedWeight<'a> {
    /// Packs `w: [o, i]`, fp32 or bf16, for [`PackedWeight::forward`], and if asked also for
    /// [`PackedWeight::backward_input`].
    ///
    /// # Errors
    /// The argument errors of [`Error`].
    pub(crate) fn new(
        w: &'a Tensor,
        backward: bool,
        workspace: &mut Workspace,
    ) -> Result<Self, Error> {
        let [o, i] = sizes(OP, "w", w)?;
        let mut packed = PackedWeight {
            w,
            forward: None,
            backward: None,
        };
        with_float!(OP, "w", w => T: {
            if Engine::of(T::KIND) == Engine::Libtorch {
                return Ok(packed);
            }
            let rows = Input::<T>::new(&mut Operands::new(OP), "w", w, [o, i])?.rows();
            let mut pack = |name, matrix: Matrix<'_, T>, columns| {
                let len = matmul::packed_len::<T>(matrix.rows(), columns);
                let mut buffer = workspace.take(name, &[len], Kind::Float)?;
                matmul::pack(matrix, columns, as_mut_slice(&mut buffer)?)?;
                Ok::<_, Error>(buffer)
            };
            packed.forward = Some(pack(FOR_FORWARD, Matrix::Turned(rows), Columns::Any(o))?);
            if backward {
                packed.backward = Some(pack(FOR_BACKWARD, Matrix::Rows(rows), Columns::Any(i))?);
            }
            Ok(packed)
        })
    }

    /// As [`forward`].
    ///
    /// # Errors
    /// The argument errors of [`Error`].
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        y: &mut Tensor,
        workspace: &mut Workspace,
    ) -> Result<(), Error> {
        match &self.forward {
            Some(packed) => {
                let [o, i] = sizes(FORWARD, "w", self.w)?;
                multiply((FORWARD, "x", "y"), (x, y), (packed, [i, o]), workspace)
            }
            None => forward(x, self.w, y, workspace),
        }
    }

    /// As [`backward_input`].
    ///
    /// # Errors
    /// The argument errors of [`Error`].
    pub(crate) fn backward_input(
        &self,
        dy: &Tensor,
        dx: &mut Tensor,
        workspace: &mut Workspace,
    ) -> Result<(), Error> {
        match &self.backward {
            Some(packed) => {
                let size = sizes(BACKWARD_INPUT, "w", self.w)?;
                multiply(
                    (BACKWARD_INPUT, "dy", "dx"),
                    (dy, dx),
                    (packed, size),
                    workspace,
                )
            }
            None => backward_input(dy, self.w, dx, workspace),
        }
    }
}

/// `c = a · packed`, of an operation that calls them so; packed is B of `[k, columns]`.
fn multiply(
    (op, a_name, c_name): (&'static str, &'static str, &'static str),
    (a, c): (&Tensor, &mut Tensor),
    (packed, [k, columns]): (&Tensor, [usize; 2]),
    workspace: &mut Workspace,
) -> Result<(), Error> {
    let [n, _] = sizes(op, a_name, a)?;
    with_float!(op, a_name, a => T: {
        let mut operands = Operands::new(op);
        let a = Input::<T>::new(&mut operands, a_name, a, [n, k])?;
        let store = Store(target::<T>(&mut operands, c_name, c, [n, columns])?);
        let packed = Packed::new(as_slice(packed)?, k, Columns::Any(columns));
        product::multiply_packed(a, packed, &store, workspace)
    })
}

/// What [`PackedWeight`] takes from the workspace for `w: [o, i]` of `kind`, both ways, and `n` rows
/// at a time.
pub(crate) fn plan(workspace: &mut WorkspacePlan, kind: Kind, n: usize, [o, i]: [usize; 2]) {
    if Engine::of(kind) == Engine::Libtorch {
        return super::plan_backward(workspace, kind, n, [o, i]);
    }
    let len = |k, columns| match kind {
        Kind::BFloat16 => matmul::packed_len::<half::bf16>(k, columns),
        _ => matmul::packed_len::<f32>(k, columns),
    };
    workspace.take(FOR_FORWARD, &[len(i, Columns::Any(o))], Kind::Float);
    workspace.take(FOR_BACKWARD, &[len(o, Columns::Any(i))], Kind::Float);
    product::plan_packed(workspace, kind, [n, i], Columns::Any(o));
    product::plan_packed(workspace, kind, [n, o], Columns::Any(i));
    product::plan(workspace, kind, [o, n], Columns::Any(i));
}
