//! The kernels of `adamw.cu`.

use tch::{Kind, Tensor};

use super::{AdamW, OP, State};
use crate::Error;
use crate::cuda::{GROUP, Gpu, Grid, Kernel, Plain, Pointer, Pointers, arguments, float, source};
use crate::decision::{self, Decision};

const STEP: Kernel = Kernel::new(&source::ADAMW, "adamw");

/// Threads of a block, each with one group of elements.
const THREADS: usize = 256;

// SAFETY: five numbers of 64 bits, as the kernel's struct of the same name.
unsafe impl Plain for AdamW {}

pub(super) fn step(
    gpu: &Gpu,
    n: usize,
    adamw: &AdamW,
    state: State<'_>,
    grad: &Tensor,
    weight_out: Option<&mut Tensor>,
    decision: &Decision,
) -> Result<(), Error> {
    let (m, m_name) = float(OP, "exp_avg", state.exp_avg)?;
    let (t, t_name) = match &weight_out {
        Some(out) => float(OP, "weight_out", out)?,
        None => (Kind::Float, "f32"),
    };
    let mut pointers = Pointers::new(OP, gpu);
    let grad = pointers.read("grad", grad, Kind::Float, &[n])?;
    let master = pointers.write("master", state.master, Kind::Float, &[n])?;
    let first = pointers.write("exp_avg", state.exp_avg, m, &[n])?;
    let second = pointers.write("exp_avg_sq", state.exp_avg_sq, m, &[n])?;
    let out: Pointer = pointers.write_optional("weight_out", weight_out, t, &[n])?;
    let bytes = [size_of::<decision::State>()];
    let decision = pointers.read("decision", decision.tensor(), Kind::Uint8, &bytes)?;
    // SAFETY: the parameters of the kernel in their order; all tensors have `n` elements.
    unsafe {
        gpu.launch(
            STEP.of([m_name, t_name]),
            Grid::flat(OP, n, THREADS, GROUP)?,
            arguments![master, first, second, grad, out, n as u64, *adamw, decision],
        )
    }
}
