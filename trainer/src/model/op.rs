//! Running one operation of a block, forwards and backwards.

use oxitron_kernels::{
    Error, RopeTable, Workspace, attention, linear, linear_add, linear_glu, linear_rope, rms_norm,
};
use tch::Tensor;

use super::{
    ModelError, Stopwatch,
    activations::{Slots, StreamGradient},
    batch::Batch,
    program::{Op, Slot, SlotSpec},
};

/// Sizes that operations need beyond the shapes of their tensors.
#[derive(Clone, Copy, Debug)]
pub(super) struct Heads {
    pub(super) query: i64,
    pub(super) key: i64,
    pub(super) width: i64,
}

/// What the operations of one block run on.
pub(super) struct BlockRun<'a> {
    pub(super) layer: &'a str,
    pub(super) batch: &'a Batch,
    pub(super) rope: &'a RopeTable,
    pub(super) heads: Heads,
    pub(super) norm_eps: f64,
    pub(super) weights: &'a [Tensor],
    pub(super) slots: &'a mut Slots,
    pub(super) workspace: &'a mut Workspace,
    /// What the slots are called.
    pub(super) specs: &'a [SlotSpec],
    pub(super) stopwatch: &'a mut Stopwatch,
}

/// Views of a fused projection, `[samples, seq_len, heads, head_dim]` each.
struct Projections {
    query: Tensor,
    key: Tensor,
    value: Tensor,
}

impl BlockRun<'_> {
    /// Runs `op` and fills those of the slots it writes that are `wanted`; what makes none of them
    /// is not run.
    pub(super) fn forward(
        &mut self,
        op: &Op,
        wanted: impl Fn(Slot) -> bool,
    ) -> Result<(), ModelError> {
        self.run_forward(op, wanted)
            .map_err(|source| self.failed(source))
    }

    /// Runs `op` backwards: reads the gradients of the slots that it wrote, adds to the gradients
    /// of its weights, and fills the gradients of the slots that it read. The gradient of the
    /// residual stream is added to by norms, and read at the ends of branches.
    pub(super) fn backward(
        &mut self,
        op: &Op,
        stream: &mut StreamGradient,
        gradients: &mut Slots,
        weight_gradients: &mut [Option<Tensor>],
    ) -> Result<(), ModelError> {
        self.run_backward(op, stream, gradients, weight_gradients)
            .map_err(|source| self.failed(source))
    }

    fn failed(&self, source: Error) -> ModelError {
        ModelError::Kernel {
            layer: self.layer.to_owned(),
            source,
        }
    }

    /// An operation ends that writes `slot`, or whose result `slot` was.
    fn lap(&mut self, operation: &'static str, slot: Slot) {
        self.stopwatch.lap(operation, self.specs[slot].name);
    }

    fn run_forward(&mut self, op: &Op, wanted: impl Fn(Slot) -> bool) -> Result<(), Error> {
        match *op {
            Op::RmsNorm { x, weight, y, rstd } if wanted(y) || wanted(rstd) => {
                let [x, y_out, rstd] = self.slots.get([x, y, rstd])?;
                rms_norm::forward(x, &self.weights[weight], self.norm_eps, y_out, rstd)?;
                self.lap("rms_norm", y);
            }
            Op::LinearRope { x, weight, qkv } if wanted(qkv) => {
                let [x, qkv_out] = self.slots.get([x, qkv])?;
                let rotation = rotation(self.rope, self.batch, self.heads);
                let weight = &self.weights[weight];
                linear_rope::forward(x, weight, &rotation, qkv_out, self.workspace)?;
                self.lap("linear", qkv);
            }
            Op::Attention {
                qkv,
                y,
                log_sum_exp,
            } if wanted(y) || wanted(log_sum_exp) => {
                let [qkv, y_out, log_sum_exp] = self.slots.get([qkv, y, log_sum_exp])?;
                let heads = projections(qkv, self.batch, self.heads)?;
                let mut log_sum_exp = per_head(log_sum_exp, self.batch, self.heads)?;
                let mut y_out = heads_view(y_out, self.batch, self.heads)?;
                let inputs = attention_inputs(self.batch, self.heads, &heads);
                attention::forward(&inputs, &mut y_out, &mut log_sum_exp, self.workspace)?;
                self.lap("attention", y);
            }
            Op::LinearAdd {
                x,
                weight,
                residual,
                sum,
            } if wanted(sum) => self.add_product(x, weight, residual, sum)?,
            Op::FeedForward {
                activation,
                x,
                gate_up_weight,
                gate_up,
                gated,
                down_weight,
                residual,
                sum,
            } => {
                if wanted(gate_up) || wanted(gated) {
                    let [x, gate_up_out, gated_out] = self.slots.get([x, gate_up, gated])?;
                    let weight = &self.weights[gate_up_weight];
                    linear_glu::forward(
                        activation,
                        x,
                        weight,
                        gate_up_out,
                        gated_out,
                        self.workspace,
                    )?;
                    self.lap("linear", gate_up);
                }
                if wanted(sum) {
                    self.add_product(gated, down_weight, residual, sum)?;
                }
            }
            Op::RmsNorm { .. }
            | Op::LinearRope { .. }
            | Op::Attention { .. }
            | Op::LinearAdd { .. } => {}
        }
        Ok(())
    }

    /// `sum = residual + x · weightᵀ`
    fn add_product(
        &mut self,
        x: Slot,
        weight: usize,
        residual: Slot,
        sum: Slot,
    ) -> Result<(), Error> {
        let [x, residual, sum_out] = self.slots.get([x, residual, sum])?;
        linear_add::forward(x, &self.weights[weight], residual, sum_out, self.workspace)?;
        self.lap("linear", sum);
        Ok(())
    }

    fn run_backward(
        &mut self,
        op: &Op,
        stream: &mut StreamGradient,
        gradients: &mut Slots,
        weight_gradients: &mut [Option<Tensor>],
    ) -> Result<(), Error> {
        match *op {
            Op::RmsNorm { x, weight, y, rstd } => {
                let [d_y] = gradients.get([y])?;
                let [x, rstd] = self.slots.get([x, rstd])?;
                let (dx, rounded) = stream.parts();
                let saved = rms_norm::Saved {
                    x,
                    w: &self.weights[weight],
                    rstd,
                };
                let dw = weight_gradients[weight].as_mut();
                let gradients = rms_norm::Gradients { dx, rounded, dw };
                rms_norm::backward(d_y, saved, gradients, self.workspace)?;
                self.lap("rms_norm backward", y);
            }
            Op::LinearRope { x, weight, qkv } => {
                let [d_x, d_qkv] = gradients.get([x, qkv])?;
                let rotation = rotation(self.rope, self.batch, self.heads);
                linear_rope::backward(&rotation, d_qkv)?;
                self.lap("rope backward", qkv);
                self.weight_gradient(d_qkv, x, weight, qkv, weight_gradients)?;
                linear::backward_input(d_qkv, &self.weights[weight], d_x, self.workspace)?;
                self.lap("linear dgrad", qkv);
            }
            Op::Attention {
                qkv,
                y,
                log_sum_exp,
            } => {
                let [d_qkv, d_y] = gradients.get([qkv, y])?;
                let [qkv, y_out, log_sum_exp] = self.slots.get([qkv, y, log_sum_exp])?;
                let heads = projections(qkv, self.batch, self.heads)?;
                let log_sum_exp = per_head(log_sum_exp, self.batch, self.heads)?;
                let y_out = heads_view(y_out, self.batch, self.heads)?;
                let d_y = heads_view(d_y, self.batch, self.heads)?;
                let mut gradient = projections(d_qkv, self.batch, self.heads)?;
                let gradients = attention::Gradients {
                    dq: &mut gradient.query,
                    dk: &mut gradient.key,
                    dv: &mut gradient.value,
                };
                let inputs = attention_inputs(self.batch, self.heads, &heads);
                let workspace = &mut *self.workspace;
                attention::backward(&inputs, &y_out, &log_sum_exp, &d_y, gradients, workspace)?;
                self.lap("attention backward", y);
            }
            Op::LinearAdd { x, weight, sum, .. } => {
                let [d_x] = gradients.get([x])?;
                let d_sum = stream.branch();
                self.weight_gradient(d_sum, x, weight, sum, weight_gradients)?;
                linear::backward_input(d_sum, &self.weights[weight], d_x, self.workspace)?;
                self.lap("linear dgrad", sum);
            }
            Op::FeedForward {
                activation,
                x,
                gate_up_weight,
                gate_up,
                gated,
                down_weight,
                sum,
                ..
            } => {
                let [d_x, d_gate_up] = gradients.get([x, gate_up])?;
                let d_sum = stream.branch();
                self.weight_gradient(d_sum, gated, down_weight, sum, weight_gradients)?;
                let [gate_up_out] = self.slots.get([gate_up])?;
                let down = &self.weights[down_weight];
                linear_glu::backward(
                    activation,
                    d_sum,
                    down,
                    gate_up_out,
                    d_gate_up,
                    self.workspace,
                )?;
                self.lap("linear dgrad", sum);
                self.weight_gradient(d_gate_up, x, gate_up_weight, gate_up, weight_gradients)?;
                let weight = &self.weights[gate_up_weight];
                linear::backward_input(d_gate_up, weight, d_x, self.workspace)?;
                self.lap("linear dgrad", gate_up);
            }
        }
        Ok(())
    }

    /// `weight_gradient += d_yᵀ · x`, if the weight is trained. `y` names what was computed.
    fn weight_gradient(
        &mut self,
        d_y: &Tensor,
        x: Slot,
        weight: usize,
        y: Slot,
        weight_gradients: &mut [Option<Tensor>],
    ) -> Result<(), Error> {
        if let Some(d_weight) = weight_gradients[weight].as_mut() {
            let [x] = self.slots.get([x])?;
            linear::backward_weight(d_y, x, d_weight, self.workspace)?;
            self.lap("linear wgrad", y);
        }
        Ok(())
    }
}

/// How query and key heads are rotated.
fn rotation<'t>(table: &'t RopeTable, batch: &'t Batch, heads: Heads) -> linear_rope::Rotation<'t> {
    linear_rope::Rotation {
        table,
        positions: &batch.positions,
        heads: (heads.query + heads.key) as usize,
    }
}

fn attention_inputs<'t>(
    batch: &'t Batch,
    heads: Heads,
    projections: &'t Projections,
) -> attention::Inputs<'t> {
    attention::Inputs {
        q: &projections.query,
        k: &projections.key,
        v: &projections.value,
        documents: &batch.documents,
        starts: batch.starts.as_ref(),
        scale: 1.0 / (heads.width as f64).sqrt(),
    }
}

fn projections(qkv: &Tensor, batch: &Batch, heads: Heads) -> Result<Projections, Error> {
    let (samples, seq_len) = (batch.samples as i64, batch.seq_len as i64);
    let all = qkv
        .f_view([samples, seq_len, heads.query + 2 * heads.key, heads.width])
        .map_err(torch)?;
    Ok(Projections {
        query: all.f_narrow(2, 0, heads.query).map_err(torch)?,
        key: all.f_narrow(2, heads.query, heads.key).map_err(torch)?,
        value: all
            .f_narrow(2, heads.query + heads.key, heads.key)
            .map_err(torch)?,
    })
}

fn heads_view(y: &Tensor, batch: &Batch, heads: Heads) -> Result<Tensor, Error> {
    y.f_view([
        batch.samples as i64,
        batch.seq_len as i64,
        heads.query,
        heads.width,
    ])
    .map_err(torch)
}

/// A statistic per query head, `[samples, heads, seq_len]`.
fn per_head(statistic: &Tensor, batch: &Batch, heads: Heads) -> Result<Tensor, Error> {
    let shape = [batch.samples as i64, heads.query, batch.seq_len as i64];
    statistic.f_view(shape).map_err(torch)
}

fn torch(source: tch::TchError) -> Error {
    Error::Torch {
        op: "block",
        source,
    }
}
