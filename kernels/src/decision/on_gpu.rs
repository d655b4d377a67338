//! The kernel of `control.cu`.

use tch::{Kind, Tensor};

use super::{Betas, Decision, Limits, OP, RECORD, State};
use crate::Error;
use crate::cuda::{Gpu, Grid, Kernel, Pointers, arguments, source};

const DECIDE: Kernel = Kernel::new(&source::CONTROL, "decide");

pub(super) fn decide(
    gpu: &Gpu,
    sums: &Tensor,
    limits: &Limits,
    betas: Betas,
    record: &mut Tensor,
    decision: &mut Decision,
) -> Result<(), Error> {
    let mut pointers = Pointers::new(OP, gpu);
    let sums = pointers.read("sums", sums, Kind::Double, &[sums.numel()])?;
    let record = pointers.write("record", record, Kind::Double, &[RECORD])?;
    let bytes = [size_of::<State>()];
    let decision = pointers.write("decision", &mut decision.state, Kind::Uint8, &bytes)?;
    let Limits {
        clip_norm,
        loss,
        grad_norm,
    } = *limits;
    let Betas { first, second } = betas;
    // SAFETY: the parameters of the kernel in their order; `sums` has been found long enough.
    unsafe {
        gpu.launch(
            DECIDE,
            Grid::new(OP, 1, 1)?,
            arguments![
                sums, clip_norm, loss, grad_norm, first, second, record, decision
            ],
        )
    }
}
