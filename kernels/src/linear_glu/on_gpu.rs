//! The kernels of `glu.cu`, around products by libtorch.

use tch::Tensor;

use super::{Activation, BACKWARD, FORWARD};
use crate::cuda::{Gpu, Grid, Kernel, Pointers, aligned, arguments, float, source, whole_warps};
use crate::product::on_gpu as product;
use crate::{Error, Workspace};

/// Elements of a row that a thread takes.
const EACH: usize = 8;

impl Activation {
    fn forward_kernel(self) -> Kernel {
        Kernel::new(
            &source::GLU,
            match self {
                Activation::Silu => "glu_forward_silu",
                Activation::GeluTanh => "glu_forward_gelu_tanh",
            },
        )
    }

    fn backward_kernel(self) -> Kernel {
        Kernel::new(
            &source::GLU,
            match self {
                Activation::Silu => "glu_backward_silu",
                Activation::GeluTanh => "glu_backward_gelu_tanh",
            },
        )
    }
}

pub(super) fn forward(
    gpu: &Gpu,
    activation: Activation,
    ([n, h], i): ([usize; 2], usize),
    x: &Tensor,
    w: &Tensor,
    gate_up: &mut Tensor,
    y: &mut Tensor,
) -> Result<(), Error> {
    let (t, t_name) = float(FORWARD, "x", x)?;
    let mut pointers = Pointers::new(FORWARD, gpu);
    pointers.read_matrix("x", x, t, [n, h])?;
    pointers.read_matrix("w", w, t, [2 * i, h])?;
    let gate_up_at = pointers.write("gate_up", gate_up, t, &[n, 2 * i])?;
    let y_at = pointers.write("y", y, t, &[n, i])?;
    product::forward(gpu, FORWARD, x, w, gate_up)?;
    let aligned = aligned(i, [gate_up_at, y_at]);
    // SAFETY: the parameters of the kernel in their order; the tensors have the sizes that it reads
    // and writes.
    unsafe {
        gpu.launch(
            activation.forward_kernel().of([t_name, ""]),
            grid(FORWARD, n, i)?,
            arguments![gate_up_at, n as u64, i as u64, aligned, y_at],
        )
    }
}

pub(super) fn backward(
    gpu: &Gpu,
    activation: Activation,
    ([n, o], i): ([usize; 2], usize),
    [dz, w, gate_up]: [&Tensor; 3],
    dgate_up: &mut Tensor,
    workspace: &mut Workspace,
) -> Result<(), Error> {
    let (t, t_name) = float(BACKWARD, "dz", dz)?;
    let mut gated = workspace.take(product::OUTPUT, &[n, i], t)?;
    let mut pointers = Pointers::new(BACKWARD, gpu);
    pointers.read_matrix("dz", dz, t, [n, o])?;
    pointers.read_matrix("w", w, t, [o, i])?;
    let gate_up = pointers.read("gate_up", gate_up, t, &[n, 2 * i])?;
    let dgate_up = pointers.write("dgate_up", dgate_up, t, &[n, 2 * i])?;
    let gated_at = pointers.write("dy", &mut gated, t, &[n, i])?;
    product::backward_input(gpu, BACKWARD, dz, w, &mut gated)?;
    let aligned = aligned(i, [gated_at, gate_up, dgate_up]);
    // SAFETY: as in `forward`.
    unsafe {
        gpu.launch(
            activation.backward_kernel().of([t_name, ""]),
            grid(BACKWARD, n, i)?,
            arguments![gated_at, gate_up, n as u64, i as u64, aligned, dgate_up],
        )
    }
}

/// Blocks that follow each other in a row, row after row.
fn grid(op: &'static str, n: usize, i: usize) -> Result<Grid, Error> {
    let threads = whole_warps(i, EACH, 256);
    Grid::new(op, n * i.div_ceil(EACH * threads), threads)
}
