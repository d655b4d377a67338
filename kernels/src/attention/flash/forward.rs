//! The forward pass, turned on its side.
//!
//! A task is a block of queries of one key-value head: all query heads of the group, cut into
//! strips of 32 tokens of one head. For every block of keys up to the diagonal and every strip:
//!
//! * `Sᵀ = K · Qᵀ`: keys are rows, queries are columns, so maximum and sum of a query's scores run
//!   down a column, one lane of a register, without any shuffle;
//! * `P = 2^(Sᵀ·c − m)`, with pairs of rows interleaved on the way: that is the panel form;
//! * `Oᵀ += Vᵀ · P`.
//!
//! Keys as dense rows and values turned are prepared once for all tasks, in a loop before; those of
//! a document that is a single task, by that task.
//!
//! The subtracted maximum `m` is raised only when it falls behind by 2⁸, not with every new
//! maximum: sums have room for that in fp32, bf16 probabilities have the same relative precision at
//! every size, and the sums of outputs are hardly ever scaled again.

use std::ops::Range;

use crate::Error;
use crate::float::Operand;
use crate::microkernel::{Element, Kernel, Product, head, head_mut, pack};
use crate::simd::vector::{WIDTH, per_level};
use crate::sys::caches::Caches;
use crate::sys::parallel::{Counter, parallel_for, threads};
use crate::sys::scratch::Scratch;

use super::plan::{Forward, GRAIN, inner};
use super::tasks::{Place, Walk};
use super::{FORWARD, HeadsMut, Inputs, Shape};

/// How far, in powers of two, a score may exceed the subtracted maximum.
const SLACK: f32 = 8.0;

/// What every task sees.
struct Pass<'a, T, K: Kernel> {
    kernel: K,
    shape: Shape,
    plan: Forward<K::Element>,
    inputs: &'a Inputs<'a, T>,
    out: &'a HeadsMut<'a, T>,
    lse: Lse,
    scratch: Scratch<'a>,
}

/// `lse: [batch, nq, seq]`, while tasks share it.
struct Lse(*mut f32);

// SAFETY: stands for a unique borrow; tasks write disjoint parts.
unsafe impl Sync for Lse {}

pub(super) fn run<T, K>(
    kernel: K,
    shape: Shape,
    inputs: &Inputs<'_, T>,
    out: &mut HeadsMut<'_, T>,
    lse: &mut [f32],
    scratch: &mut [f32],
) -> Result<(), Error>
where
    T: Operand<K::Element>,
    K: Kernel,
{
    let team = threads();
    let plan = Forward::new(shape, team, Caches::of_this_machine());
    let scratch = Scratch::new(FORWARD, scratch, plan.len)?;
    let pass = Pass {
        kernel,
        shape,
        plan,
        inputs,
        out,
        lse: Lse(lse.as_mut_ptr()),
        scratch,
    };
    let (packing, attending) = (Counter::new(), Counter::new());
    let (keys, queries) = (pass.plan.keys, pass.plan.queries);
    let all = |_, blocks: usize| blocks * shape.nkv;
    let long = |tokens, blocks| {
        if tokens > queries {
            all(tokens, blocks)
        } else {
            0
        }
    };
    parallel_for(team, 1, |_| {
        let mut walk = Walk::new(inputs.documents, keys, queries);
        while let Some(place) = walk.seek(packing.claim(), long) {
            pass.pack_shared(place);
        }
    });
    parallel_for(team, 1, |workers| {
        let _region = kernel.enter();
        let mut walk = Walk::new(inputs.documents, queries, queries);
        while let Some(place) = walk.seek(attending.claim(), all) {
            pass.attend(place, workers.start);
        }
    });
    Ok(())
}

impl<T, K> Pass<'_, T, K>
where
    T: Operand<K::Element>,
    K: Kernel,
{
    /// Prepares one block of keys and values of a long document.
    fn pack_shared(&self, place: Place) {
        let (plan, shape) = (&self.plan, self.shape);
        let (block, head) = (place.task / shape.nkv, place.task % shape.nkv);
        let first = block * plan.keys;
        let n = (place.len - first).min(plan.keys);
        let stride = pack::row_stride::<K::Element>(shape.d);
        let token = self.token(place, head) + first;
        let wide = n.next_multiple_of(GRAIN);
        let column = head * plan.columns + place.columns + first;
        // SAFETY: these tokens and columns of the head belong to this task alone.
        let (k, v) = unsafe {
            (
                self.scratch
                    .get(plan.k, 0, token * stride..(token + n) * stride),
                self.scratch
                    .get(plan.v, 0, column * shape.d..(column + wide) * shape.d),
            )
        };
        self.pack(place, head, first..first + n, k, v);
    }

    /// Prepares some keys and values of a document.
    fn pack(
        &self,
        place: Place,
        head: usize,
        tokens: Range<usize>,
        k_to: &mut [K::Element],
        v_to: &mut [K::Element],
    ) {
        let (simd, n) = (self.kernel.simd(), tokens.len());
        let at = place.first + tokens.start;
        let k = self.inputs.k.rows(place.sample, at, n, head);
        let v = self.inputs.v.rows(place.sample, at, n, head);
        let wide = n.next_multiple_of(GRAIN);
        pack::rows::<K::Simd, K::Element, T>(simd, k, k_to);
        pack::turned_rows::<K::Simd, K::Element, T>(simd, v, v_to, wide);
    }

    /// Keys and values of a short document, in a thread's own areas.
    fn pack_own(&self, place: Place, head: usize, shift: usize) -> [&[K::Element]; 2] {
        let (plan, d) = (&self.plan, self.shape.d);
        let stride = pack::row_stride::<K::Element>(d);
        // SAFETY: the areas of this worker are its own, and it uses them for one document at a time.
        let (k, v) = unsafe {
            (
                self.scratch.get(plan.own_k, shift, 0..plan.own_k.len),
                self.scratch.get(plan.own_v, shift, 0..plan.own_v.len),
            )
        };
        for first in (0..place.len).step_by(plan.keys) {
            let n = (place.len - first).min(plan.keys);
            let k = &mut k[first * stride..(first + n) * stride];
            self.pack(place, head, first..first + n, k, &mut v[first * d..]);
        }
        [k, v]
    }

    /// Where a document begins among `[nkv, batch · seq]` tokens.
    fn token(&self, place: Place, head: usize) -> usize {
        (head * self.shape.batch + place.sample) * self.shape.seq + place.first
    }

    /// One block of queries in all heads of a group.
    fn attend(&self, place: Place, worker: usize) {
        let (plan, shape, kernel) = (&self.plan, self.shape, self.kernel);
        let simd = kernel.simd();
        let blocks = place.len.div_ceil(plan.queries);
        // The last block sees the most keys: heavy tasks first.
        let block = blocks - 1 - place.task / shape.nkv;
        let kv_head = place.task % shape.nkv;
        let first = block * plan.queries;
        let n = (place.len - first).min(plan.queries);
        let (d, group) = (shape.d, shape.group());
        let inner = inner::<K::Element>(d);
        let shift = worker * plan.per_thread;
        // SAFETY: the areas of this worker are its own.
        let (q, o, most, sum, s, p) = unsafe {
            let scratch = &self.scratch;
            (
                scratch.get(plan.q, shift, 0..plan.q.len),
                scratch.get(plan.o, shift, 0..plan.o.len),
                scratch.get(plan.most, shift, 0..plan.most.len),
                scratch.get(plan.sum, shift, 0..plan.sum.len),
                scratch.get(plan.s, shift, 0..plan.s.len),
                scratch.get(plan.p, shift, 0..plan.p.len),
            )
        };
        let (token, column, [keys, values]) = if place.len > plan.queries {
            let token = self.token(place, kv_head);
            let column = kv_head * plan.columns + place.columns;
            // SAFETY: they are complete and no longer written, so shared references may overlap.
            let shared = unsafe { [self.scratch.share(plan.k), self.scratch.share(plan.v)] };
            (token, column, shared)
        } else {
            (0, 0, self.pack_own(place, kv_head, shift))
        };
        let strips = n.div_ceil(GRAIN);
        let heads = kv_head * group..(kv_head + 1) * group;
        for (g, head) in heads.clone().enumerate() {
            let from = self
                .inputs
                .q
                .rows(place.sample, place.first + first, n, head);
            let to = &mut q[g * strips * GRAIN * inner..(g + 1) * strips * GRAIN * inner];
            pack::turned_panels::<K::Simd, K::Element, T>(simd, from, to, 2 * strips);
        }
        most[..group * strips * GRAIN].fill(f32::NEG_INFINITY);
        sum[..group * strips * GRAIN].fill(0.0);
        let factor = self.inputs.scale * std::f32::consts::LOG2_E;
        let stride = pack::row_stride::<K::Element>(d);

        for at in (0..first + n).step_by(plan.keys) {
            let in_block = (place.len - at).min(plan.keys);
            let k = &keys[(token + at) * stride..][..in_block * stride];
            let wide = in_block.next_multiple_of(GRAIN);
            let v = &values[(column + at) * d..][..wide * d];
            for g in 0..group {
                for strip in 0..strips {
                    // Keys that the strip's last query sees.
                    let query = first + strip * GRAIN;
                    let rows = in_block.min((query + GRAIN).saturating_sub(at));
                    if rows == 0 {
                        continue;
                    }
                    // A last strip of at most 16 tokens is one panel wide.
                    let panels = (n - strip * GRAIN).div_ceil(WIDTH).min(2);
                    let index = g * strips + strip;
                    let q = &q[index * GRAIN * inner..][..GRAIN * inner];
                    let o = &mut o[index * GRAIN * d..][..GRAIN * d];
                    let column = index * GRAIN..(index + 1) * GRAIN;
                    let scores = Product {
                        rows,
                        panels,
                        k: inner,
                        a_row: stride,
                        b_panel: WIDTH * inner,
                        c_row: GRAIN,
                        add: false,
                    };
                    kernel.multiply(scores, k, q, s);
                    let strip = Strip {
                        s,
                        rows,
                        below: query as isize - at as isize,
                        factor,
                        panel: WIDTH * plan.keys,
                        d,
                        started: at > 0,
                    };
                    let (most, sum) = (&mut most[column.clone()], &mut sum[column]);
                    match panels {
                        1 => softmax::<_, K::Element, 1>(simd, strip, most, sum, o, p),
                        _ => softmax::<_, K::Element, 2>(simd, strip, most, sum, o, p),
                    }
                    let outputs = Product {
                        rows: d,
                        panels,
                        k: rows.next_multiple_of(K::Element::PER_WORD),
                        a_row: wide,
                        b_panel: WIDTH * plan.keys,
                        c_row: GRAIN,
                        add: at > 0,
                    };
                    kernel.multiply(outputs, v, p, o);
                }
            }
        }

        for (g, head) in heads.enumerate() {
            for strip in 0..strips {
                let index = g * strips + strip;
                let o = &o[index * GRAIN * d..][..GRAIN * d];
                let token = place.first + first + strip * GRAIN;
                let tokens = (n - strip * GRAIN).min(GRAIN);
                let mut factors = [0.0; GRAIN];
                let lse_at = (place.sample * shape.nq + head) * shape.seq + token;
                // SAFETY: these tokens of this head belong to this task alone; the caller checked
                // the length of `lse`.
                let (lse, to) = unsafe {
                    (
                        std::slice::from_raw_parts_mut(self.lse.0.add(lse_at), tokens),
                        self.out.rows(place.sample, token, tokens, head),
                    )
                };
                for i in 0..tokens {
                    let (most, sum) = (most[index * GRAIN + i], sum[index * GRAIN + i]);
                    factors[i] = 1.0 / sum;
                    lse[i] = most * std::f32::consts::LN_2 + sum.ln();
                }
                pack::write_turned::<K::Simd, T>(simd, o, GRAIN, &factors, to);
            }
        }
    }
}

/// A strip of scores and where it lies.
struct Strip<'a> {
    /// Scores turned, rows of [`GRAIN`].
    s: &'a mut [f32],
    /// Rows, one per key.
    rows: usize,
    /// First query less first key: row `i` is seen by the columns from `i - below` on.
    below: isize,
    /// From a score to a power of two.
    factor: f32,
    /// From one panel of probabilities to the next.
    panel: usize,
    /// Rows of the outputs.
    d: usize,
    /// Whether the outputs hold sums already.
    started: bool,
}

per_level! {
/// Turns scores into probabilities: raises the maxima where needed (scaling sums and outputs),
/// writes `p` in `V` panels, with a row of zeros if a pair lacks one, and adds to the sums.
fn softmax[S, E: Element; const V: usize](
    simd: S, strip: Strip<'_>, most: &mut [f32], sum: &mut [f32], o: &mut [f32], p: &mut [E],
) {
    let Strip { s, rows, below, factor, panel, d, started } = strip;
    let s = &mut s[..rows * GRAIN];
    let hidden = simd.splat(f32::NEG_INFINITY);
    let edge = usize::try_from(below + 1).unwrap_or(0).min(rows);
    for (i, row) in s.chunks_exact_mut(GRAIN).enumerate().skip(edge) {
        for v in 0..V {
            let row = head_mut(&mut row[v * WIDTH..]);
            let lanes = (i as isize - below - (v * WIDTH) as isize).clamp(0, WIDTH as isize);
            let seen = (u32::from(u16::MAX) << lanes) as u16;
            simd.store(simd.select(seen, simd.load(row), hidden), row);
        }
    }
    let mut top = [[hidden; V]; 4];
    let (quads, rest) = s.as_chunks::<{ 4 * GRAIN }>();
    for quad in quads {
        for (r, top) in top.iter_mut().enumerate() {
            for v in 0..V {
                top[v] = simd.max(simd.load(head(&quad[r * GRAIN + v * WIDTH..])), top[v]);
            }
        }
    }
    for row in rest.chunks_exact(GRAIN) {
        for v in 0..V {
            top[0][v] = simd.max(simd.load(head(&row[v * WIDTH..])), top[0][v]);
        }
    }
    let (factor, slack) = (simd.splat(factor), simd.splat(SLACK));
    let zero = simd.splat(0.0);
    let mut minus = [zero; V];
    let mut sums = [[zero; V]; 2];
    for v in 0..V {
        let at = v * WIDTH;
        let pairwise = [simd.max(top[0][v], top[1][v]), simd.max(top[2][v], top[3][v])];
        let found = simd.mul(simd.max(pairwise[0], pairwise[1]), factor);
        let before = simd.load(head(&most[at..]));
        sums[0][v] = simd.load(head(&sum[at..]));
        let behind = simd.greater(found, simd.add(before, slack));
        let now = simd.select(behind, found, before);
        if behind != 0 {
            simd.store(now, head_mut(&mut most[at..]));
            let shrink = simd.exp2(simd.sub(before, now));
            sums[0][v] = simd.mul(sums[0][v], shrink);
            if started {
                for row in o.chunks_exact_mut(GRAIN).take(d) {
                    let cell = head_mut(&mut row[at..]);
                    simd.store(simd.mul(simd.load(cell), shrink), cell);
                }
            }
        }
        minus[v] = simd.sub(zero, now);
    }
    let (pairs, last) = s.as_chunks::<{ 2 * GRAIN }>();
    for (i, pair) in pairs.iter().enumerate() {
        for v in 0..V {
            let even = simd.load(head(&pair[v * WIDTH..]));
            let odd = simd.load(head(&pair[GRAIN + v * WIDTH..]));
            let even = simd.exp2(simd.fma(even, factor, minus[v]));
            let odd = simd.exp2(simd.fma(odd, factor, minus[v]));
            sums[0][v] = simd.add(sums[0][v], even);
            sums[1][v] = simd.add(sums[1][v], odd);
            E::store_row_pair(simd, even, odd, &mut p[v * panel + 2 * i * WIDTH..]);
        }
    }
    if !last.is_empty() {
        for v in 0..V {
            let even = simd.load(head(&last[v * WIDTH..]));
            let even = simd.exp2(simd.fma(even, factor, minus[v]));
            sums[0][v] = simd.add(sums[0][v], even);
            E::store_row_pair(simd, even, zero, &mut p[v * panel + (rows - 1) * WIDTH..]);
        }
    }
    for v in 0..V {
        let total = simd.add(sums[0][v], sums[1][v]);
        simd.store(total, head_mut(&mut sum[v * WIDTH..]));
    }
}
}
