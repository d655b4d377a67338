//! The kernels of `cast.cu`.

use tch::{Kind, Tensor};

use super::{ACCUMULATE, FORWARD};
use crate::Error;
use crate::cuda::{Gpu, Grid, Kernel, Pointers, arguments, float, source};

const CAST: Kernel = Kernel::new(&source::CAST, "cast");
const ACCUMULATE_KERNEL: Kernel = Kernel::new(&source::CAST, "accumulate");
const ADD: Kernel = Kernel::new(&source::CAST, "add");

/// Threads of a block, and elements of a thread.
const THREADS: usize = 256;
const EACH: usize = 16;

pub(super) fn forward(
    gpu: &Gpu,
    shape: &[usize],
    x: &Tensor,
    out: &mut Tensor,
) -> Result<(), Error> {
    let ((a, a_name), (b, b_name)) = (float(FORWARD, "x", x)?, float(FORWARD, "out", out)?);
    let n: usize = shape.iter().product();
    let mut pointers = Pointers::new(FORWARD, gpu);
    let x = pointers.read("x", x, a, shape)?;
    let out = pointers.write("out", out, b, shape)?;
    let grid = Grid::flat(FORWARD, n, THREADS, EACH)?;
    // SAFETY: the parameters of the kernel in their order; both tensors have `n` elements.
    unsafe {
        gpu.launch(
            CAST.of([a_name, b_name]),
            grid,
            arguments![x, n as u64, out],
        )
    }
}

pub(super) fn accumulate(
    gpu: &Gpu,
    shape: &[usize],
    x: &Tensor,
    out: &mut Tensor,
) -> Result<(), Error> {
    let (a, a_name) = float(ACCUMULATE, "x", x)?;
    let n: usize = shape.iter().product();
    let mut pointers = Pointers::new(ACCUMULATE, gpu);
    let x = pointers.read("x", x, a, shape)?;
    let out = pointers.write("out", out, Kind::Float, shape)?;
    let grid = Grid::flat(ACCUMULATE, n, THREADS, EACH)?;
    // SAFETY: the parameters of the kernel in their order; both tensors have `n` elements.
    unsafe {
        gpu.launch(
            ACCUMULATE_KERNEL.of([a_name, ""]),
            grid,
            arguments![x, n as u64, out],
        )
    }
}

/// `sum = residual + product`, added in fp32: `residual` and `sum` in R, `product` in T, all `[n,
/// o]` and contiguous.
pub(crate) fn add(
    op: &'static str,
    gpu: &Gpu,
    shape: [usize; 2],
    residual: &Tensor,
    product: &Tensor,
    sum: &mut Tensor,
) -> Result<(), Error> {
    let ((r, r_name), (t, t_name)) = (float(op, "residual", residual)?, float(op, "x", product)?);
    let n = shape[0] * shape[1];
    let mut pointers = Pointers::new(op, gpu);
    let residual = pointers.read("residual", residual, r, &shape)?;
    let product = pointers.read("product", product, t, &shape)?;
    let sum = pointers.write("sum", sum, r, &shape)?;
    let grid = Grid::flat(op, n, THREADS, EACH)?;
    // SAFETY: the parameters of the kernel in their order; the tensors have `n` elements.
    unsafe {
        gpu.launch(
            ADD.of([r_name, t_name]),
            grid,
            arguments![residual, product, n as u64, sum],
        )
    }
}
