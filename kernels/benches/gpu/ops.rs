//! The ops on the shapes of two models, part by part of a step.

mod attention;
mod ends;
mod memory;
mod products;

use oxitron_kernels::Error;
use tch::Kind;

use crate::place::Place;
use crate::suite::Suite;

/// The dtype of weights and activations.
const T: Kind = Kind::BFloat16;

/// Dtypes of the residual stream.
const STREAMS: [Kind; 2] = [Kind::Float, Kind::BFloat16];

/// Sizes of a decoder and of a rank's batch.
#[derive(Clone, Copy)]
pub struct Model {
    pub name: &'static str,
    pub hidden: i64,
    pub inner: i64,
    query_heads: i64,
    key_heads: i64,
    head_dim: i64,
    vocabulary: i64,
    /// Tokens of a sample.
    seq: i64,
    /// Tokens of a call.
    pub tokens: i64,
    /// Inner length of products that are made small, so that the pass behind them can be told
    /// apart.
    thin: i64,
    /// Sides of the products that others are held against.
    pub square: i64,
}

impl Model {
    /// What is measured.
    pub const MEASURED: [Model; 2] = [
        Model {
            name: "internlm2-7b",
            hidden: 4096,
            inner: 14336,
            query_heads: 32,
            key_heads: 8,
            head_dim: 128,
            vocabulary: 92544,
            seq: 4096,
            tokens: 16384,
            thin: 64,
            square: 8192,
        },
        Model {
            name: "internlm2-1.8b",
            hidden: 2048,
            inner: 8192,
            query_heads: 16,
            key_heads: 8,
            head_dim: 128,
            vocabulary: 92544,
            seq: 4096,
            tokens: 16384,
            thin: 64,
            square: 8192,
        },
    ];

    /// What emulated kernels can do in a moment.
    pub const TINY: Model = Model {
        name: "tiny",
        hidden: 64,
        inner: 96,
        query_heads: 4,
        key_heads: 2,
        head_dim: 16,
        vocabulary: 160,
        seq: 64,
        tokens: 128,
        thin: 8,
        square: 64,
    };

    /// Numbers in a row of queries, keys and values.
    fn qkv(&self) -> i64 {
        (self.query_heads + 2 * self.key_heads) * self.head_dim
    }

    /// Inputs and outputs of the products of a block.
    fn products(&self) -> [[i64; 2]; 4] {
        [
            [self.hidden, self.qkv()],
            [self.query_heads * self.head_dim, self.hidden],
            [self.hidden, 2 * self.inner],
            [self.inner, self.hidden],
        ]
    }

    /// Numbers in the matrices of a block: what the optimizer takes at a time.
    fn block(&self) -> i64 {
        self.products().iter().map(|[i, o]| i * o).sum()
    }

    /// Position of each token in its sample.
    fn positions(&self) -> Vec<i64> {
        (0..self.tokens).map(|token| token % self.seq).collect()
    }
}

/// What is measured together: as much as fits in the memory of most GPUs.
#[derive(Clone, Copy)]
pub enum Part {
    /// A decoder block, without its optimizer.
    Block,
    /// Embedding, and head with loss.
    Ends,
    /// From gradients to new weights.
    Update,
}

impl Part {
    pub const ALL: [Part; 3] = [Part::Block, Part::Ends, Part::Update];

    pub fn name(self) -> &'static str {
        match self {
            Part::Block => "block",
            Part::Ends => "ends",
            Part::Update => "update",
        }
    }
}

/// # Errors
/// [`Error::Argument`] for documents that do not fit their samples. What an op's operands or calls
/// run into is told in its row.
pub fn add_all(suite: &mut Suite, part: Part, model: Model, place: Place) -> Result<(), Error> {
    match part {
        Part::Block => {
            memory::norms(suite, model, place);
            products::linear(suite, model, place);
            products::rope(suite, model, place);
            attention::add_all(suite, model, place)?;
            products::add(suite, model, place);
            products::glu(suite, model, place);
        }
        Part::Ends => {
            ends::embedding(suite, model, place);
            ends::loss(suite, model, place);
        }
        Part::Update => {
            memory::casts(suite, model, place);
            memory::optimizer(suite, model, place);
        }
    }
    Ok(())
}

/// Bytes of so many numbers.
fn bytes(numbers: i64, kind: Kind) -> f64 {
    (numbers * kind.elt_size_in_bytes() as i64) as f64
}

/// bf16 beside a residual stream of this dtype, in the table.
fn with_stream(stream: Kind) -> &'static str {
    match stream {
        Kind::BFloat16 => "bf16",
        _ => "bf16, fp32",
    }
}
