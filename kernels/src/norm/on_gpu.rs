//! The kernels of `norm.cu`.

use tch::{Kind, Tensor};

use super::OP;
use crate::cuda::{Gpu, Grid, Kernel, Pointers, arguments, source};
use crate::{Error, Workspace};

const PARTIAL: Kernel = Kernel::new(&source::NORM, "sum_of_squares_partial");
const FINISH: Kernel = Kernel::new(&source::NORM, "sum_of_squares_finish");

/// Names of buffers.
const SUMS: &str = "norm.partial_sums";
const COUNTS: &str = "norm.partial_counts";

/// Most blocks, and elements that a block takes at least.
const BLOCKS: usize = 8192;

/// Threads of a block.
const THREADS: usize = 256;

pub(super) fn add_sum_of_squares(
    gpu: &Gpu,
    n: usize,
    x: &Tensor,
    total: &mut Tensor,
    workspace: &mut Workspace,
) -> Result<(), Error> {
    let share = block_elements(n);
    let blocks = n.div_ceil(share);
    let mut sums = workspace.take(SUMS, &[blocks], Kind::Double)?;
    let mut counts = workspace.take(COUNTS, &[blocks], Kind::Double)?;
    let mut pointers = Pointers::new(OP, gpu);
    let x = pointers.read("x", x, Kind::Float, &[n])?;
    let total = pointers.write("total", total, Kind::Double, &[2])?;
    let sums = pointers.write("partial_sums", &mut sums, Kind::Double, &[blocks])?;
    let counts = pointers.write("partial_counts", &mut counts, Kind::Double, &[blocks])?;
    if blocks == 0 {
        return Ok(());
    }
    // SAFETY: the parameters of the kernels in their order; there is a partial sum for each block,
    // and `total` has two numbers.
    unsafe {
        gpu.launch(
            PARTIAL.of(["f32", ""]),
            Grid::new(OP, blocks, THREADS)?,
            arguments![x, n as u64, share as u64, sums, counts],
        )?;
        gpu.launch(
            FINISH,
            Grid::new(OP, 1, THREADS)?,
            arguments![sums, counts, blocks as u32, total, total.after::<f64>(1)],
        )
    }
}

/// Elements of a block for `n` in all.
fn block_elements(n: usize) -> usize {
    n.div_ceil(BLOCKS).next_multiple_of(BLOCKS).max(BLOCKS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_whole_groups_and_not_too_many() {
        for n in (1..100_000)
            .step_by(997)
            .chain([1 << 26, (1 << 26) + 1, 7_000_000_000])
        {
            let share = block_elements(n);
            assert!(
                share.is_multiple_of(BLOCKS) && n.div_ceil(share) <= BLOCKS,
                "{n}"
            );
        }
    }
}
