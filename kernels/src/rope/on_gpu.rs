//! The kernels of `rope.cu`.

use tch::{Kind, Tensor};

use super::RopeTable;
use crate::Error;
use crate::cuda::{GROUP, Gpu, Grid, Kernel, Pointers, aligned, arguments, float, source};

const ROTATE: Kernel = Kernel::new(&source::ROPE, "rope_rotate");

/// Threads of a block.
const THREADS: usize = 256;

pub(super) fn rotate(
    gpu: &Gpu,
    op: &'static str,
    table: &RopeTable,
    positions: &Tensor,
    x: &mut Tensor,
    [n, heads]: [usize; 2],
    direction: f32,
) -> Result<(), Error> {
    let (t, t_name) = float(op, "x", x)?;
    let half = table.half;
    let mut pointers = Pointers::new(op, gpu);
    let cos = pointers.read("cos", &table.cos, Kind::Float, &[table.positions, half])?;
    let sin = pointers.read("sin", &table.sin, Kind::Float, &[table.positions, half])?;
    let positions = pointers.read("positions", positions, Kind::Int64, &[n])?;
    let (x, stride) = pointers.write_heads("x", x, t, [n, heads, 2 * half])?;
    // Rows begin on the groups' boundaries, and so do both halves of each head.
    let aligned = aligned(half, [x, cos, sin]) & aligned(stride, []);
    let (n, heads, limit) = (n as u64, heads as u32, table.positions as u64);
    // SAFETY: the parameters of the kernel in their order; the tensors have the sizes that it reads
    // and writes, and it looks nothing up past the table's end.
    unsafe {
        gpu.launch(
            ROTATE.of([t_name, ""]),
            grid(op, n as usize * heads as usize, half)?,
            arguments![
                x,
                n,
                heads,
                half as u32,
                stride as u64,
                cos,
                sin,
                limit,
                positions,
                direction,
                aligned,
            ],
        )
    }
}

/// Blocks of as many heads as there is room for, a thread for each group of a half.
fn grid(op: &'static str, heads: usize, half: usize) -> Result<Grid, Error> {
    let groups = half.div_ceil(GROUP).min(THREADS);
    let together = THREADS / groups;
    Grid::plane(op, [heads.div_ceil(together), 1], [groups, together])
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn every_head_has_its_threads() {
        for half in [1, 4, 8, 9, 64, 128, 2048, 5000] {
            for heads in [1, 7, 1000] {
                let grid = grid("test", heads, half).unwrap();
                let [groups, together] = grid.threads.map(|threads| threads as usize);
                assert!(groups * together <= THREADS);
                assert!(groups * GROUP >= half || groups == THREADS);
                assert!(grid.blocks[0] as usize * together >= heads);
            }
        }
    }
}
