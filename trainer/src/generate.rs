//! Sampling text from a checkpoint or a Hugging Face folder.
//!
//! Every token runs the whole text again through the decoder: simple, and quick enough to look at
//! a model. The weights are held once, frozen, in the compute dtype.

use std::path::{Path, PathBuf};

use oxitron_kernels::{RopeTable, philox};
use tch::Device;
use tokenizers::Tokenizer;

use crate::checkpoint::{self, Checkpoint};
use crate::config::{Dtype, DtypeChoice, Family, ModelConfig, Patterns, Recompute};
use crate::convert::{HfFolder, LlamaConfig};
use crate::model::{Activations, Batch, Decoder, ModelError, describe};
use crate::zero::{Zero, ZeroError};

/// Buffers grow by powers of two from here, so that few lengths allocate anew.
const SHORTEST_BUFFER: usize = 64;

/// The largest tokenizer that is read from a checkpoint.
const MAX_TOKENIZER_BYTES: u64 = 512 << 20;

/// Why nothing could be generated.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    /// The checkpoint cannot be used.
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::Error),
    /// The Hugging Face folder cannot be used.
    #[error(transparent)]
    Convert(#[from] crate::convert::Error),
    /// Weights could not be loaded.
    #[error(transparent)]
    Zero(#[from] ZeroError),
    /// The model failed.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A kernel failed.
    #[error(transparent)]
    Kernel(#[from] oxitron_kernels::Error),
    /// libtorch failed.
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),
    /// There is no usable tokenizer.
    #[error("{}: {problem}", path.display())]
    Tokenizer {
        /// The model's folder or its tokenizer file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The request makes no sense.
    #[error("{0}")]
    Request(String),
}

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0 takes the likeliest token; above, logits are divided by it.
    pub temperature: f64,
    /// Only the likeliest tokens whose probabilities reach this sum take part; 1 for all.
    pub top_p: f64,
    /// Draws are a function of it and of the position.
    pub seed: u64,
}

/// A model ready to continue texts.
pub struct Generator {
    decoder: Decoder,
    zero: Zero,
    rope_base: f64,
    head_dim: usize,
    tokenizer: Tokenizer,
    eos: Vec<u32>,
    max_seq_len: usize,
    buffers: Option<(usize, Activations, RopeTable)>,
}

impl Generator {
    /// Opens a checkpoint (or a run directory: its newest), or a Hugging Face folder. With `verify`
    /// what is read of a checkpoint is compared with its checksums.
    ///
    /// # Errors
    /// A folder that is neither or is damaged, a model without tokenizer.
    pub fn open(path: &Path, dtype: Dtype, verify: bool) -> Result<Self, GenerateError> {
        if path.join("config.json").is_file() {
            let folder = HfFolder::open(path)?;
            let file = path.join("tokenizer.json");
            let tokenizer =
                Tokenizer::from_file(&file).map_err(|error| GenerateError::Tokenizer {
                    path: file,
                    problem: error.to_string(),
                })?;
            let config = folder.config().clone();
            return Self::new(&config, dtype, tokenizer, |name, range, out| {
                folder
                    .read_f32(name, range, out)
                    .map_err(|error| error.to_string())
            });
        }
        let mut found = checkpoint::find(path)?;
        if !verify {
            found = found.without_verification();
        }
        let config = LlamaConfig::from_checkpoint(&found)?;
        let tokenizer = tokenizer_of(&found)?;
        Self::new(&config, dtype, tokenizer, |name, range, out| {
            let state = checkpoint::StateKind::Master;
            found
                .read(name, state, range, out)
                .map_err(|error| error.to_string())
        })
    }

    fn new(
        config: &LlamaConfig,
        dtype: Dtype,
        tokenizer: Tokenizer,
        read: impl Fn(&str, std::ops::Range<usize>, &mut [f32]) -> Result<(), String>,
    ) -> Result<Self, GenerateError> {
        let model = model_config(config);
        // Frozen tensors are held in the compute dtype alone: no gradients, no optimizer state.
        let units = describe(&model, |_| false, |_| false)?;
        let decoder = Decoder::new(&model, dtype);
        let mut zero = Zero::solo(&units, decoder.compute_kind(), Device::Cpu)?;
        zero.load(|spec, _, range, out| read(&spec.name, range, out))?;
        Ok(Self {
            decoder,
            zero,
            rope_base: config.rope_base,
            head_dim: model.head_dim,
            tokenizer,
            eos: config.special_tokens.eos.clone(),
            max_seq_len: config.max_seq_len,
            buffers: None,
        })
    }

    /// Continues `prompt` by at most `max_tokens` tokens, handing each piece of text to `emit` as
    /// soon as it is decided, and stops at an end-of-text token.
    ///
    /// # Errors
    /// An empty prompt, sampling parameters out of range, or a text longer than the model's
    /// sequence length.
    pub fn generate(
        &mut self,
        prompt: &str,
        max_tokens: usize,
        sampling: Sampling,
        emit: &mut dyn FnMut(&str),
    ) -> Result<(), GenerateError> {
        let Sampling {
            temperature, top_p, ..
        } = sampling;
        let possible = temperature >= 0.0 && temperature.is_finite() && top_p > 0.0 && top_p <= 1.0;
        if !possible {
            return Err(GenerateError::Request(format!(
                "temperature must be 0 or more and top-p above 0 and at most 1, found \
                 {temperature} and {top_p}"
            )));
        }
        let encoding = self
            .tokenizer
            .encode_fast(prompt, false)
            .map_err(|e| self.failed(&e))?;
        let mut tokens: Vec<u32> = encoding.get_ids().to_vec();
        if tokens.is_empty() {
            return Err(GenerateError::Request("the prompt has no token".to_owned()));
        }
        if tokens.len() + max_tokens > self.max_seq_len {
            return Err(GenerateError::Request(format!(
                "a prompt of {} tokens and {max_tokens} more exceed the model's sequence length \
                 of {}; ask for at most {} tokens",
                tokens.len(),
                self.max_seq_len,
                self.max_seq_len.saturating_sub(tokens.len()),
            )));
        }
        let mut said = self.text(&tokens)?.len();
        let mut text = String::new();
        for _ in 0..max_tokens {
            let logits = self.next_logits(&tokens)?;
            let next = choose(&logits, sampling, tokens.len() as u64);
            if self.eos.contains(&next) {
                break;
            }
            tokens.push(next);
            text = self.text(&tokens)?;
            // A character may need several tokens; until then the text ends in a replacement.
            if let Some(piece) = text
                .get(said..)
                .filter(|piece| !piece.ends_with('\u{fffd}'))
            {
                emit(piece);
                said = text.len();
            }
        }
        // What is left will not become a character any more.
        if let Some(rest) = text.get(said..).filter(|rest| !rest.is_empty()) {
            emit(rest);
        }
        Ok(())
    }

    /// Logits of the token after `tokens`.
    ///
    /// # Errors
    /// When the model fails.
    pub fn next_logits(&mut self, tokens: &[u32]) -> Result<Vec<f32>, GenerateError> {
        let length = tokens.len().next_power_of_two().max(SHORTEST_BUFFER);
        if self
            .buffers
            .as_ref()
            .is_none_or(|(held, ..)| *held != length)
        {
            let activations = self
                .decoder
                .activations(length, Recompute::Full, Device::Cpu)?;
            let rope = RopeTable::new(self.rope_base, self.head_dim, length, Device::Cpu)?;
            self.buffers = Some((length, activations, rope));
        }
        let Some((_, activations, rope)) = &mut self.buffers else {
            return Err(GenerateError::Request("no buffers".to_owned()));
        };
        // What fills the buffer is a document of its own.
        let mut ids: Vec<i64> = tokens.iter().map(|&token| i64::from(token)).collect();
        ids.resize(length, 0);
        let mut starts = vec![0];
        if tokens.len() < length {
            starts.push(tokens.len() as u32);
        }
        let batch = Batch::new(&ids, &vec![-100; length], &[starts], length, Device::Cpu)?;
        let last_layer = self.decoder.layers() - 1;
        for layer in 0..last_layer {
            let weights = self.zero.weights(layer)?;
            self.decoder
                .forward(layer, &weights, &batch, rope, activations)?;
        }
        let weights = self.zero.weights(last_layer)?;
        let row = tokens.len() - 1;
        let logits = self.decoder.logits(&weights, row..row + 1, activations)?;
        Ok(Vec::<f32>::try_from(&logits.f_view([-1])?)?)
    }

    fn text(&self, tokens: &[u32]) -> Result<String, GenerateError> {
        self.tokenizer
            .decode(tokens, true)
            .map_err(|error| self.failed(&error))
    }

    fn failed(&self, error: &impl std::fmt::Display) -> GenerateError {
        GenerateError::Tokenizer {
            path: "tokenizer.json".into(),
            problem: error.to_string(),
        }
    }
}

fn tokenizer_of(checkpoint: &Checkpoint) -> Result<Tokenizer, GenerateError> {
    let wrong = |problem| GenerateError::Tokenizer {
        path: checkpoint.dir().to_owned(),
        problem,
    };
    if !checkpoint
        .attachments()
        .any(|file| file.name == "tokenizer.json")
    {
        return Err(wrong(
            "the checkpoint carries no tokenizer.json; train with data.tokenizer set".to_owned(),
        ));
    }
    let bytes = checkpoint.read_attachment("tokenizer.json", MAX_TOKENIZER_BYTES)?;
    Tokenizer::from_bytes(bytes).map_err(|error| wrong(format!("tokenizer.json: {error}")))
}

fn model_config(config: &LlamaConfig) -> ModelConfig {
    let sizes = &config.sizes;
    ModelConfig {
        preset: None,
        family: Family::Llama,
        vocab_size: sizes.vocab_size,
        hidden_size: sizes.hidden_size,
        intermediate_size: sizes.intermediate_size,
        num_layers: sizes.num_layers,
        num_heads: sizes.num_heads,
        num_kv_heads: sizes.num_kv_heads,
        head_dim: sizes.head_dim,
        rms_norm_eps: config.rms_norm_eps,
        rope_base: config.rope_base,
        tie_word_embeddings: sizes.tie_word_embeddings,
        dtype: DtypeChoice::Auto,
        residual_dtype: Dtype::Fp32,
        init_std: config.init_std,
        init_from: None,
        freeze: Patterns::default(),
    }
}

/// Chooses a token; draw number `position` of the seed decides.
fn choose(logits: &[f32], sampling: Sampling, position: u64) -> u32 {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    let Some(&likeliest) = order.first() else {
        return 0;
    };
    if sampling.temperature == 0.0 {
        return likeliest as u32;
    }
    let top = f64::from(logits[likeliest]);
    let mass = |&token: &usize| ((f64::from(logits[token]) - top) / sampling.temperature).exp();
    let total: f64 = order.iter().map(mass).sum();
    let mut kept = 0.0;
    let mut nucleus = Vec::new();
    for token in &order {
        kept += mass(token);
        nucleus.push((*token, kept));
        if kept >= sampling.top_p * total {
            break;
        }
    }
    let mut draw = [0f32];
    philox::fill_uniform(&mut draw, sampling.seed, "generate", position, 0.0, 1.0);
    let wanted = f64::from(draw[0]) * kept;
    let chosen = nucleus.iter().find(|(_, reached)| *reached > wanted);
    chosen.map_or(likeliest, |&(token, _)| token) as u32
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;
    use crate::convert::list_of_tensors;
    use crate::model::tensor_names;
    use crate::testing::golden::{self, Golden};

    /// Models that transformers wrote, sharded and untied or whole and tied, with both styles of
    /// RoPE keys.
    #[test]
    fn an_imported_model_gives_the_logits_of_transformers() {
        for name in ["hf-tiny-4", "hf-tiny-5"] {
            let golden = Golden::with_tensors(name, &format!("{name}.logits"));
            let mut model = Generator::open(&golden::path(name), Dtype::Fp32, true).unwrap();
            let tokens: Vec<u32> = golden.i64("tokens").iter().map(|&t| t as u32).collect();
            let expected = golden.f32("logits");
            let vocab = expected.len() / tokens.len();
            let mut worst = 0f64;
            for (row, expected) in expected.chunks(vocab).enumerate() {
                let found = model.next_logits(&tokens[..=row]).unwrap();
                assert_eq!(found.len(), vocab);
                for (a, b) in found.iter().zip(expected) {
                    worst = worst.max(f64::from((a - b).abs()));
                }
            }
            let bound = 1e-4 * golden.facts["logits_std"].as_f64().unwrap().max(1.0);
            println!("{name}: logits within {worst:.1e}, bound {bound:.1e}");
            assert!(worst <= bound, "{name}: logits differ by {worst:e}");
        }
    }

    /// The model's own tensors and those that conversion expects are described independently.
    #[test]
    fn model_and_conversion_name_the_same_tensors() {
        for name in ["hf-tiny-4", "hf-tiny-5"] {
            let folder = HfFolder::open(golden::path(name)).unwrap();
            let units = describe(&model_config(folder.config()), |_| true, |_| true).unwrap();
            let listed = list_of_tensors(&folder.config().sizes);
            assert_eq!(tensor_names(&units), listed, "{name}");
        }
    }

    const LOGITS: [f32; 4] = [1.0, 3.0, 2.0, -4.0];

    fn draws(temperature: f64, top_p: f64) -> [usize; 4] {
        let mut counts = [0; 4];
        for position in 0..4000 {
            let sampling = Sampling {
                temperature,
                top_p,
                seed: 3,
            };
            counts[choose(&LOGITS, sampling, position) as usize] += 1;
        }
        counts
    }

    #[test]
    fn greedy_takes_the_likeliest() {
        assert_eq!(draws(0.0, 1.0), [0, 4000, 0, 0]);
    }

    #[test]
    fn temperature_one_follows_the_softmax() {
        let total: f64 = LOGITS.iter().map(|&logit| f64::from(logit).exp()).sum();
        for (count, logit) in draws(1.0, 1.0).into_iter().zip(LOGITS) {
            let expected = f64::from(logit).exp() / total;
            let deviation = (count as f64 / 4000.0 - expected).abs();
            // Four standard deviations of a binomial share.
            assert!(deviation < 4.0 * (expected * (1.0 - expected) / 4000.0).sqrt() + 1e-3);
        }
    }

    #[test]
    fn the_nucleus_leaves_the_tail_out() {
        let counts = draws(1.0, 0.8);
        assert_eq!((counts[0], counts[3]), (0, 0));
        assert!(counts[1] > counts[2] && counts[2] > 0);
    }
}
