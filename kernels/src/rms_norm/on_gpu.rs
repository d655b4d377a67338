//! The kernels of `rms_norm.cu`.

use tch::{Kind, Tensor};

use super::{BACKWARD, FORWARD, Gradients, PARTIAL_SUMS, Saved};
use crate::cuda::{
    Gpu, Grid, Kernel, Pointer, Pointers, aligned, arguments, float, source, whole_warps,
};
use crate::{Error, Workspace};

const FORWARD_KERNEL: Kernel = Kernel::new(&source::RMS_NORM, "rms_norm_forward");
const BACKWARD_KERNEL: Kernel = Kernel::new(&source::RMS_NORM, "rms_norm_backward");
const ADD_PARTIALS: Kernel = Kernel::new(&source::RMS_NORM, "rms_norm_add_partials");

/// Elements of a row that a thread takes.
const EACH: usize = 16;

/// Widest row whose share of the weight's gradient a block keeps in shared memory.
const WIDEST_SHARE: usize = 8192;

/// Columns of partial sums that a block adds up.
const COLUMNS: usize = 8;

pub(super) fn forward(
    gpu: &Gpu,
    [n, h]: [usize; 2],
    x: &Tensor,
    w: &Tensor,
    eps: f64,
    y: &mut Tensor,
    rstd: &mut Tensor,
) -> Result<(), Error> {
    let ((r, r_name), (t, t_name)) = (float(FORWARD, "x", x)?, float(FORWARD, "w", w)?);
    let mut pointers = Pointers::new(FORWARD, gpu);
    let x = pointers.read("x", x, r, &[n, h])?;
    let w = pointers.read("w", w, t, &[h])?;
    let y = pointers.write("y", y, t, &[n, h])?;
    let rstd = pointers.write("rstd", rstd, Kind::Float, &[n])?;
    let (delta, sum) = (Pointer::NULL, Pointer::NULL);
    let aligned = aligned(h, [x, w, y]);
    let (threads, rows) = forward_block(n, h);
    // SAFETY: the parameters of the kernel in their order; the tensors have the sizes that it reads
    // and writes.
    unsafe {
        gpu.launch(
            FORWARD_KERNEL.of([r_name, t_name]),
            Grid::plane(FORWARD, [n / rows, 1], [threads, rows])?,
            arguments![x, delta, w, eps as f32, h as u64, aligned, sum, y, rstd],
        )
    }
}

pub(super) fn backward(
    gpu: &Gpu,
    [n, h]: [usize; 2],
    dy: &Tensor,
    saved: Saved<'_>,
    gradients: Gradients<'_>,
    workspace: &mut Workspace,
) -> Result<(), Error> {
    let Saved { x, w, rstd } = saved;
    let Gradients { dx, rounded, dw } = gradients;
    let ((r, r_name), (t, t_name)) = (float(BACKWARD, "x", x)?, float(BACKWARD, "w", w)?);
    let (rows, blocks) = partition([n, h]);
    let mut partials = match dw {
        Some(_) => Some(workspace.take(PARTIAL_SUMS, &[blocks, h], Kind::Float)?),
        None => None,
    };
    let mut pointers = Pointers::new(BACKWARD, gpu);
    let dy = pointers.read("dy", dy, t, &[n, h])?;
    let x = pointers.read("x", x, r, &[n, h])?;
    let w = pointers.read("w", w, t, &[h])?;
    let rstd = pointers.read("rstd", rstd, Kind::Float, &[n])?;
    let dx = pointers.write("dx", dx, r, &[n, h])?;
    let rounded = pointers.write_optional("rounded", rounded, t, &[n, h])?;
    let dw = pointers.write_optional("dw", dw, Kind::Float, &[h])?;
    let sums = partials.as_mut();
    let sums = pointers.write_optional("partials", sums, Kind::Float, &[blocks, h])?;
    let aligned = aligned(h, [dy, x, w, dx, rounded, sums]);
    let wants_share = dw != Pointer::NULL && h <= WIDEST_SHARE;
    let share = if wants_share { h * size_of::<f32>() } else { 0 };
    let grid = Grid::new(BACKWARD, blocks, whole_warps(h, EACH, 512))?.with_shared(share);
    let (n, h_, rows) = (n as u64, h as u64, rows as u64);
    // SAFETY: the parameters of the kernel in their order; the tensors have the sizes that it reads
    // and writes, and there is a row of partial sums for each block.
    unsafe {
        gpu.launch(
            BACKWARD_KERNEL.of([r_name, t_name]),
            grid,
            arguments![dy, x, w, rstd, n, h_, rows, aligned, dx, rounded, sums],
        )?;
    }
    if dw == Pointer::NULL {
        return Ok(());
    }
    // SAFETY: as above.
    unsafe {
        gpu.launch(
            ADD_PARTIALS,
            Grid::new(BACKWARD, h.div_ceil(COLUMNS), 1024)?,
            arguments![sums, blocks as u64, h_, dw],
        )
    }
}

/// Threads of a row and rows of a block of the forward pass: several rows where one warp does for
/// each, as many as divide `n`.
fn forward_block(n: usize, h: usize) -> (usize, usize) {
    let threads = whole_warps(h, EACH, 1024);
    let most = if threads == 32 { 8 } else { 1 };
    (threads, 1 << n.trailing_zeros().min(usize::ilog2(most)))
}

/// Rows that a block of the backward pass takes, and the number of such blocks: about a thousand
/// for wide rows, and more for narrow ones while their partial sums are little beside the rows.
pub(super) fn partition([n, h]: [usize; 2]) -> (usize, usize) {
    let rows = (n * h).div_ceil(1 << 22).max(4);
    (rows, n.div_ceil(rows))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_belongs_to_one_block() {
        for n in [1, 2, 3, 8, 12, 1000, 65_536] {
            for h in [1, 96, 512, 513, 4096, 20_000] {
                let (threads, rows) = forward_block(n, h);
                assert!(
                    n.is_multiple_of(rows) && threads * rows <= 1024,
                    "{n} of {h}"
                );
                let (rows, blocks) = partition([n, h]);
                assert!(rows * blocks >= n && rows * (blocks - 1) < n, "{n} of {h}");
            }
        }
    }
}
