//! The kernels of `embedding.cu`, and what they need to know of a batch.

use tch::{Device, Kind, Tensor};

use super::{BACKWARD, FORWARD, TokenIds};
use crate::Error;
use crate::cuda::{
    Gpu, Grid, Kernel, Pointers, aligned, arguments, float, source, upload, whole_warps,
};

const FORWARD_KERNEL: Kernel = Kernel::new(&source::EMBEDDING, "embedding_forward");
const BACKWARD_KERNEL: Kernel = Kernel::new(&source::EMBEDDING, "embedding_backward");

/// Rows that a block of the forward pass has under way.
const ROWS: usize = 4;

/// Columns and ids of a block of the backward pass, and its threads.
const COLUMNS: usize = 256;
const SEGMENTS: usize = 16;
const THREADS: usize = 512;

/// Where each id of a batch occurs: found on the host, which has the ids anyway, so that a GPU can
/// add an id's gradients up in the order of their tokens.
#[derive(Debug)]
pub(super) struct Occurrences {
    /// `[n]` int32: tokens, those of one id side by side and rising.
    order: Tensor,
    /// `[segments + 1]` int32: where an id's tokens begin in it.
    starts: Tensor,
    segments: usize,
}

impl Occurrences {
    pub(super) fn new(ids: &[i64], device: Device) -> Result<Self, Error> {
        let (order, starts) = group(ids);
        Ok(Occurrences {
            order: upload(&order, device)?,
            starts: upload(&starts, device)?,
            segments: starts.len() - 1,
        })
    }
}

/// Tokens by their ids, and where each id's tokens begin; the last start is the number of tokens.
fn group(ids: &[i64]) -> (Vec<i32>, Vec<i32>) {
    let mut order: Vec<i32> = (0..ids.len() as i32).collect();
    // Stable: tokens of one id stay in their order.
    order.sort_by_key(|&token| ids[token as usize]);
    let id = |at: usize| ids[order[at] as usize];
    let begins = |&at: &usize| at == 0 || id(at) != id(at - 1);
    let starts = (0..order.len()).filter(begins).chain([order.len()]);
    let starts = starts.map(|at| at as i32).collect();
    (order, starts)
}

pub(super) fn forward(
    gpu: &Gpu,
    [n, v, h]: [usize; 3],
    ids: &TokenIds,
    w: &Tensor,
    y: &mut Tensor,
) -> Result<(), Error> {
    let ((t, t_name), (r, r_name)) = (float(FORWARD, "w", w)?, float(FORWARD, "y", y)?);
    let mut pointers = Pointers::new(FORWARD, gpu);
    let ids = pointers.read("ids", ids.tensor(), Kind::Int64, &[n])?;
    let w = pointers.read("w", w, t, &[v, h])?;
    let y = pointers.write("y", y, r, &[n, h])?;
    let aligned = aligned(h, [w, y]);
    // SAFETY: the parameters of the kernel in their order; the tensors have the sizes that it reads
    // and writes.
    unsafe {
        gpu.launch(
            FORWARD_KERNEL.of([t_name, r_name]),
            Grid::new(FORWARD, n.div_ceil(ROWS), whole_warps(h, 8, 512))?,
            arguments![ids, w, v as u64, n as u64, h as u64, aligned, y],
        )
    }
}

pub(super) fn backward(
    gpu: &Gpu,
    [n, v, h]: [usize; 3],
    ids: &TokenIds,
    dy: &Tensor,
    dw: &mut Tensor,
) -> Result<(), Error> {
    let (r, r_name) = float(BACKWARD, "dy", dy)?;
    let Some(Occurrences {
        order,
        starts,
        segments,
    }) = &ids.occurrences
    else {
        let message = "the ids were made for the CPU".to_owned();
        return Err(Error::Argument {
            op: BACKWARD,
            message,
        });
    };
    let mut pointers = Pointers::new(BACKWARD, gpu);
    let order = pointers.read("order", order, Kind::Int, &[n])?;
    let starts = pointers.read("starts", starts, Kind::Int, &[segments + 1])?;
    let ids = pointers.read("ids", ids.tensor(), Kind::Int64, &[n])?;
    let dy = pointers.read("dy", dy, r, &[n, h])?;
    let dw = pointers.write("dw", dw, Kind::Float, &[v, h])?;
    let aligned = aligned(h, [dy, dw]);
    let blocks = h.div_ceil(COLUMNS) * segments.div_ceil(SEGMENTS);
    let segments = *segments as u32;
    // SAFETY: as in `forward`; `starts` rises from 0 to `n`, and `order` has tokens below `n`.
    unsafe {
        gpu.launch(
            BACKWARD_KERNEL.of([r_name, ""]),
            Grid::new(BACKWARD, blocks, THREADS)?,
            arguments![
                order, starts, segments, ids, dy, v as u64, h as u64, aligned, dw
            ],
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_of_one_id_are_neighbours_in_their_order() {
        assert_eq!(group(&[]), (vec![], vec![0]));
        let (order, starts) = group(&[3, 0, 3, 10, 3, 0, 9]);
        assert_eq!(order, [1, 5, 0, 2, 4, 6, 3]);
        assert_eq!(starts, [0, 2, 5, 6, 7]);
    }
}
