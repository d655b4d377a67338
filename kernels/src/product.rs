//! Products of tensors: the way into the engine that multiplies.
//!
//! A product is finished by an [`Epilogue`], which gets its sums in blocks. [`Engine::Own`] hands
//! them over in fp32 while they lie in a near cache. [`Engine::Libtorch`] multiplies into a buffer
//! in the compute dtype first (one more rounding under bf16), and the epilogue's pass over it
//! follows.

use half::bf16;
use tch::{Kind, TchError, Tensor};

use crate::error::torch;
use crate::float::{Float, Operand, load_padded};
use crate::matmul::{self, Block, Columns, Epilogue, Matrix, Packed, Right, Shape, Target};
use crate::microkernel::pack::Strided;
use crate::microkernel::{Dtype, Kernel, Visitor, head_mut};
use crate::simd::vector::{WIDTH, per_level};
use crate::sys::operands::{Operands, as_mut_slice, as_slice};
use crate::sys::parallel::{Counter, parallel_split, threads};
use crate::sys::split::Rows;
use crate::{Error, Workspace, WorkspacePlan};

mod engine;
pub(crate) mod on_gpu;
mod trial;

pub use engine::{Engine, with_engine};
pub use trial::Trial;

/// Names of buffers: scratch of own products, a product by libtorch, blocks of it.
const SCRATCH: &str = "product";
const OUTPUT: &str = "product.output";
const SUMS: &str = "product.sums";

/// Rows of a block of libtorch's product that goes to the epilogue.
const ROWS: usize = 4;

/// A matrix that a product reads.
#[derive(Clone, Copy)]
pub(crate) struct Input<'a, T> {
    tensor: &'a Tensor,
    rows: Strided<'a, T>,
}

impl<'a, T: Dtype> Input<'a, T> {
    /// A tensor `[rows, columns]` in T whose rows may lie apart.
    pub(crate) fn new(
        operands: &mut Operands,
        name: &'static str,
        tensor: &'a Tensor,
        [n, d]: [usize; 2],
    ) -> Result<Self, Error> {
        let (data, stride) = operands.read_matrix(name, tensor, [n, d])?;
        let rows = Strided { data, stride, n, d };
        Ok(Input { tensor, rows })
    }
}

impl<'a, T> Input<'a, T> {
    /// Its rows.
    pub(crate) fn rows(self) -> Strided<'a, T> {
        self.rows
    }
}

/// A tensor `[rows, columns]` whose rows may lie apart, to be written by an epilogue. Nothing else
/// may touch its elements until that has ended.
pub(crate) fn target<'a, T: Float>(
    operands: &mut Operands,
    name: &'static str,
    tensor: &'a mut Tensor,
    shape: [usize; 2],
) -> Result<Target<'a, T>, Error> {
    let (data, stride) = operands.write_matrix(name, tensor, shape)?;
    // SAFETY: `write_matrix` found these rows in a tensor that is borrowed uniquely for 'a, and no
    // other argument among them.
    unsafe { Target::from_raw(data, shape, stride) }
}

/// The three products of a linear layer `y = x·wᵀ` with `x: [n, i]`, `w: [o, i]` and `y: [n, o]`.
#[derive(Clone, Copy)]
pub(crate) enum Product<'a, T> {
    /// `x·wᵀ`, of x and w.
    Forward(Input<'a, T>, Input<'a, T>),
    /// `dy·w`, of dy and w.
    BackwardInput(Input<'a, T>, Input<'a, T>),
    /// `dyᵀ·x`, of dy and x.
    BackwardWeight(Input<'a, T>, Input<'a, T>),
}

impl<'a, T: Dtype> Product<'a, T> {
    fn factors(&self) -> (Matrix<'a, T>, Matrix<'a, T>) {
        match *self {
            Product::Forward(x, w) => (Matrix::Rows(x.rows), Matrix::Turned(w.rows)),
            Product::BackwardInput(dy, w) => (Matrix::Rows(dy.rows), Matrix::Rows(w.rows)),
            Product::BackwardWeight(dy, x) => (Matrix::Turned(dy.rows), Matrix::Rows(x.rows)),
        }
    }

    fn by_libtorch(&self, out: &Tensor) -> Result<Tensor, TchError> {
        match self {
            Product::Forward(x, w) => x.tensor.f_mm_out(out, &w.tensor.f_tr()?),
            Product::BackwardInput(dy, w) => dy.tensor.f_mm_out(out, w.tensor),
            Product::BackwardWeight(dy, x) => dy.tensor.f_tr()?.f_mm_out(out, x.tensor),
        }
    }
}

/// Multiplies, and hands every block of the product to the epilogue.
pub(crate) fn multiply<T: Dtype, E: Epilogue>(
    op: &'static str,
    product: &Product<'_, T>,
    columns: Columns,
    epilogue: &E,
    workspace: &mut Workspace,
) -> Result<(), Error> {
    let (a, b) = product.factors();
    match Engine::of(T::KIND) {
        Engine::Own => own(a, Right::Plain(b, columns), epilogue, workspace),
        Engine::Libtorch => {
            epilogue.check(a.rows(), columns)?;
            let out = workspace.take(OUTPUT, &[a.rows(), columns.count()], T::KIND)?;
            let _ = product.by_libtorch(&out).map_err(torch(op))?;
            finish::<T, E>(&out, columns, epilogue, workspace)
        }
    }
}

/// Multiplies by a B that our own engine has packed.
pub(crate) fn multiply_packed<T: Dtype, E: Epilogue>(
    a: Input<'_, T>,
    packed: Packed<'_, T>,
    epilogue: &E,
    workspace: &mut Workspace,
) -> Result<(), Error> {
    let a = Matrix::Rows(a.rows);
    own(a, Right::Packed(packed), epilogue, workspace)
}

fn own<T: Dtype, E: Epilogue>(
    a: Matrix<'_, T>,
    b: Right<'_, T>,
    epilogue: &E,
    workspace: &mut Workspace,
) -> Result<(), Error> {
    let len = matmul::scratch_len::<T>(Shape {
        rows: a.rows(),
        k: a.columns(),
        columns: b.columns(),
        packed: matches!(b, Right::Packed(_)),
    });
    let mut scratch = workspace.take(SCRATCH, &[len], Kind::Float)?;
    matmul::multiply(a, b, epilogue, as_mut_slice(&mut scratch)?)
}

/// What [`multiply`] takes from the workspace for a product of `rows` rows and inner length `k`.
pub(crate) fn plan(workspace: &mut WorkspacePlan, kind: Kind, size: [usize; 2], columns: Columns) {
    if workspace.on_gpu() {
        return on_gpu::plan(workspace, kind, size[0], columns);
    }
    match Engine::of(kind) {
        Engine::Own => plan_own(workspace, kind, size, columns, false),
        Engine::Libtorch => {
            workspace.take(OUTPUT, &[size[0], columns.count()], kind);
            workspace.take(SUMS, &[threads() * sums_len(columns)], Kind::Float);
        }
    }
}

/// What [`multiply_packed`] takes.
pub(crate) fn plan_packed(
    workspace: &mut WorkspacePlan,
    kind: Kind,
    size: [usize; 2],
    columns: Columns,
) {
    plan_own(workspace, kind, size, columns, true);
}

fn plan_own(
    workspace: &mut WorkspacePlan,
    kind: Kind,
    [rows, k]: [usize; 2],
    columns: Columns,
    packed: bool,
) {
    let shape = Shape {
        rows,
        k,
        columns,
        packed,
    };
    let len = match kind {
        Kind::BFloat16 => matmul::scratch_len::<bf16>(shape),
        _ => matmul::scratch_len::<f32>(shape),
    };
    workspace.take(SCRATCH, &[len], Kind::Float);
}

/// fp32 numbers of a block of libtorch's product, widened.
fn sums_len(columns: Columns) -> usize {
    ROWS * columns.panels() * WIDTH
}

/// Widens a product block by block and hands it to the epilogue.
fn finish<T: Dtype, E: Epilogue>(
    product: &Tensor,
    columns: Columns,
    epilogue: &E,
    workspace: &mut Workspace,
) -> Result<(), Error> {
    struct Finish<'a, T, E>(&'a [T], Columns, &'a E, &'a mut [f32]);
    impl<T: Dtype, E: Epilogue> Visitor<T> for Finish<'_, T, E> {
        type Out = ();
        fn visit<K: Kernel>(self, kernel: K)
        where
            T: Operand<K::Element>,
        {
            let Finish(product, columns, epilogue, sums) = self;
            let (simd, width) = (kernel.simd(), columns.count());
            let rows = product.len() / width;
            let counter = Counter::new();
            let sums = Rows::new(sums, sums_len(columns));
            parallel_split(threads(), 1, sums, |_, sums| {
                loop {
                    let first = counter.claim() * ROWS;
                    if first >= rows {
                        break;
                    }
                    let block = Block {
                        rows: first..(first + ROWS).min(rows),
                        panels: 0..columns.panels(),
                        columns,
                        stride: columns.panels() * WIDTH,
                    };
                    widen::<K::Simd, T>(simd, &product[first * width..], &block, sums);
                    // SAFETY: the blocks are disjoint, and `check` accepted the product.
                    unsafe { epilogue.finish(simd, &block, sums) };
                }
            });
        }
    }
    if columns.count() == 0 {
        return Ok(());
    }
    let mut sums = workspace.take(SUMS, &[threads() * sums_len(columns)], Kind::Float)?;
    let sums = as_mut_slice(&mut sums)?;
    T::with_kernel(Finish(as_slice(product)?, columns, epilogue, sums));
    Ok(())
}

per_level! {
/// The block's rows, the first rows of `from`, as sums.
fn widen[S, T: Float](simd: S, from: &[T], block: &Block, sums: &mut [f32]) {
    let width = block.columns.count();
    for run in block.runs() {
        for r in 0..block.rows.len() {
            let from = &from[r * width..][run.columns.clone()];
            let sums = &mut sums[r * block.stride + run.panel * WIDTH..];
            for at in (0..from.len()).step_by(WIDTH) {
                simd.store(load_padded(simd, from, at), head_mut(&mut sums[at..]));
            }
        }
    }
}
}
