//! Products on a GPU: libtorch's, which are cuBLAS'.
//!
//! Sums are fp32. A weight gradient is added to its fp32 buffer inside the product, without a
//! rounding and without a second pass.

use tch::{Kind, Tensor};

use crate::cuda::Gpu;
use crate::error::torch;
use crate::matmul::Columns;
use crate::{Error, WorkspacePlan, shim};

/// Name of the buffer for a product that a kernel finishes.
pub(crate) const OUTPUT: &str = super::OUTPUT;

/// `y = x·wᵀ`
pub(crate) fn forward(
    gpu: &Gpu,
    op: &'static str,
    x: &Tensor,
    w: &Tensor,
    y: &mut Tensor,
) -> Result<(), Error> {
    let w = w.f_tr().map_err(torch(op))?;
    multiply(gpu, op, x, &w, y, Sum::Replace)
}

/// `dx = dy·w`
pub(crate) fn backward_input(
    gpu: &Gpu,
    op: &'static str,
    dy: &Tensor,
    w: &Tensor,
    dx: &mut Tensor,
) -> Result<(), Error> {
    multiply(gpu, op, dy, w, dx, Sum::Replace)
}

/// `dw += dyᵀ·x`, where `dw` may be fp32 and the others bf16.
pub(crate) fn backward_weight(
    gpu: &Gpu,
    op: &'static str,
    dy: &Tensor,
    x: &Tensor,
    dw: &mut Tensor,
) -> Result<(), Error> {
    let dy = dy.f_tr().map_err(torch(op))?;
    multiply(gpu, op, &dy, x, dw, Sum::Add)
}

/// What products that a kernel finishes take from the workspace.
pub(super) fn plan(workspace: &mut WorkspacePlan, kind: Kind, rows: usize, columns: Columns) {
    // Where gate and up are wanted they are the output, and heads turn where they lie.
    if let Columns::Any(columns) = columns {
        workspace.take(OUTPUT, &[rows, columns], kind);
    }
}

/// What becomes of the numbers that the output holds.
#[derive(Clone, Copy, PartialEq)]
enum Sum {
    Replace,
    Add,
}

fn multiply(
    gpu: &Gpu,
    op: &'static str,
    a: &Tensor,
    b: &Tensor,
    out: &mut Tensor,
    sum: Sum,
) -> Result<(), Error> {
    if out.numel() == 0 {
        return Ok(());
    }
    let beta = if sum == Sum::Add { 1.0 } else { 0.0 };
    match gpu {
        Gpu::Real(_) => shim::product(op, out, a, b, beta),
        #[cfg(any(test, feature = "emulator"))]
        Gpu::Emulated => {
            // libtorch multiplies bf16 into fp32 on GPUs alone: here the factors are widened.
            let wide = |x: &Tensor| x.f_to_kind(Kind::Float);
            let mut product = || {
                if [&*out, a, b].iter().all(|x| x.kind() == Kind::Float) {
                    // As on a GPU, nothing is allocated.
                    return match sum {
                        Sum::Replace => a.f_mm_out(out, b).map(drop),
                        Sum::Add => out.f_addmm_(a, b).map(drop),
                    };
                }
                let product = wide(a)?.f_mm(&wide(b)?)?;
                match sum {
                    Sum::Replace => out.f_copy_(&product),
                    Sum::Add => out.f_add_(&product).map(drop),
                }
            };
            product().map_err(torch(op))
        }
    }
}
