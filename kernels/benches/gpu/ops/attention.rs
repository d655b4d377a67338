//! Attention, on samples that are one document and on packed ones.
//!
//! Operations are those of the causal half alone, within documents: 4 for each pair of a query and
//! a key that it sees and each number of a head, and 10 for the gradient. On a GPU it is
//! libtorch's, so no bar is stated; the share is that of the fastest product.

use oxitron_kernels::attention::{self, Gradients, Inputs};
use oxitron_kernels::{DocumentStarts, Error, Workspace};
use tch::{Kind, Tensor};

use super::{Model, T};
use crate::place::{Place, torch};
use crate::suite::{Op, Suite, Work};

/// Where the documents of a packed sample begin, in 64ths of it.
const BEGINNINGS: [i64; 8] = [0, 1, 3, 7, 14, 24, 38, 44];

pub fn add_all(suite: &mut Suite, model: Model, place: Place) -> Result<(), Error> {
    let (samples, seq) = (model.tokens / model.seq, model.seq);
    let whole = |samples: i64, seq: i64| DocumentStarts::whole(samples as usize, seq as usize);
    let starts = BEGINNINGS.map(|at| (at * seq / 64) as u32);
    let packed = DocumentStarts::new(seq as usize, &vec![starts; samples as usize])?;
    let documents = BEGINNINGS.len();
    let cases = [
        (whole(samples, seq), format!("{samples} × {seq}")),
        (whole(1, model.tokens), format!("1 × {}", model.tokens)),
        (
            packed,
            format!("{samples} × {seq} of {documents} documents"),
        ),
    ];
    for (documents, shape) in cases {
        let width = 2 * model.query_heads * model.head_dim;
        let product = documents.attention_pairs() as f64 * width as f64;
        let op = |name: &'static str, products: f64| Op {
            name,
            shape: shape.clone(),
            dtype: "bf16",
            work: Work::Flops(products * product),
        };
        suite.add(op("attention forward", 2.0), || {
            let mut heads = Heads::new(model, place, documents.clone())?;
            Ok(move || heads.forward())
        });
        suite.add(op("attention backward", 5.0), || {
            let mut heads = Heads::new(model, place, documents.clone())?;
            heads.forward()?;
            let shape = heads.qkv.size();
            let dout = place.random(&heads.out.size(), T)?;
            let gradients = parts(&place.output(&shape, T)?, model)?;
            let [mut dq, mut dk, mut dv] = gradients;
            Ok(move || heads.backward(&dout, [&mut dq, &mut dk, &mut dv]))
        });
    }
    Ok(())
}

/// Queries, keys and values side by side, and what attention makes of them.
struct Heads {
    documents: DocumentStarts,
    /// Where they begin in the batch.
    starts: Tensor,
    scale: f64,
    /// `[batch, seq, heads, d]`
    qkv: Tensor,
    /// Views of it.
    parts: [Tensor; 3],
    out: Tensor,
    lse: Tensor,
    workspace: Workspace,
}

impl Heads {
    fn new(model: Model, place: Place, documents: DocumentStarts) -> Result<Heads, Error> {
        let [batch, seq] = [documents.batch() as i64, documents.seq() as i64];
        let (queries, d) = (model.query_heads, model.head_dim);
        let qkv = place.random(&[batch, seq, model.qkv() / d, d], T)?;
        Ok(Heads {
            starts: place.numbers(&documents.cumulative())?,
            scale: (d as f64).powf(-0.5),
            parts: parts(&qkv, model)?,
            qkv,
            out: place.output(&[batch, seq, queries, d], T)?,
            lse: place.output(&[batch, queries, seq], Kind::Float)?,
            workspace: Workspace::new(place.device()),
            documents,
        })
    }

    fn forward(&mut self) -> Result<(), Error> {
        let inputs = inputs(&self.parts, &self.documents, &self.starts, self.scale);
        attention::forward(&inputs, &mut self.out, &mut self.lse, &mut self.workspace)
    }

    fn backward(&mut self, dout: &Tensor, [dq, dk, dv]: [&mut Tensor; 3]) -> Result<(), Error> {
        let inputs = inputs(&self.parts, &self.documents, &self.starts, self.scale);
        let gradients = Gradients { dq, dk, dv };
        let workspace = &mut self.workspace;
        attention::backward(&inputs, &self.out, &self.lse, dout, gradients, workspace)
    }
}

fn inputs<'a>(
    [q, k, v]: &'a [Tensor; 3],
    documents: &'a DocumentStarts,
    starts: &'a Tensor,
    scale: f64,
) -> Inputs<'a> {
    Inputs {
        q,
        k,
        v,
        documents,
        starts: Some(starts),
        scale,
    }
}

/// Views of queries, keys and values in `[batch, seq, heads, d]`.
fn parts(all: &Tensor, model: Model) -> Result<[Tensor; 3], Error> {
    let (queries, keys) = (model.query_heads, model.key_heads);
    let part = |at, heads| all.f_narrow(2, at, heads).map_err(torch);
    Ok([
        part(0, queries)?,
        part(queries, keys)?,
        part(queries + keys, keys)?,
    ])
}
