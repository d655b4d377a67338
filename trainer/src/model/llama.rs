//! The LLaMA family: its parameters and the program of its block.
//!
//! Covers every model whose mathematics is LLaMA's (RMSNorm, half-split RoPE, grouped-query
//! attention, SwiGLU, no biases): LLaMA itself and, once `wqkv` is unpacked, InternLM2. Names and
//! orientation are those of Hugging Face's `LlamaForCausalLM`.

use oxitron_kernels::linear_glu::Activation;

use super::{
    ModelError,
    program::{Op, Program, SlotKind, SlotSpec},
};
use crate::config::ModelConfig;
use crate::plan::{Init, Layer, Matrix, TensorSpec, Unit, Units};

/// Matrices of a block's unit, in the order of [`describe`].
mod weight {
    pub const ATTENTION_NORM: usize = 0;
    pub const QKV: usize = 1;
    pub const ATTENTION_OUTPUT: usize = 2;
    pub const MLP_NORM: usize = 3;
    pub const GATE_UP: usize = 4;
    pub const DOWN: usize = 5;
}

/// The units and layers of a model.
///
/// `trainable` and `decay` answer for a canonical tensor name. Projections into the residual stream
/// start with a standard deviation scaled by 1/√(2·layers), so that the stream's variance does not
/// grow with depth (GPT-2); everything else with `init_std`, norms with ones.
///
/// # Errors
/// [`ModelError::Description`] when only some tensors of a fused matrix (query, key and value; gate
/// and up) are frozen.
pub fn describe(
    model: &ModelConfig,
    trainable: impl Fn(&str) -> bool,
    decay: impl Fn(&str) -> bool,
) -> Result<Units, ModelError> {
    let plain = Init::Normal {
        std: model.init_std,
    };
    let into_residual = Init::Normal {
        std: model.init_std / (2.0 * model.num_layers as f64).sqrt(),
    };
    let tensor = |name: String, shape: &[usize], init: Init| TensorSpec {
        trainable: trainable(&name),
        decay: decay(&name),
        shape: shape.to_vec(),
        init,
        name,
    };
    let (hidden, inner) = (model.hidden_size, model.intermediate_size);
    let query = model.num_heads * model.head_dim;
    let key = model.num_kv_heads * model.head_dim;
    let one = |spec: TensorSpec| Matrix {
        tensors: vec![spec],
    };

    let block = |index: usize| {
        let weight = |suffix: &str, shape: &[usize], init: Init| {
            tensor(format!("model.layers.{index}.{suffix}.weight"), shape, init)
        };
        let matrices = vec![
            one(weight("input_layernorm", &[hidden], Init::Ones)),
            Matrix {
                tensors: vec![
                    weight("self_attn.q_proj", &[query, hidden], plain),
                    weight("self_attn.k_proj", &[key, hidden], plain),
                    weight("self_attn.v_proj", &[key, hidden], plain),
                ],
            },
            one(weight("self_attn.o_proj", &[hidden, query], into_residual)),
            one(weight("post_attention_layernorm", &[hidden], Init::Ones)),
            Matrix {
                tensors: vec![
                    weight("mlp.gate_proj", &[inner, hidden], plain),
                    weight("mlp.up_proj", &[inner, hidden], plain),
                ],
            },
            one(weight("mlp.down_proj", &[hidden, inner], into_residual)),
        ];
        Unit {
            name: format!("block.{index}"),
            matrices,
        }
    };

    let vocabulary = [model.vocab_size, hidden];
    let single = |unit: &str, name: &str, shape: &[usize], init: Init| Unit {
        name: unit.into(),
        matrices: vec![one(tensor(name.into(), shape, init))],
    };
    let mut units = vec![single(
        "embedding",
        "model.embed_tokens.weight",
        &vocabulary,
        plain,
    )];
    units.extend((0..model.num_layers).map(block));
    units.push(single("norm", "model.norm.weight", &[hidden], Init::Ones));
    if !model.tie_word_embeddings {
        units.push(single("head", "lm_head.weight", &vocabulary, plain));
    }

    for matrix in units.iter().flat_map(|unit| &unit.matrices) {
        let is_trainable = |spec: &&TensorSpec| spec.trainable;
        if let (Some(free), Some(frozen)) = (
            matrix.tensors.iter().find(is_trainable),
            matrix.tensors.iter().find(|spec| !is_trainable(spec)),
        ) {
            return Err(ModelError::Description(format!(
                "model.freeze matches {} but not {}: the two are one fused matrix; freeze both or \
                 neither",
                frozen.name, free.name
            )));
        }
    }

    let norm = model.num_layers + 1;
    let head = if model.tie_word_embeddings {
        0
    } else {
        norm + 1
    };
    let mut layers: Vec<Layer> = units[..norm]
        .iter()
        .enumerate()
        .map(|(index, unit)| Layer {
            name: unit.name.clone(),
            units: vec![index],
        })
        .collect();
    layers.push(Layer {
        name: "head".into(),
        units: vec![norm, head],
    });
    Ok(Units { units, layers })
}

/// Canonical names and shapes of all tensors of a model.
pub fn tensor_names(units: &Units) -> Vec<(String, Vec<usize>)> {
    units
        .tensors()
        .map(|spec| (spec.name.clone(), spec.shape.clone()))
        .collect()
}

/// The program of a block.
pub(super) fn block_program(model: &ModelConfig) -> Program {
    let query = model.num_heads * model.head_dim;
    let key = model.num_kv_heads * model.head_dim;
    let mut slots = Vec::new();
    let mut slot = |name, kind, width, kept| {
        slots.push(SlotSpec {
            name,
            kind,
            width,
            kept,
            has_gradient: kind == SlotKind::Compute,
        });
        slots.len() - 1
    };
    use SlotKind::{Compute, Residual, Statistic};
    let hidden = model.hidden_size;
    let input = slot("input", Residual, hidden, true);
    let normed = slot("attention norm", Compute, hidden, true);
    let rstd = slot("attention norm statistic", Statistic, 1, true);
    let qkv = slot("qkv", Compute, query + 2 * key, true);
    let attended = slot("attention", Compute, query, true);
    let log_sum_exp = slot("log-sum-exp", Statistic, model.num_heads, true);
    let middle = slot("middle", Residual, hidden, true);
    let mlp_normed = slot("mlp norm", Compute, hidden, true);
    let mlp_rstd = slot("mlp norm statistic", Statistic, 1, true);
    let gate_up = slot("gate and up", Compute, 2 * model.intermediate_size, true);
    let gated = slot("gated", Compute, model.intermediate_size, true);
    // The next block keeps it as its input.
    let output = slot("output", Residual, hidden, false);

    // Its gradient turns into that of gate and up before it is stored.
    slots[gated].has_gradient = false;

    let ops = vec![
        Op::RmsNorm {
            x: input,
            weight: weight::ATTENTION_NORM,
            y: normed,
            rstd,
        },
        Op::LinearRope {
            x: normed,
            weight: weight::QKV,
            qkv,
        },
        Op::Attention {
            qkv,
            y: attended,
            log_sum_exp,
        },
        Op::LinearAdd {
            x: attended,
            weight: weight::ATTENTION_OUTPUT,
            residual: input,
            sum: middle,
        },
        Op::RmsNorm {
            x: middle,
            weight: weight::MLP_NORM,
            y: mlp_normed,
            rstd: mlp_rstd,
        },
        Op::FeedForward {
            activation: Activation::Silu,
            x: mlp_normed,
            gate_up_weight: weight::GATE_UP,
            gate_up,
            gated,
            down_weight: weight::DOWN,
            residual: middle,
            sum: output,
        },
    ];
    Program {
        slots,
        ops,
        input,
        output,
    }
}
