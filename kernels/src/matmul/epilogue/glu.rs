//! The gated activation of a feed-forward layer, fused into the products around it.
//!
//! Its gate is `x · σ(z(x))` ([`Gate`]), `σ` being the logistic function: SiLU with `z = x`, and with
//! a cubic z the approximation of GELU by tanh, since `½ (1 + tanh u) = σ(2u)`.
//!
//! Both passes compute in fp32 from gate and up as they are stored, rounded to T: what the backward
//! pass reads is exactly what the forward pass used.

use super::{check_read, prefetch_read};
use crate::Error;
use crate::float::{Float, load_padded, store_cut};
use crate::matmul::operands::part;
use crate::matmul::{Block, Columns, Epilogue, Target, refuse};
use crate::microkernel::head;
use crate::microkernel::pack::{Strided, StridedMut};
use crate::simd::vector::{Simd, WIDTH, per_level};

/// The argument of `σ` in a gate.
pub trait Gate: Copy + Send + Sync + 'static {
    /// `z(x)`
    fn argument<S: Simd>(simd: S, x: S::F) -> S::F;

    /// `x · z'(x)`
    fn scaled_slope<S: Simd>(simd: S, x: S::F) -> S::F;
}

/// `silu(x) = x · σ(x)`
#[derive(Clone, Copy, Debug)]
pub struct Silu;

/// `x · σ(z)` with `z = √(8/π) · (x + 0.044715 · x³)`: GELU (Hendrycks and Gimpel 2016) approximated by
/// tanh, as Gemma has it.
#[derive(Clone, Copy, Debug)]
pub struct GeluTanh;

impl Gate for Silu {
    #[inline(always)]
    fn argument<S: Simd>(_: S, x: S::F) -> S::F {
        x
    }

    #[inline(always)]
    fn scaled_slope<S: Simd>(_: S, x: S::F) -> S::F {
        x
    }
}

impl GeluTanh {
    /// `√(8/π)`
    const SCALE: f32 = 1.595_769;
    const CUBE: f32 = 0.044_715;

    /// `scale · (x + cube · x³)`. Beyond ±30 σ is 0 or 1, and powers of x would only overflow.
    #[inline(always)]
    fn cubic<S: Simd>(simd: S, x: S::F, cube: f32) -> S::F {
        let minus = |x| simd.sub(simd.splat(0.0), x);
        let x = simd.max(simd.splat(-30.0), x);
        let x = minus(simd.max(simd.splat(-30.0), minus(x)));
        let scaled = simd.mul(x, simd.splat(Self::SCALE));
        simd.fma(simd.mul(simd.mul(x, x), simd.splat(cube)), scaled, scaled)
    }
}

impl Gate for GeluTanh {
    #[inline(always)]
    fn argument<S: Simd>(simd: S, x: S::F) -> S::F {
        Self::cubic(simd, x, Self::CUBE)
    }

    #[inline(always)]
    fn scaled_slope<S: Simd>(simd: S, x: S::F) -> S::F {
        Self::cubic(simd, x, 3.0 * Self::CUBE)
    }
}

/// Stores `gate_up: [n, 2·i]` and `gated: [n, i] = act(gate) · up`, both in T, with the activation
/// `G`. The product has [`Columns::Halves`] of `i`, so that a block holds gate and up of the same
/// columns.
pub struct Glu<'a, T, G> {
    /// The activation.
    pub gate: G,
    /// Gate, then up, in one row.
    pub gate_up: Target<'a, T>,
    /// Their activation.
    pub gated: Target<'a, T>,
}

/// Stores the gradients of gate and up, `[n, 2·i]` in T, given `gate_up: [n, 2·i]` in T; the sums
/// `[n, i]` are the gradient of the activation.
pub struct GluGradient<'a, T, G> {
    /// The activation.
    pub gate: G,
    /// Gate, then up, as the forward pass stored them.
    pub gate_up: Strided<'a, T>,
    /// Their gradients.
    pub d_gate_up: Target<'a, T>,
}

impl<T: Float, G: Gate> Epilogue for Glu<'_, T, G> {
    unsafe fn finish<S: Simd>(&self, simd: S, block: &Block, sums: &mut [f32]) {
        let [_, width] = self.gated.shape();
        let columns = pair_columns(block, width);
        let up = width + columns.start..width + columns.end;
        let rows = block.rows.clone();
        // SAFETY: these columns of these rows are in this block alone.
        let [gate, up, gated] = unsafe {
            [
                self.gate_up.part(rows.clone(), columns.clone()),
                self.gate_up.part(rows.clone(), up),
                self.gated.part(rows, columns),
            ]
        };
        forward::<S, T, G>(simd, sums, block, [gate, up, gated]);
    }

    fn prefetch(&self, block: &Block) {
        let [_, width] = self.gated.shape();
        let columns = pair_columns(block, width);
        for row in block.rows.clone() {
            let up = width + columns.start..width + columns.end;
            self.gate_up.prefetch(row, columns.clone());
            self.gate_up.prefetch(row, up);
            self.gated.prefetch(row, columns.clone());
        }
    }

    fn check(&self, rows: usize, columns: Columns) -> Result<(), Error> {
        let [_, width] = self.gated.shape();
        if columns != (Columns::Halves { width }) {
            return refuse(format!(
                "the product's columns must be halves of {width}, found {columns:?}"
            ));
        }
        self.gate_up.check("gate_up", [rows, 2 * width])?;
        self.gated.check("gated", [rows, width])
    }
}

impl<T: Float, G: Gate> Epilogue for GluGradient<'_, T, G> {
    unsafe fn finish<S: Simd>(&self, simd: S, block: &Block, sums: &mut [f32]) {
        let width = self.gate_up.d / 2;
        for run in block.runs() {
            let (rows, columns) = (block.rows.clone(), run.columns.clone());
            let up = width + columns.start..width + columns.end;
            let gate_up = [
                part(self.gate_up, rows.clone(), columns.clone()),
                part(self.gate_up, rows.clone(), up.clone()),
            ];
            // SAFETY: these columns of these rows are in this block alone.
            let gradients = unsafe {
                [
                    self.d_gate_up.part(rows.clone(), columns),
                    self.d_gate_up.part(rows, up),
                ]
            };
            backward::<S, T, G>(simd, run.sums(sums), block, gate_up, gradients);
        }
    }

    fn prefetch(&self, block: &Block) {
        let width = self.gate_up.d / 2;
        for run in block.runs() {
            for row in block.rows.clone() {
                let up = width + run.columns.start..width + run.columns.end;
                self.d_gate_up.prefetch(row, run.columns.clone());
                self.d_gate_up.prefetch(row, up);
            }
        }
        prefetch_read(self.gate_up, block, 0);
        prefetch_read(self.gate_up, block, width);
    }

    fn check(&self, rows: usize, columns: Columns) -> Result<(), Error> {
        if matches!(columns, Columns::Halves { .. }) {
            return refuse(format!("the product's columns may not be {columns:?}"));
        }
        let shape = [rows, 2 * columns.count()];
        check_read("gate_up", self.gate_up, shape)?;
        self.d_gate_up.check("d_gate_up", shape)
    }
}

/// Columns of a half that a block's pairs of panels hold.
#[inline(always)]
fn pair_columns(block: &Block, width: usize) -> std::ops::Range<usize> {
    block.panels.start / 2 * WIDTH..(block.panels.end / 2 * WIDTH).min(width)
}

/// `1 / (1 + e⁻ˣ)`, as accurate as numbers of dtype T are. [`Simd`] has no division: it is done lane
/// by lane, in a form that the compiler makes vectors of.
#[inline(always)]
fn sigmoid<S: Simd, T: Float>(simd: S, x: S::F) -> S::F {
    // From -87 on down the sigmoid is nothing beside 1, and e⁸⁷ is still finite.
    let minus = simd.sub(simd.splat(0.0), simd.max(simd.splat(-87.0), x));
    let power = if size_of::<T>() == 2 {
        simd.exp2(simd.mul(minus, simd.splat(std::f32::consts::LOG2_E)))
    } else {
        simd.exp(minus)
    };
    let mut lanes = [0.0; WIDTH];
    simd.store(simd.add(power, simd.splat(1.0)), &mut lanes);
    for x in &mut lanes {
        *x = 1.0 / *x;
    }
    simd.load(&lanes)
}

/// `act(gate) · up`
#[inline(always)]
fn activation<S: Simd, T: Float, G: Gate>(simd: S, gate: S::F, up: S::F) -> S::F {
    let s = sigmoid::<S, T>(simd, G::argument(simd, gate));
    simd.mul(simd.mul(gate, s), up)
}

/// Gradients of gate and up.
#[inline(always)]
fn slopes<S: Simd, T: Float, G: Gate>(simd: S, d: S::F, gate: S::F, up: S::F) -> [S::F; 2] {
    let (s, one) = (
        sigmoid::<S, T>(simd, G::argument(simd, gate)),
        simd.splat(1.0),
    );
    let ds = simd.mul(d, s);
    // (g · σ(z))' = σ(z) · (1 + g · z' · (1 − σ(z)))
    let slope = simd.fma(G::scaled_slope(simd, gate), simd.sub(one, s), one);
    [simd.mul(simd.mul(ds, up), slope), simd.mul(ds, gate)]
}

per_level! {
fn forward[S, T: Float, G: Gate](
    simd: S, sums: &[f32], block: &Block, to: [StridedMut<'_, T>; 3],
) {
    let [mut gate, mut up, mut gated] = to;
    for r in 0..block.rows.len() {
        let (gate, gate_rest) = gate.row(r).as_chunks_mut::<WIDTH>();
        let (up, up_rest) = up.row(r).as_chunks_mut::<WIDTH>();
        let (gated, gated_rest) = gated.row(r).as_chunks_mut::<WIDTH>();
        // Panels of the two halves alternate.
        let (pairs, _) = sums[r * block.stride..].as_chunks::<{ 2 * WIDTH }>();
        for (((pair, gate), up), gated) in pairs.iter().zip(&mut *gate).zip(up).zip(gated) {
            T::store(simd, simd.load(head(pair)), gate);
            T::store(simd, simd.load(head(&pair[WIDTH..])), up);
            let (g, u) = (T::load(simd, gate), T::load(simd, up));
            T::store(simd, activation::<S, T, G>(simd, g, u), gated);
        }
        if !gate_rest.is_empty() {
            let pair = &pairs[gate.len()];
            store_cut(simd, simd.load(head(pair)), gate_rest, 0);
            store_cut(simd, simd.load(head(&pair[WIDTH..])), up_rest, 0);
            let (g, u) = (load_padded(simd, gate_rest, 0), load_padded(simd, up_rest, 0));
            store_cut(simd, activation::<S, T, G>(simd, g, u), gated_rest, 0);
        }
    }
}
}

per_level! {
fn backward[S, T: Float, G: Gate](
    simd: S, sums: &[f32], block: &Block, gate_up: [Strided<'_, T>; 2],
    gradients: [StridedMut<'_, T>; 2],
) {
    let ([gate, up], [mut dgate, mut dup]) = (gate_up, gradients);
    for r in 0..block.rows.len() {
        let (gate, gate_rest) = gate.row(r).as_chunks::<WIDTH>();
        let (up, up_rest) = up.row(r).as_chunks::<WIDTH>();
        let (dgate, dgate_rest) = dgate.row(r).as_chunks_mut::<WIDTH>();
        let (dup, dup_rest) = dup.row(r).as_chunks_mut::<WIDTH>();
        let (sums, sums_rest) = sums[r * block.stride..].as_chunks::<WIDTH>();
        let gradients = dgate.iter_mut().zip(dup);
        for (((d, g), u), (dgate, dup)) in sums.iter().zip(gate).zip(up).zip(gradients) {
            let (g, u) = (T::load(simd, g), T::load(simd, u));
            let [dg, du] = slopes::<S, T, G>(simd, simd.load(d), g, u);
            T::store(simd, dg, dgate);
            T::store(simd, du, dup);
        }
        if !gate_rest.is_empty() {
            let d = sums.get(gate.len()).map_or(sums_rest, |d| &d[..]);
            let (g, u) = (load_padded(simd, gate_rest, 0), load_padded(simd, up_rest, 0));
            let [dg, du] = slopes::<S, T, G>(simd, load_padded(simd, d, 0), g, u);
            store_cut(simd, dg, dgate_rest, 0);
            store_cut(simd, du, dup_rest, 0);
        }
    }
}
}
