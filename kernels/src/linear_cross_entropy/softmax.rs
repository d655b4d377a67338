//! Losses of rows of logits; where wanted, each row becomes its own gradient where it lies.
//!
//! A pass of its own between the products. Partial sums in the epilogue of the logits' product would
//! need sums across lanes for every few columns, which take longer than the two walks over a row in
//! L2 that they would save; gradients computed while the next products pack their operands would
//! need every exponential twice.

use crate::float::{Float, load_padded, store_cut};
use crate::microkernel::{Dtype, Kernel, Visitor};
use crate::simd::exp;
use crate::simd::vector::{Simd, WIDTH, per_level};
use crate::sys::parallel::parallel_split;
use crate::sys::split::Rows;

/// What a chunk of `n` tokens is to predict.
#[derive(Clone, Copy)]
pub(super) struct Tokens<'a> {
    /// `[n]`: a token below `vocab`; anything negative is not to be predicted.
    pub(super) targets: &'a [i64],
    /// A factor per token, `[n]`, where wanted.
    pub(super) weights: Option<&'a [f32]>,
    /// Columns of the logits that are real tokens; the others are padding.
    pub(super) vocab: usize,
    /// Whether logits become their gradient.
    pub(super) gradient: bool,
}

/// Losses `[n]` of logits `[n, v]`, zero where nothing is predicted. With a gradient the logits are
/// left as that of the sum of weighted losses, else as they are.
pub(super) fn losses<T: Dtype>(logits: &mut [T], v: usize, tokens: Tokens<'_>, losses: &mut [f32]) {
    struct Pass<'a, T>(&'a mut [T], usize, Tokens<'a>, &'a mut [f32]);
    impl<T: Float> Visitor<T> for Pass<'_, T> {
        type Out = ();
        fn visit<K: Kernel>(self, kernel: K) {
            let Pass(logits, v, tokens, losses) = self;
            let (n, simd) = (losses.len(), kernel.simd());
            let outputs = (Rows::new(logits, v), Rows::new(losses, 1));
            parallel_split(n, 1, outputs, |rows, (logits, losses)| {
                let logits = logits.chunks_exact_mut(v);
                for ((row, logits), loss) in rows.zip(logits).zip(losses) {
                    *loss = tokens.loss(simd, row, logits);
                }
            });
        }
    }
    T::with_kernel(Pass(logits, v, tokens, losses));
}

impl Tokens<'_> {
    /// Weighted loss of one token; its logits become their gradient if that is wanted.
    fn loss<S: Simd, T: Float>(&self, simd: S, row: usize, logits: &mut [T]) -> f32 {
        let weight = self.weights.map_or(1.0, |weights| weights[row]);
        let (real, padding) = logits.split_at_mut(self.vocab);
        if self.gradient {
            padding.fill(T::default());
        }
        let Ok(target) = usize::try_from(self.targets[row]) else {
            if self.gradient {
                real.fill(T::default());
            }
            return 0.0;
        };
        let at_target = real[target].to_f32();
        let most = largest::<S, T>(simd, real);
        let denominator = denominator::<S, T>(simd, real, most);
        if self.gradient {
            let factor = weight / denominator;
            softmax::<S, T>(simd, real, most, factor);
            real[target] = T::from_f32(exp(at_target - most) * factor - weight);
        }
        (denominator.ln() + most - at_target) * weight
    }
}

/// eˣ for `x ≤ 0`, as accurate as numbers of dtype T are: 3e-6 for bf16, 2e-7 for fp32.
#[inline(always)]
fn exp_vector<S: Simd, T: Float>(simd: S, x: S::F) -> S::F {
    if size_of::<T>() == 2 {
        return simd.exp2(simd.mul(x, simd.splat(std::f32::consts::LOG2_E)));
    }
    simd.exp(x)
}

/// Vectors per step: independent chains of maxima and sums.
const CHAINS: usize = 4;

per_level! {
/// The largest of some numbers.
fn largest[S, T: Float](simd: S, x: &[T]) -> f32 {
    let least = simd.splat(f32::NEG_INFINITY);
    let mut most = [least; CHAINS];
    let (quads, rest) = x.as_chunks::<{ CHAINS * WIDTH }>();
    for quad in quads {
        let (vectors, _) = quad.as_chunks::<WIDTH>();
        for (most, x) in most.iter_mut().zip(vectors) {
            *most = simd.max(T::load(simd, x), *most);
        }
    }
    let (vectors, rest) = rest.as_chunks::<WIDTH>();
    for x in vectors {
        most[0] = simd.max(T::load(simd, x), most[0]);
    }
    let most = simd.max(simd.max(most[0], most[1]), simd.max(most[2], most[3]));
    let mut lanes = [0.0; WIDTH];
    simd.store(most, &mut lanes);
    let rest = rest.iter().map(|x| x.to_f32());
    lanes.into_iter().chain(rest).fold(f32::NEG_INFINITY, f32::max)
}
}

per_level! {
/// `Σ exp(x − most)`
fn denominator[S, T: Float](simd: S, x: &[T], most: f32) -> f32 {
    let shift = simd.splat(most);
    let mut sums = [simd.splat(0.0); CHAINS];
    let (quads, rest) = x.as_chunks::<{ CHAINS * WIDTH }>();
    for quad in quads {
        let (vectors, _) = quad.as_chunks::<WIDTH>();
        for (sum, x) in sums.iter_mut().zip(vectors) {
            let e = exp_vector::<S, T>(simd, simd.sub(T::load(simd, x), shift));
            *sum = simd.add(*sum, e);
        }
    }
    let (vectors, rest) = rest.as_chunks::<WIDTH>();
    for x in vectors {
        let e = exp_vector::<S, T>(simd, simd.sub(T::load(simd, x), shift));
        sums[0] = simd.add(sums[0], e);
    }
    let sums = simd.add(simd.add(sums[0], sums[1]), simd.add(sums[2], sums[3]));
    simd.sum(sums) + rest.iter().map(|x| exp(x.to_f32() - most)).sum::<f32>()
}
}

per_level! {
/// `x = factor · exp(x − most)`, zero where that would be denormal: such factors would slow the
/// products that follow many times.
fn softmax[S, T: Float](simd: S, x: &mut [T], most: f32, factor: f32) {
    let (shift, factor) = (simd.splat(most), simd.splat(factor));
    let (zero, normal) = (simd.splat(0.0), simd.splat(f32::MIN_POSITIVE));
    for at in (0..x.len()).step_by(WIDTH) {
        let e = exp_vector::<S, T>(simd, simd.sub(load_padded(simd, x, at), shift));
        let gradient = simd.mul(e, factor);
        let size = simd.max(gradient, simd.sub(zero, gradient));
        let tiny = simd.greater(normal, size);
        store_cut(simd, simd.select(tiny, zero, gradient), x, at);
    }
}
}
