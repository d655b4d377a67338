//! Products by libtorch: MKL for fp32, oneDNN for bf16, both with fp32 sums.
//!
//! What needs care is the weight gradient under bf16, which must be added to an fp32 buffer: libtorch
//! has no such product on the CPU. See [`WeightGradient`] for the two ways.
//!
//! The libraries may cut long sums differently for another number of threads, so results are the
//! same bits only for an equal thread count.

use std::sync::OnceLock;

use tch::{Kind, Tensor};

use crate::error::torch;
use crate::probe::{self, Vendor};
use crate::sys::operands::{as_mut_slice, as_slice};
use crate::sys::symbol;
use crate::{Error, Workspace, WorkspacePlan, cast};

/// Name of the bf16 scratch.
const GRADIENT: &str = "linear.weight_gradient";

/// Elements of the bf16 scratch that [`WeightGradient::OneDnn`] fills at a time (16 MiB).
const SCRATCH: usize = 1 << 23;

/// How a bf16 layer adds its weight gradient to an fp32 buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightGradient {
    /// MKL's `cblas_gemm_bf16bf16f32` adds the fp32 sum straight to the buffer. Fast on Intel
    /// processors; elsewhere MKL emulates bf16.
    Mkl,
    /// oneDNN's bf16 product into a scratch matrix, added to the buffer afterwards. One more
    /// rounding to bf16 per call, as PyTorch's autocast has it; fast wherever oneDNN is.
    OneDnn,
}

impl WeightGradient {
    /// The name under which a run records the choice.
    pub fn name(self) -> &'static str {
        match self {
            WeightGradient::Mkl => "mkl",
            WeightGradient::OneDnn => "onednn",
        }
    }

    /// The way taken on this machine: decided once by processor and library, not by a measurement
    /// that could come out differently in the next run.
    ///
    /// Measured on Zen 4 (2 cores, 512-wide layers, 4096 tokens): MKL 150–180, oneDNN 370–400
    /// GFLOP/s; on Sapphire Rapids with AMX: MKL 1480–1860, oneDNN 1100–1260.
    pub fn of_this_machine() -> WeightGradient {
        static CHOICE: OnceLock<WeightGradient> = OnceLock::new();
        *CHOICE.get_or_init(|| {
            let intel = probe::vendor() == Vendor::Intel && probe::has_avx512_bf16();
            if intel && symbol::has_gemm_bf16() {
                WeightGradient::Mkl
            } else {
                WeightGradient::OneDnn
            }
        })
    }
}

/// `y = x·wᵀ`
pub(super) fn forward(x: &Tensor, w: &Tensor, y: &mut Tensor) -> Result<(), Error> {
    let product = || x.f_mm_out(y, &w.f_tr()?);
    product().map(drop).map_err(torch(super::FORWARD))
}

/// `dx = dy·w`
pub(super) fn backward_input(dy: &Tensor, w: &Tensor, dx: &mut Tensor) -> Result<(), Error> {
    let product = dy.f_mm_out(dx, w);
    product.map(drop).map_err(torch(super::BACKWARD_INPUT))
}

/// `dw += dyᵀ·x`
pub(super) fn backward_weight(
    way: WeightGradient,
    dy: &Tensor,
    x: &Tensor,
    dw: &mut Tensor,
    workspace: &mut Workspace,
) -> Result<(), Error> {
    const OP: &str = super::BACKWARD_WEIGHT;
    let kind = x.f_kind().map_err(torch(OP))?;
    if kind == Kind::Float {
        let mut add = || dw.f_addmm_(&dy.f_tr()?, x);
        return add().map(drop).map_err(torch(OP));
    }
    let [n, o, i] = [dy.size()[0], dy.size()[1], x.size()[1]].map(|size| size as usize);
    if way == WeightGradient::Mkl && dy.is_contiguous() && x.is_contiguous() {
        let (a, b) = (as_slice(dy)?, as_slice(x)?);
        if symbol::accumulate_transposed_bf16(a, b, as_mut_slice(dw)?, [n, o, i]) {
            return Ok(());
        }
    }
    let rows = scratch_rows(o, i);
    for start in (0..o).step_by(rows) {
        let (start, len) = (start as i64, rows.min(o - start));
        let scratch = workspace.take(GRADIENT, &[len, i], kind)?;
        let product = || {
            let part = dy.f_narrow(1, start, len as i64)?.f_tr()?;
            let _ = part.f_mm_out(&scratch, x)?;
            dw.f_narrow(0, start, len as i64)
        };
        let mut target = product().map_err(torch(OP))?;
        cast::accumulate(&scratch, &mut target)?;
    }
    Ok(())
}

/// What [`backward_weight`] takes from the workspace for a weight `[o, i]` of `kind`. Where MKL adds
/// by itself, nothing is taken.
pub(super) fn plan(workspace: &mut WorkspacePlan, kind: Kind, [o, i]: [usize; 2]) {
    if kind != Kind::Float && o * i > 0 {
        workspace.take(GRADIENT, &[scratch_rows(o, i), i], kind);
    }
}

/// Rows of a gradient `[o, i]` that are computed at a time where it is added in a second step.
fn scratch_rows(o: usize, i: usize) -> usize {
    (SCRATCH / i).clamp(1, o)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::testing::*;
    use tch::Device;

    fn product(dy: &Tensor, x: &Tensor) -> Tensor {
        let wide = |x: &Tensor| x.to_kind(Kind::Double);
        wide(dy).tr().matmul(&wide(x))
    }

    #[test]
    fn both_ways_add_the_weight_gradient() {
        for (n, i, o) in [(1, 1, 1), (5, 7, 3), (67, 96, 130)] {
            let x = normal("x", &[n, i], Kind::BFloat16);
            let dy = normal("dy", &[n, o], Kind::BFloat16);
            for way in [WeightGradient::Mkl, WeightGradient::OneDnn] {
                let mut workspace = Workspace::new(Device::Cpu);
                let mut dw = zeros(&[o, i], Kind::Float);
                for times in 1..=2 {
                    backward_weight(way, &dy, &x, &mut dw, &mut workspace).unwrap();
                    assert_close("dw", &dw, &(product(&dy, &x) * times), 1e-2);
                }
            }
        }
    }

    #[test]
    fn mkl_adds_the_unrounded_sum() {
        if !symbol::has_gemm_bf16() {
            println!("skipped: this libtorch does not export cblas_gemm_bf16bf16f32");
            return;
        }
        let x = normal("x", &[300, 40], Kind::BFloat16);
        let dy = normal("dy", &[300, 50], Kind::BFloat16);
        let mut dw = zeros(&[50, 40], Kind::Float);
        let mut workspace = Workspace::new(Device::Cpu);
        backward_weight(WeightGradient::Mkl, &dy, &x, &mut dw, &mut workspace).unwrap();
        assert_close("dw", &dw, &product(&dy, &x), 1e-6);
        assert_eq!(workspace.bytes(), 0);
    }

    #[test]
    fn a_wide_weight_is_done_in_parts() {
        // SCRATCH / i rows at a time: 4 parts, the last one short.
        let (n, i, o) = (3i64, 1 << 20, 27i64);
        let (x, dy) = (
            normal("x", &[n, i], Kind::BFloat16),
            normal("dy", &[n, o], Kind::BFloat16),
        );
        let mut dw = zeros(&[o, i], Kind::Float);
        let mut workspace = Workspace::new(Device::Cpu);
        backward_weight(WeightGradient::OneDnn, &dy, &x, &mut dw, &mut workspace).unwrap();
        assert_eq!(workspace.bytes(), 2 * SCRATCH as u64);
        let mut planned = WorkspacePlan::new(device());
        plan(&mut planned, Kind::BFloat16, [27, 1 << 20]);
        assert_eq!(planned.bytes(), 2 * SCRATCH);
        let expected = dy.to_kind(Kind::Float).tr().matmul(&x.to_kind(Kind::Float));
        assert_close("dw", &dw, &expected, 1e-2);
    }
}
