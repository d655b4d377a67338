//! Running one operation of a block, forwards and backwards.

use oxitron_kernels::{
    Error, RopeTable, Workspace, add, attention, cast, linear, rms_norm, rope, swiglu,
};
use tch::Tensor;

use super::{
    ModelError, Stopwatch,
    activations::Slots,
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
    /// Runs `op` and fills the slots that it writes.
    pub(super) fn forward(&mut self, op: &Op) -> Result<(), ModelError> {
        self.run_forward(op).map_err(|source| self.failed(source))?;
        let (name, _) = op.names();
        self.stopwatch.lap(name, self.specs[op.result()].name);
        Ok(())
    }

    /// Runs `op` backwards: reads the gradients of the slots that it wrote, adds to the gradients
    /// of its weights, and fills the gradients of the slots that it read. The residual stream's
    /// gradient is added to, since it also flows around the sub-block.
    pub(super) fn backward(
        &mut self,
        op: &Op,
        gradients: &mut Slots,
        weight_gradients: &mut [Option<Tensor>],
    ) -> Result<(), ModelError> {
        self.run_backward(op, gradients, weight_gradients)
            .map_err(|source| self.failed(source))?;
        let (_, name) = op.names();
        self.stopwatch.lap(name, self.specs[op.result()].name);
        Ok(())
    }

    fn failed(&self, source: Error) -> ModelError {
        ModelError::Kernel {
            layer: self.layer.to_owned(),
            source,
        }
    }

    fn run_forward(&mut self, op: &Op) -> Result<(), Error> {
        match *op {
            Op::RmsNorm { x, weight, y, rstd } => {
                let [x, y, rstd] = self.slots.get([x, y, rstd])?;
                rms_norm::forward(x, &self.weights[weight], self.norm_eps, y, rstd)
            }
            Op::Linear { x, weight, y } => {
                let [x, y] = self.slots.get([x, y])?;
                linear::forward(x, &self.weights[weight], y)
            }
            Op::Rope { qkv } => {
                let mut rotated = self.rotated_heads(qkv)?;
                rope::forward(self.rope, &self.batch.positions, &mut rotated)
            }
            Op::Attention {
                qkv,
                y,
                log_sum_exp,
            } => {
                let [qkv, y, log_sum_exp] = self.slots.get([qkv, y, log_sum_exp])?;
                let heads = projections(qkv, self.batch, self.heads)?;
                let mut log_sum_exp = per_head(log_sum_exp, self.batch, self.heads)?;
                let mut y = heads_view(y, self.batch, self.heads)?;
                let inputs = attention_inputs(self.batch, self.heads, &heads);
                attention::forward(&inputs, &mut y, &mut log_sum_exp, self.workspace)
            }
            Op::SwiGlu { gate_up, y } => {
                let [gate_up, y] = self.slots.get([gate_up, y])?;
                swiglu::forward(gate_up, y)
            }
            Op::Add {
                residual,
                delta,
                sum,
            } => {
                let [residual, delta, sum] = self.slots.get([residual, delta, sum])?;
                add::forward(residual, delta, sum)
            }
        }
    }

    fn run_backward(
        &mut self,
        op: &Op,
        gradients: &mut Slots,
        weight_gradients: &mut [Option<Tensor>],
    ) -> Result<(), Error> {
        match *op {
            Op::RmsNorm { x, weight, y, rstd } => {
                let [d_x, d_y] = gradients.get([x, y])?;
                let [x, rstd] = self.slots.get([x, rstd])?;
                let d_weight = weight_gradients[weight].as_mut();
                let (weight, workspace) = (&self.weights[weight], &mut *self.workspace);
                rms_norm::backward(d_y, x, weight, rstd, d_x, d_weight, workspace)
            }
            Op::Linear { x, weight, y } => {
                let [d_x, d_y] = gradients.get([x, y])?;
                let [x] = self.slots.get([x])?;
                if let Some(d_weight) = weight_gradients[weight].as_mut() {
                    linear::backward_weight(d_y, x, d_weight, self.workspace)?;
                    self.stopwatch.lap("linear wgrad", self.specs[y].name);
                }
                linear::backward_input(d_y, &self.weights[weight], d_x, false)
            }
            Op::Rope { qkv } => {
                let [d_qkv] = gradients.get([qkv])?;
                let mut rotated = rotated_heads(d_qkv, self.heads)?;
                rope::backward(self.rope, &self.batch.positions, &mut rotated)
            }
            Op::Attention {
                qkv,
                y,
                log_sum_exp,
            } => {
                let [d_qkv, d_y] = gradients.get([qkv, y])?;
                let [qkv, y, log_sum_exp] = self.slots.get([qkv, y, log_sum_exp])?;
                let heads = projections(qkv, self.batch, self.heads)?;
                let log_sum_exp = per_head(log_sum_exp, self.batch, self.heads)?;
                let y = heads_view(y, self.batch, self.heads)?;
                let d_y = heads_view(d_y, self.batch, self.heads)?;
                let mut gradient = projections(d_qkv, self.batch, self.heads)?;
                let gradients = attention::Gradients {
                    dq: &mut gradient.query,
                    dk: &mut gradient.key,
                    dv: &mut gradient.value,
                };
                let inputs = attention_inputs(self.batch, self.heads, &heads);
                let workspace = &mut *self.workspace;
                attention::backward(&inputs, &y, &log_sum_exp, &d_y, gradients, workspace)
            }
            Op::SwiGlu { gate_up, y } => {
                let [d_gate_up, d_y] = gradients.get([gate_up, y])?;
                let [gate_up] = self.slots.get([gate_up])?;
                swiglu::backward(d_y, gate_up, d_gate_up)
            }
            // The residual stream's gradient passes through as it is: `residual` and `sum` share
            // its storage.
            Op::Add {
                residual, delta, ..
            } => {
                let [d_residual, d_delta] = gradients.get([residual, delta])?;
                cast::forward(d_residual, d_delta)
            }
        }
    }

    fn rotated_heads(&mut self, qkv: Slot) -> Result<Tensor, Error> {
        let [qkv] = self.slots.get([qkv])?;
        rotated_heads(qkv, self.heads)
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
        scale: 1.0 / (heads.width as f64).sqrt(),
    }
}

/// The query and key heads of a fused projection, `[tokens, heads, head_dim]`.
fn rotated_heads(qkv: &Tensor, heads: Heads) -> Result<Tensor, Error> {
    let all = qkv
        .f_view([-1, heads.query + 2 * heads.key, heads.width])
        .map_err(torch)?;
    all.f_narrow(1, 0, heads.query + heads.key).map_err(torch)
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
