//! The kernels of `cross_entropy.cu`, between products by libtorch.

use tch::{Kind, Tensor};

use super::{Gradients, Inputs, LOGITS, LOSSES, Losses, OP};
use crate::cuda::{
    Gpu, Grid, Kernel, Pointer, Pointers, aligned, arguments, float, source, whole_warps,
};
use crate::error::torch;
use crate::product::on_gpu as product;
use crate::{Error, Workspace};

const LOSS: Kernel = Kernel::new(&source::CROSS_ENTROPY, "cross_entropy");
const SUM: Kernel = Kernel::new(&source::CROSS_ENTROPY, "sum_losses");

/// Elements of a row that a thread takes at a time.
const EACH: usize = 32;

/// Dynamic shared memory in which a row's beginning waits for the second walk: two blocks share a
/// multiprocessor of those that train (A100, H100 and newer).
const KEPT_BYTES: usize = 64 << 10;

pub(super) fn run(
    gpu: &Gpu,
    [n, h, v]: [usize; 3],
    inputs: &Inputs<'_>,
    losses: Losses<'_>,
    gradients: Option<Gradients<'_>>,
    workspace: &mut Workspace,
) -> Result<(), Error> {
    let (t, t_name) = float(OP, "x", inputs.x)?;
    let gradient = i32::from(gradients.is_some());
    let Gradients { mut dx, mut dw } = gradients.unwrap_or_default();
    let mut scratch;
    let per_token = match losses.per_token {
        Some(per_token) => per_token,
        None => {
            scratch = workspace.take(LOSSES, &[n], Kind::Float)?;
            &mut scratch
        }
    };
    let mut pointers = Pointers::new(OP, gpu);
    pointers.read_matrix("x", inputs.x, t, [n, h])?;
    pointers.read_matrix("w", inputs.w, t, [v, h])?;
    if let Some(dx) = dx.as_deref_mut() {
        pointers.write_matrix("dx", dx, t, [n, h])?;
    }
    if let Some(dw) = dw.as_deref_mut() {
        pointers.write("dw", dw, Kind::Float, &[v, h])?;
    }
    let targets = pointers.read("targets", inputs.targets, Kind::Int64, &[n])?;
    let weights = pointers.read_optional("weights", inputs.weights, Kind::Float, &[n])?;
    let per_token = pointers.write("per_token", per_token, Kind::Float, &[n])?;
    let total = pointers.write("sum", losses.sum, Kind::Double, &[1])?;

    let kept = if gradient == 0 { 0 } else { KEPT_BYTES };
    let kept_elements = (kept / t.elt_size_in_bytes()) as u64;
    let threads = whole_warps(v, EACH, 512);
    for start in (0..n).step_by(inputs.chunk) {
        let len = inputs.chunk.min(n - start);
        let rows = |t: &Tensor| t.f_narrow(0, start as i64, len as i64).map_err(torch(OP));
        let x = rows(inputs.x)?;
        let mut logits = workspace.take(LOGITS, &[len, v], t)?;
        product::forward(gpu, OP, &x, inputs.w, &mut logits)?;
        let at = Pointers::new(OP, gpu).write("logits", &mut logits, t, &[len, v])?;
        let part =
            |whole: Pointer| whole.after::<f32>(if whole == Pointer::NULL { 0 } else { start });
        let (vocab, aligned) = (inputs.vocab_size as u64, aligned(v, [at]));
        let targets = targets.after::<i64>(start);
        // SAFETY: the parameters of the kernel in their order; the tensors have the sizes that it
        // reads and writes, from this chunk's first token on.
        unsafe {
            gpu.launch(
                LOSS.of([t_name, ""]),
                Grid::new(OP, len, threads)?.with_shared(kept),
                arguments![
                    at,
                    v as u64,
                    vocab,
                    kept_elements,
                    targets,
                    part(weights),
                    gradient,
                    aligned,
                    part(per_token),
                ],
            )?;
        }
        if let Some(dx) = dx.as_deref_mut() {
            product::backward_input(gpu, OP, &logits, inputs.w, &mut rows(dx)?)?;
        }
        if let Some(dw) = dw.as_deref_mut() {
            product::backward_weight(gpu, OP, &logits, &x, dw)?;
        }
    }
    if n == 0 {
        return Ok(());
    }
    // SAFETY: as above; there are `n` losses.
    unsafe {
        gpu.launch(
            SUM,
            Grid::new(OP, 1, 1024)?,
            arguments![per_token, n as u64, total],
        )
    }
}
