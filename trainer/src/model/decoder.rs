//! The decoder: embedding, blocks, final norm, head and loss, layer by layer.

use oxitron_kernels::{RopeTable, cast, embedding, linear_cross_entropy, rms_norm};
use tch::{Device, Kind, Tensor};

use super::{
    Activations, Batch, ModelError, Stopwatch,
    activations::Precision,
    llama,
    op::{BlockRun, Heads},
    program::{Program, Slot},
};
use crate::config::{Dtype, ModelConfig, Recompute};

/// Views of the weights of a layer's units: `[unit][matrix]`.
pub type LayerWeights = Vec<Vec<Tensor>>;

/// Views of the fp32 gradients of a layer's units: `[unit][matrix]`, `None` where frozen.
pub type LayerGradients = Vec<Vec<Option<Tensor>>>;

/// What the head computes.
pub enum Objective<'a> {
    /// The loss alone.
    Loss,
    /// The loss, the gradient of the head's input, and the gradient of the head's weight, added to
    /// `head` (the matrix of the layer's second unit). Both are gradients of the *sum* of the
    /// token losses: the number of targets in the global batch is known only after the step's
    /// control reduction, and the optimizer divides by it.
    LossAndGradient {
        /// Views of the layer's gradients.
        gradients: &'a mut LayerGradients,
    },
}

/// Runs the layers of a model on micro-batches.
#[derive(Debug)]
pub struct Decoder {
    program: Program,
    names: Vec<String>,
    heads: Heads,
    hidden: usize,
    norm_eps: f64,
    precision: Precision,
    vocab_size: usize,
}

/// Matrix of the norm unit and of the head unit in the last layer.
const NORM: (usize, usize) = (0, 0);
const HEAD: (usize, usize) = (1, 0);

impl Decoder {
    /// A decoder for `model` computing in `compute`.
    pub fn new(model: &ModelConfig, compute: Dtype) -> Self {
        let blocks = model.num_layers;
        let names = std::iter::once("embedding".to_owned())
            .chain((0..blocks).map(|block| format!("block.{block}")))
            .chain(["head".to_owned()])
            .collect();
        Self {
            program: llama::block_program(model),
            names,
            heads: Heads {
                query: model.num_heads as i64,
                key: model.num_kv_heads as i64,
                width: model.head_dim as i64,
            },
            hidden: model.hidden_size,
            norm_eps: model.rms_norm_eps,
            precision: Precision {
                compute: kind(compute),
                residual: kind(model.residual_dtype),
            },
            vocab_size: model.vocab_size,
        }
    }

    /// Number of layers: embedding, blocks, head.
    pub fn layers(&self) -> usize {
        self.names.len()
    }

    /// Dtype of weights and activations.
    pub fn compute_kind(&self) -> Kind {
        self.precision.compute
    }

    /// Buffers for micro-batches of `tokens` tokens, in which blocks do not keep what `recompute`
    /// says.
    ///
    /// # Errors
    /// When libtorch cannot allocate them.
    pub fn activations(
        &self,
        tokens: usize,
        recompute: Recompute,
        device: Device,
    ) -> Result<Activations, ModelError> {
        let blocks = self.layers() - 2;
        let (program, precision) = (&self.program, self.precision);
        Activations::new(
            program,
            blocks,
            self.hidden,
            tokens,
            precision,
            recompute,
            device,
        )
    }

    /// Runs the embedding (layer 0) or a block. The last layer is [`Decoder::head`].
    ///
    /// # Errors
    /// When a kernel refuses its arguments or fails.
    pub fn forward(
        &self,
        layer: usize,
        weights: &LayerWeights,
        batch: &Batch,
        rope: &RopeTable,
        activations: &mut Activations,
    ) -> Result<(), ModelError> {
        self.check_batch(batch, activations)?;
        activations.stopwatch.start();
        if layer == 0 {
            embedding::forward(&batch.tokens, &weights[0][0], &mut activations.stream[0])
                .map_err(|source| self.failed(layer, source))?;
            activations.stopwatch.lap("embedding", "stream");
            return Ok(());
        }
        self.run_block(layer, weights, batch, rope, activations, |_| true)
    }

    /// Runs again what of block `layer` its backward reads and other blocks have overwritten since.
    ///
    /// # Errors
    /// When a kernel refuses its arguments or fails.
    pub fn recompute(
        &self,
        layer: usize,
        weights: &LayerWeights,
        batch: &Batch,
        rope: &RopeTable,
        activations: &mut Activations,
    ) -> Result<(), ModelError> {
        self.check_batch(batch, activations)?;
        activations.stopwatch.start();
        let recompute = activations.recompute;
        let lost = |slot| self.program.is_lost(slot, recompute);
        self.run_block(layer, weights, batch, rope, activations, lost)
    }

    /// Runs the operations of block `layer` that make a slot which is wanted.
    fn run_block(
        &self,
        layer: usize,
        weights: &LayerWeights,
        batch: &Batch,
        rope: &RopeTable,
        activations: &mut Activations,
        wanted: impl Fn(Slot) -> bool,
    ) -> Result<(), ModelError> {
        let Activations {
            blocks,
            workspace,
            stopwatch,
            ..
        } = activations;
        let (slots, tools) = (&mut blocks[layer - 1], (workspace, stopwatch));
        let mut run = self.block_run(layer, &weights[0], batch, rope, slots, tools);
        let mut ops = self.program.ops.iter();
        ops.try_for_each(|op| run.forward(op, &wanted))
    }

    /// Runs the final norm, the head and the loss, which is added to that of `activations`.
    ///
    /// # Errors
    /// When a kernel refuses its arguments or fails.
    pub fn head(
        &self,
        weights: &LayerWeights,
        batch: &Batch,
        activations: &mut Activations,
        objective: Objective<'_>,
    ) -> Result<(), ModelError> {
        self.check_batch(batch, activations)?;
        self.run_head(weights, batch, activations, objective)
            .map_err(|source| self.failed(self.layers() - 1, source))
    }

    fn run_head(
        &self,
        weights: &LayerWeights,
        batch: &Batch,
        activations: &mut Activations,
        objective: Objective<'_>,
    ) -> Result<(), oxitron_kernels::Error> {
        let Activations {
            stream,
            normed,
            rstd,
            normed_gradient,
            loss,
            workspace,
            stopwatch,
            ..
        } = activations;
        let last = &stream[self.layers() - 2];
        stopwatch.start();
        rms_norm::forward(last, &weights[NORM.0][NORM.1], self.norm_eps, normed, rstd)?;
        stopwatch.lap("rms_norm", "final norm");
        let head = &weights[HEAD.0][HEAD.1];
        let losses = linear_cross_entropy::Losses {
            sum: loss.add(batch.target_count),
            per_token: None,
        };
        let inputs = linear_cross_entropy::Inputs {
            x: normed,
            w: head,
            targets: &batch.targets,
            weights: None,
            vocab_size: self.vocab_size,
            chunk: linear_cross_entropy::default_chunk(normed.device()),
        };
        match objective {
            Objective::Loss => linear_cross_entropy::forward(&inputs, losses, workspace)?,
            Objective::LossAndGradient { gradients } => {
                let gradients = linear_cross_entropy::Gradients {
                    dx: Some(normed_gradient),
                    dw: gradients[HEAD.0][HEAD.1].as_mut(),
                };
                linear_cross_entropy::forward_backward(&inputs, losses, gradients, workspace)?;
            }
        }
        stopwatch.lap("head", "loss");
        Ok(())
    }

    /// Runs a layer backwards. For the last layer, [`Decoder::head`] with
    /// [`Objective::LossAndGradient`] must have run on the same micro-batch.
    ///
    /// # Errors
    /// When a kernel refuses its arguments or fails.
    pub fn backward(
        &self,
        layer: usize,
        weights: &LayerWeights,
        gradients: &mut LayerGradients,
        batch: &Batch,
        rope: &RopeTable,
        activations: &mut Activations,
    ) -> Result<(), ModelError> {
        activations.stopwatch.start();
        if layer == self.layers() - 1 {
            return self
                .head_backward(weights, gradients, activations)
                .map_err(|source| self.failed(layer, source));
        }
        if layer == 0 {
            let Some(d_weight) = gradients[0][0].as_mut() else {
                return Ok(());
            };
            embedding::backward(&batch.tokens, activations.stream_gradient.wide(), d_weight)
                .map_err(|source| self.failed(layer, source))?;
            activations.stopwatch.lap("embedding backward", "stream");
            return Ok(());
        }
        let Activations {
            blocks,
            gradients: slot_gradients,
            stream_gradient,
            workspace,
            stopwatch,
            ..
        } = activations;
        let (slots, tools) = (&mut blocks[layer - 1], (workspace, stopwatch));
        let mut run = self.block_run(layer, &weights[0], batch, rope, slots, tools);
        for op in self.program.ops.iter().rev() {
            run.backward(op, stream_gradient, slot_gradients, &mut gradients[0])?;
        }
        Ok(())
    }

    fn head_backward(
        &self,
        weights: &LayerWeights,
        gradients: &mut LayerGradients,
        activations: &mut Activations,
    ) -> Result<(), oxitron_kernels::Error> {
        let Activations {
            stream,
            rstd,
            normed_gradient,
            stream_gradient,
            workspace,
            stopwatch,
            ..
        } = activations;
        let last = &stream[self.layers() - 2];
        let (dx, rounded) = stream_gradient.parts();
        // The norm adds to the gradient of the stream; this is where that gradient begins.
        let _ = dx.f_zero_().map_err(torch)?;
        let saved = rms_norm::Saved {
            x: last,
            w: &weights[NORM.0][NORM.1],
            rstd,
        };
        let dw = gradients[NORM.0][NORM.1].as_mut();
        let gradients = rms_norm::Gradients { dx, rounded, dw };
        rms_norm::backward(normed_gradient, saved, gradients, workspace)?;
        stopwatch.lap("rms_norm backward", "final norm");
        Ok(())
    }

    /// Logits, `[rows, vocab]` fp32, of the given tokens of the micro-batch that has just run
    /// through all blocks.
    ///
    /// # Errors
    /// When a kernel refuses its arguments or fails, or a row is out of range.
    pub fn logits(
        &self,
        weights: &LayerWeights,
        rows: std::ops::Range<usize>,
        activations: &mut Activations,
    ) -> Result<Tensor, ModelError> {
        let compute = |activations: &mut Activations| -> Result<Tensor, oxitron_kernels::Error> {
            let Activations {
                stream,
                normed,
                rstd,
                workspace,
                ..
            } = activations;
            let last = &stream[self.layers() - 2];
            rms_norm::forward(last, &weights[NORM.0][NORM.1], self.norm_eps, normed, rstd)?;
            let x = normed
                .f_narrow(0, rows.start as i64, rows.len() as i64)
                .map_err(torch)?;
            let shape = [rows.len() as i64, self.vocab_size as i64];
            let mut logits =
                Tensor::f_zeros(shape, (self.precision.compute, x.device())).map_err(torch)?;
            let head = &weights[HEAD.0][HEAD.1];
            linear_cross_entropy::logits(&x, head, &mut logits, workspace)?;
            let mut result = Tensor::f_zeros(shape, (Kind::Float, x.device())).map_err(torch)?;
            cast::forward(&logits, &mut result)?;
            Ok(result)
        };
        compute(activations).map_err(|source| self.failed(self.layers() - 1, source))
    }

    fn block_run<'a>(
        &'a self,
        layer: usize,
        weights: &'a [Tensor],
        batch: &'a Batch,
        rope: &'a RopeTable,
        slots: &'a mut super::activations::Slots,
        (workspace, stopwatch): (&'a mut oxitron_kernels::Workspace, &'a mut Stopwatch),
    ) -> BlockRun<'a> {
        BlockRun {
            layer: &self.names[layer],
            batch,
            rope,
            heads: self.heads,
            norm_eps: self.norm_eps,
            weights,
            slots,
            workspace,
            specs: &self.program.slots,
            stopwatch,
        }
    }

    fn check_batch(&self, batch: &Batch, activations: &Activations) -> Result<(), ModelError> {
        let found = batch.token_count();
        if found != activations.tokens {
            return Err(ModelError::BatchShape {
                expected: activations.tokens,
                found,
            });
        }
        Ok(())
    }

    fn failed(&self, layer: usize, source: oxitron_kernels::Error) -> ModelError {
        ModelError::Kernel {
            layer: self.names[layer].clone(),
            source,
        }
    }
}

fn torch(source: tch::TchError) -> oxitron_kernels::Error {
    oxitron_kernels::Error::Torch {
        op: "decoder",
        source,
    }
}

/// libtorch's name of a dtype.
pub(crate) fn kind(dtype: Dtype) -> Kind {
    match dtype {
        Dtype::Bf16 => Kind::BFloat16,
        Dtype::Fp32 => Kind::Float,
    }
}
