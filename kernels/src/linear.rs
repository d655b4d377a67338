//! Dense layers: `y = x·wᵀ` with `w: [o, i]`, as Hugging Face stores it.
//!
//! The products are libtorch's (MKL for fp32, oneDNN for bf16), which accumulate in fp32. What
//! needs care is the weight gradient under bf16, which must be added to an fp32 buffer: libtorch
//! has no such product on the CPU. See [`WeightGradient`] for the two ways.
//!
//! Matrices may be views whose rows lie apart, so a layer can read from or write to a part of a
//! wider buffer. The libraries may cut long sums differently for another number of threads, so
//! results are the same bits only for an equal thread count.

use std::sync::OnceLock;

use tch::{Kind, Tensor};

use crate::error::torch;
use crate::probe::{self, Vendor};
use crate::sys::operands::{Operands, as_mut_slice, as_slice, check_device, sizes};
use crate::sys::symbol;
use crate::{Error, Workspace, cast};

const FORWARD: &str = "linear.forward";
const BACKWARD_INPUT: &str = "linear.backward_input";
const BACKWARD_WEIGHT: &str = "linear.backward_weight";

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

impl std::fmt::Display for WeightGradient {
    /// The name under which a run records the choice.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            WeightGradient::Mkl => "mkl",
            WeightGradient::OneDnn => "onednn",
        })
    }
}

impl WeightGradient {
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

/// `y = x·wᵀ` with `x: [n, i]`, `w: [o, i]` and `y: [n, o]` (written), all fp32 or all bf16.
///
/// # Errors
/// The argument errors of [`Error`].
pub fn forward(x: &Tensor, w: &Tensor, y: &mut Tensor) -> Result<(), Error> {
    let [n, i] = sizes(FORWARD, "x", x)?;
    let [o, _] = sizes(FORWARD, "w", w)?;
    let kind = float_kind(FORWARD, "x", x)?;
    let mut operands = Operands::new(FORWARD);
    operands.matrix("x", x, kind, [n, i], false)?;
    operands.matrix("w", w, kind, [o, i], false)?;
    operands.matrix("y", y, kind, [n, o], true)?;
    let compute = || x.f_mm_out(y, &w.f_tr()?);
    compute().map(drop).map_err(torch(FORWARD))
}

/// `dx = dy·w`, or `dx += dy·w` with `accumulate`: `dy: [n, o]`, `w: [o, i]`, `dx: [n, i]`, all
/// fp32 or all bf16.
///
/// # Errors
/// The argument errors of [`Error`].
pub fn backward_input(
    dy: &Tensor,
    w: &Tensor,
    dx: &mut Tensor,
    accumulate: bool,
) -> Result<(), Error> {
    let [n, o] = sizes(BACKWARD_INPUT, "dy", dy)?;
    let [_, i] = sizes(BACKWARD_INPUT, "w", w)?;
    let kind = float_kind(BACKWARD_INPUT, "dy", dy)?;
    let mut operands = Operands::new(BACKWARD_INPUT);
    operands.matrix("dy", dy, kind, [n, o], false)?;
    operands.matrix("w", w, kind, [o, i], false)?;
    operands.matrix("dx", dx, kind, [n, i], true)?;
    let outcome = if accumulate {
        dx.f_addmm_(dy, w)
    } else {
        dy.f_mm_out(dx, w)
    };
    outcome.map(drop).map_err(torch(BACKWARD_INPUT))
}

/// `dw += dyᵀ·x` with `dy: [n, o]` and `x: [n, i]`, both fp32 or both bf16, and `dw: [o, i]`
/// contiguous fp32.
///
/// # Errors
/// The argument errors of [`Error`].
pub fn backward_weight(
    dy: &Tensor,
    x: &Tensor,
    dw: &mut Tensor,
    workspace: &mut Workspace,
) -> Result<(), Error> {
    backward_weight_by(WeightGradient::of_this_machine(), dy, x, dw, workspace)
}

/// [`backward_weight`] with the way of adding given, for tests and measurements.
///
/// # Errors
/// The argument errors of [`Error`].
pub fn backward_weight_by(
    way: WeightGradient,
    dy: &Tensor,
    x: &Tensor,
    dw: &mut Tensor,
    workspace: &mut Workspace,
) -> Result<(), Error> {
    let [n, o] = sizes(BACKWARD_WEIGHT, "dy", dy)?;
    let [_, i] = sizes(BACKWARD_WEIGHT, "x", x)?;
    let kind = float_kind(BACKWARD_WEIGHT, "dy", dy)?;
    let mut operands = Operands::new(BACKWARD_WEIGHT);
    operands.matrix("dy", dy, kind, [n, o], false)?;
    operands.matrix("x", x, kind, [n, i], false)?;
    operands.write::<f32>("dw", dw, &[o, i])?;
    if n * o * i == 0 {
        return Ok(());
    }
    if kind == Kind::Float {
        let mut add = || dw.f_addmm_(&dy.f_tr()?, x);
        return add().map(drop).map_err(torch(BACKWARD_WEIGHT));
    }
    if way == WeightGradient::Mkl && dy.is_contiguous() && x.is_contiguous() {
        let (a, b) = (as_slice(dy)?, as_slice(x)?);
        if symbol::accumulate_transposed_bf16(a, b, as_mut_slice(dw)?, [n, o, i]) {
            return Ok(());
        }
    }
    let rows = scratch_rows(o, i);
    for start in (0..o).step_by(rows) {
        let (start, len) = (start as i64, rows.min(o - start));
        let scratch = workspace.take("linear.weight_gradient", &[len, i], kind)?;
        let product = || {
            let part = dy.f_narrow(1, start, len as i64)?.f_tr()?;
            let _ = part.f_mm_out(&scratch, x)?;
            dw.f_narrow(0, start, len as i64)
        };
        let mut target = product().map_err(torch(BACKWARD_WEIGHT))?;
        cast::accumulate(&scratch, &mut target)?;
    }
    Ok(())
}

/// The most bytes of workspace that [`backward_weight`] takes for a weight `[o, i]` of `kind`.
/// Where MKL adds by itself, none are taken.
pub fn workspace_bytes(kind: Kind, [o, i]: [usize; 2]) -> usize {
    if kind == Kind::Float || o * i == 0 {
        return 0;
    }
    scratch_rows(o, i) * i * kind.elt_size_in_bytes()
}

/// Rows of a gradient `[o, i]` that are computed at a time where it is added in a second step.
fn scratch_rows(o: usize, i: usize) -> usize {
    (SCRATCH / i).clamp(1, o)
}

/// The dtype of a matrix that libtorch multiplies fast: fp32 or bf16.
pub(crate) fn float_kind(
    op: &'static str,
    name: &'static str,
    tensor: &Tensor,
) -> Result<Kind, Error> {
    match check_device(op, name, tensor)? {
        kind @ (Kind::Float | Kind::BFloat16) => Ok(kind),
        dtype => Err(Error::Unsupported {
            op,
            tensor: name,
            device: tch::Device::Cpu,
            dtype,
        }),
    }
}

/// The same function by libtorch, for autograd to differentiate.
///
/// # Errors
/// [`Error::Torch`].
pub fn reference(x: &Tensor, w: &Tensor) -> Result<Tensor, Error> {
    w.f_tr()
        .and_then(|w| x.f_matmul(&w))
        .map_err(torch("linear.reference"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::testing::*;
    use tch::Device;

    #[test]
    fn agrees_with_fp64_autograd() {
        for (kind, bound) in DTYPES {
            for (n, i, o) in [(1, 1, 1), (5, 7, 3), (67, 96, 130)] {
                let (x, w) = (normal("x", &[n, i], kind), normal("w", &[o, i], kind));
                let dy = normal("dy", &[n, o], kind);
                let mut y = poison(&[n, o], kind);
                forward(&x, &w, &mut y).unwrap();
                let (x64, w64) = (leaf(&x), leaf(&w));
                let y64 = reference(&x64, &w64).unwrap();
                assert_close("y", &y, &y64, bound);
                let expected = gradients(&y64, &dy, &[&x64, &w64]);

                let mut dx = poison(&[n, i], kind);
                backward_input(&dy, &w, &mut dx, false).unwrap();
                assert_close("dx", &dx, &expected[0], bound);
                backward_input(&dy, &w, &mut dx, true).unwrap();
                assert_close("dx twice", &dx, &(&expected[0] * 2.0), bound);

                for way in [WeightGradient::Mkl, WeightGradient::OneDnn] {
                    let mut workspace = Workspace::new(Device::Cpu);
                    let mut dw = zeros(&[o, i], Kind::Float);
                    for times in 1..=2 {
                        backward_weight_by(way, &dy, &x, &mut dw, &mut workspace).unwrap();
                        assert_close("dw", &dw, &(&expected[1] * times), bound);
                    }
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
        backward_weight_by(WeightGradient::Mkl, &dy, &x, &mut dw, &mut workspace).unwrap();
        let wide = |x: &Tensor| x.to_kind(Kind::Double);
        assert_close("dw", &dw, &wide(&dy).tr().matmul(&wide(&x)), 1e-6);
        assert_eq!(workspace.bytes(), 0);
    }

    #[test]
    fn parts_of_wider_buffers_serve_as_matrices() {
        for (kind, bound) in DTYPES {
            let (wide_x, wide_y) = (normal("x", &[33, 64], kind), normal("y", &[33, 80], kind));
            let (x, mut y) = (wide_x.narrow(1, 8, 24), wide_y.narrow(1, 16, 40));
            let w = normal("w", &[40, 24], kind);
            let untouched = wide_y.narrow(1, 0, 16).copy();
            forward(&x, &w, &mut y).unwrap();
            let wide = |x: &Tensor| x.to_kind(Kind::Double);
            assert_close("y", &y, &wide(&x).matmul(&wide(&w).tr()), bound);
            assert_eq!(bits(&wide_y.narrow(1, 0, 16)), bits(&untouched));
            let mut dw = zeros(&[40, 24], Kind::Float);
            let mut workspace = Workspace::new(Device::Cpu);
            backward_weight(&y, &x, &mut dw, &mut workspace).unwrap();
            assert_close("dw", &dw, &wide(&y).tr().matmul(&wide(&x)), bound);
        }
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
        backward_weight_by(WeightGradient::OneDnn, &dy, &x, &mut dw, &mut workspace).unwrap();
        assert_eq!(workspace.bytes(), 2 * SCRATCH as u64);
        assert_eq!(workspace_bytes(Kind::BFloat16, [27, 1 << 20]), 2 * SCRATCH);
        let expected = dy.to_kind(Kind::Float).tr().matmul(&x.to_kind(Kind::Float));
        assert_close("dw", &dw, &expected, 1e-2);
    }

    #[test]
    fn bad_arguments_are_refused() {
        let (x, w) = (zeros(&[4, 8], Kind::Float), zeros(&[6, 8], Kind::Float));
        let mut y = zeros(&[4, 6], Kind::Float);
        forward(&x, &w, &mut y).unwrap();
        assert!(forward(&x, &w.tr(), &mut y).is_err());
        assert!(forward(&x, &w.to_kind(Kind::BFloat16), &mut y).is_err());
        assert!(forward(&x.to_kind(Kind::Half), &w, &mut y).is_err());
        assert!(forward(&x, &w, &mut zeros(&[6, 4], Kind::Float).tr()).is_err());
        let mut square = zeros(&[4, 4], Kind::Float);
        let same = square.shallow_clone();
        assert!(matches!(
            forward(&same, &same, &mut square),
            Err(Error::Overlap { .. })
        ));
        let mut workspace = Workspace::new(Device::Cpu);
        let mut dw = zeros(&[6, 8], Kind::BFloat16);
        assert!(backward_weight(&y, &x, &mut dw, &mut workspace).is_err());
    }
}
