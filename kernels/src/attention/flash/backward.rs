//! The backward pass: five products per pair of blocks, each pair visited once.
//!
//! Here queries are rows and keys are columns. There is nothing to sum along a row of scores, since
//! the log-sum-exp is known, so nothing asks for the forward pass's orientation; and this one packs
//! keys and values once for all query heads of a group, and queries only as rows and turned rows:
//!
//! * `S = Q · Kᵀ`, `dP = dO · Vᵀ` for a strip of 32 keys;
//! * `P = 2^(S·c − lse)`, `dS = P ∘ (dP − δ)` with `δ = Σ dO ∘ O`; both leave as panels (pairs of
//!   rows interleaved), dS also as rows;
//! * `dVᵀ += dOᵀ · P`, `dKᵀ += Qᵀ · dS` for the strip;
//! * `dQ += dS · K` for the whole block of keys.
//!
//! A document of one square keeps its sums in the thread's own areas, which stay in L2.
//!
//! # Who adds what, and when
//!
//! A document's triangle is cut into squares of `square` tokens; a task is one square of one
//! key-value head with all its query heads. Tasks of a row of squares add to the same dQ, tasks of
//! a column to the same dK and dV. Splitting by columns with a second pass for dQ would compute S
//! and dP twice, seven products for five; private sums per thread would take memory per thread and
//! give other bits on another number of threads. Instead squares are taken diagonal by diagonal:
//! first those on the diagonal, then those one below it, and so on. No two squares of one diagonal
//! share a row or a column, so a single key-value head keeps as many threads busy as it has squares
//! along a side, and the order in which sums are added to is fixed. A task waits for the task
//! before it in its row and in its column; both were handed out long before it, so it seldom waits
//! in fact, and since tasks are handed out in this order and each waits only for earlier ones,
//! the earliest unfinished task never waits: there is no deadlock, however few threads there are.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::Error;
use crate::float::Operand;
use crate::microkernel::{Element, Kernel, Product, head, pack};
use crate::simd::vector::{WIDTH, per_level};
use crate::sys::caches::Caches;
use crate::sys::parallel::{Counter, parallel_for, threads};
use crate::sys::scratch::Scratch;

use super::plan::{Backward, GRAIN, inner};
use super::tasks::{Place, Walk};
use super::{BACKWARD, Gradients, Heads, Inputs, Shape};

/// What the backward pass reads.
#[derive(Clone, Copy)]
pub(super) struct Arguments<'a, T> {
    pub(super) inputs: &'a Inputs<'a, T>,
    pub(super) out: &'a Heads<'a, T>,
    pub(super) lse: &'a [f32],
    pub(super) dout: &'a Heads<'a, T>,
}

/// What every task sees.
struct Pass<'a, T, K: Kernel> {
    kernel: K,
    shape: Shape,
    plan: Backward<K::Element>,
    arguments: Arguments<'a, T>,
    gradients: &'a Gradients<'a, T>,
    scratch: Scratch<'a>,
}

pub(super) fn run<T, K>(
    kernel: K,
    shape: Shape,
    arguments: Arguments<'_, T>,
    gradients: &mut Gradients<'_, T>,
    scratch: &mut [f32],
) -> Result<(), Error>
where
    T: Operand<K::Element>,
    K: Kernel,
{
    let team = threads();
    let documents = arguments.inputs.documents;
    let plan = Backward::new(shape, team, Caches::of_this_machine());
    let scratch = Scratch::new(BACKWARD, scratch, plan.len)?;
    // SAFETY: no task runs yet.
    unsafe { scratch.get(plan.done, 0, 0..plan.done.len) }.fill(0);
    let pass = Pass {
        kernel,
        shape,
        plan,
        arguments,
        gradients,
        scratch,
    };
    let counter = Counter::new();
    parallel_for(team, 1, |workers| {
        let _region = kernel.enter();
        let mut walk = Walk::new(documents, pass.plan.square, pass.plan.square);
        let tasks_of = |_, side: usize| side * (side + 1) / 2 * shape.nkv;
        while let Some(place) = walk.seek(counter.claim(), tasks_of) {
            pass.square(place, workers.start);
        }
    });
    Ok(())
}

/// Waits until a row or column has had this many tasks.
fn wait(done: &AtomicU32, tasks: u32) {
    let mut spins = 0u32;
    while done.load(Ordering::Acquire) != tasks {
        spins += 1;
        if spins < 256 {
            std::hint::spin_loop();
        } else {
            // The other thread may need this core.
            std::thread::yield_now();
        }
    }
}

/// A thread's own areas.
struct Own<'a, E> {
    k_turned: &'a mut [E],
    v_turned: &'a mut [E],
    k_panels: &'a mut [E],
    q_rows: &'a mut [E],
    q_turned: &'a mut [E],
    do_rows: &'a mut [E],
    do_turned: &'a mut [E],
    lse: &'a mut [f32],
    delta: &'a mut [f32],
    s: &'a mut [f32],
    dp: &'a mut [f32],
    p: &'a mut [E],
    ds_panels: &'a mut [E],
    ds_rows: &'a mut [E],
}

/// Keys of a task and the sums of their gradients.
struct Keys<'a> {
    /// First key in the document.
    first: usize,
    /// Keys.
    n: usize,
    /// The same, rounded up to [`GRAIN`].
    wide: usize,
    /// Sums turned, `[strip][d][GRAIN]`: rows of the whole width would lie a power of two apart and
    /// fall into the same few sets of L1.
    dk: &'a mut [f32],
    /// As `dk`.
    dv: &'a mut [f32],
}

/// Queries of one step in one head.
struct Queries {
    /// First query in the document.
    first: usize,
    /// Queries.
    n: usize,
    /// Whether nothing has been added to their dq yet.
    fresh: bool,
    /// Whether this is the first head of a task on the diagonal. Then these queries are the first
    /// that keys from `first` on meet.
    opens: bool,
}

impl<T, K> Pass<'_, T, K>
where
    T: Operand<K::Element>,
    K: Kernel,
{
    /// One square of one key-value head.
    fn square(&self, place: Place, worker: usize) {
        let (plan, shape) = (&self.plan, self.shape);
        let side = place.len.div_ceil(plan.square);
        // Diagonal `below` has `side - below` squares in each key-value head.
        let (mut task, mut below) = (place.task, 0);
        while task >= (side - below) * shape.nkv {
            task -= (side - below) * shape.nkv;
            below += 1;
        }
        let (column, kv_head) = (task / shape.nkv, task % shape.nkv);
        let row = column + below;
        let own = self.own(worker);
        let first = column * plan.square;
        let n = (place.len - first).min(plan.square);
        let wide = n.next_multiple_of(GRAIN);
        self.pack_keys(place, kv_head, first, n, own);
        // Nobody else adds to the sums of a document of one square.
        let done = |of: usize, square: usize| {
            let at = (kv_head * 2 + of) * plan.squares + place.blocks + square;
            // SAFETY: from the start of the tasks on, these words are used as atomics only.
            (side > 1).then(|| unsafe { self.scratch.atomic(plan.done, at) })
        };
        let turns = [done(0, row), done(1, column)];
        for turn in turns.into_iter().flatten() {
            wait(turn, below as u32);
        }

        let d = shape.d;
        let at = (kv_head * plan.columns + place.columns + first) * d;
        // SAFETY: these columns belong to this task until it says that it is done, and this
        // thread's areas to this thread.
        let mut keys = unsafe {
            let (dk, dv) = if side == 1 {
                let shift = worker * plan.per_thread;
                (
                    self.scratch.get(plan.own_dk, shift, 0..wide * d),
                    self.scratch.get(plan.own_dv, shift, 0..wide * d),
                )
            } else {
                (
                    self.scratch.get(plan.dk, 0, at..at + wide * d),
                    self.scratch.get(plan.dv, 0, at..at + wide * d),
                )
            };
            Keys {
                first,
                n,
                wide,
                dk,
                dv,
            }
        };
        let group = shape.group();
        let rows_end = place.len.min((row + 1) * plan.square);
        for g in 0..group {
            for first in (row * plan.square..rows_end).step_by(plan.queries) {
                let queries = Queries {
                    first,
                    n: (rows_end - first).min(plan.queries),
                    fresh: below == 0,
                    opens: below == 0 && g == 0,
                };
                let head = kv_head * group + g;
                let dq = self.dq(place, head, &queries, worker);
                self.block(place, head, &queries, &mut keys, self.own(worker), dq);
                if below == row {
                    self.write_dq(place, head, &queries, dq);
                }
            }
        }
        if row + 1 == side {
            self.write_keys(place, kv_head, &keys);
        }
        for turn in turns.into_iter().flatten() {
            turn.store(below as u32 + 1, Ordering::Release);
        }
    }

    fn write_keys(&self, place: Place, head: usize, keys: &Keys<'_>) {
        let (simd, d, gradients) = (self.kernel.simd(), self.shape.d, &self.gradients);
        let factor = [self.arguments.inputs.scale];
        for strip in (0..keys.n).step_by(GRAIN) {
            let (token, n) = (
                place.first + keys.first + strip,
                (keys.n - strip).min(GRAIN),
            );
            let at = strip * d..(strip + GRAIN) * d;
            // SAFETY: the column is complete, and its tokens of this head belong to no other.
            let (dk, dv) = unsafe {
                (
                    gradients.dk.rows(place.sample, token, n, head),
                    gradients.dv.rows(place.sample, token, n, head),
                )
            };
            pack::write_turned::<K::Simd, T>(simd, &keys.dk[at.clone()], GRAIN, &factor, dk);
            pack::write_turned::<K::Simd, T>(simd, &keys.dv[at], GRAIN, &[1.0], dv);
        }
    }

    /// The areas of a thread.
    fn own(&self, worker: usize) -> Own<'_, K::Element> {
        let (plan, scratch) = (&self.plan, &self.scratch);
        let shift = worker * plan.per_thread;
        // SAFETY: only this worker uses them, and it drops one set before it takes the next.
        unsafe {
            Own {
                k_turned: scratch.get(plan.k_turned, shift, 0..plan.k_turned.len),
                v_turned: scratch.get(plan.v_turned, shift, 0..plan.v_turned.len),
                k_panels: scratch.get(plan.k_panels, shift, 0..plan.k_panels.len),
                q_rows: scratch.get(plan.q_rows, shift, 0..plan.q_rows.len),
                q_turned: scratch.get(plan.q_turned, shift, 0..plan.q_turned.len),
                do_rows: scratch.get(plan.do_rows, shift, 0..plan.do_rows.len),
                do_turned: scratch.get(plan.do_turned, shift, 0..plan.do_turned.len),
                lse: scratch.get(plan.lse, shift, 0..plan.lse.len),
                delta: scratch.get(plan.delta, shift, 0..plan.delta.len),
                s: scratch.get(plan.s, shift, 0..plan.s.len),
                dp: scratch.get(plan.dp, shift, 0..plan.dp.len),
                p: scratch.get(plan.p, shift, 0..plan.p.len),
                ds_panels: scratch.get(plan.ds_panels, shift, 0..plan.ds_panels.len),
                ds_rows: scratch.get(plan.ds_rows, shift, 0..plan.ds_rows.len),
            }
        }
    }

    fn pack_keys(
        &self,
        place: Place,
        head: usize,
        first: usize,
        n: usize,
        own: Own<'_, K::Element>,
    ) {
        let (simd, inputs) = (self.kernel.simd(), self.arguments.inputs);
        let k = inputs.k.rows(place.sample, place.first + first, n, head);
        let v = inputs.v.rows(place.sample, place.first + first, n, head);
        let wide = n.next_multiple_of(GRAIN);
        pack::turned_panels::<K::Simd, K::Element, T>(simd, k, own.k_turned, wide / WIDTH);
        pack::turned_panels::<K::Simd, K::Element, T>(simd, v, own.v_turned, wide / WIDTH);
        pack::panels::<K::Simd, K::Element, T>(simd, k, own.k_panels, wide);
    }

    /// Sums of dq of some queries of a head.
    #[allow(clippy::mut_from_ref)]
    fn dq(&self, place: Place, head: usize, queries: &Queries, worker: usize) -> &mut [f32] {
        let (shape, width) = (self.shape, self.plan.width);
        let token = (head * shape.batch + place.sample) * shape.seq + place.first + queries.first;
        // SAFETY: these rows belong to the task until it says that it is done, this thread's to
        // this thread, and it takes them once at a time.
        unsafe {
            if place.len <= self.plan.square {
                let shift = worker * self.plan.per_thread;
                return self
                    .scratch
                    .get(self.plan.own_dq, shift, 0..queries.n * width);
            }
            let range = token * width..(token + queries.n) * width;
            self.scratch.get(self.plan.dq, 0, range)
        }
    }

    fn write_dq(&self, place: Place, head: usize, queries: &Queries, dq: &[f32]) {
        let token = place.first + queries.first;
        // SAFETY: the row of squares is complete, and its tokens of this head belong to no other.
        let to = unsafe { self.gradients.dq.rows(place.sample, token, queries.n, head) };
        let (simd, scale) = (self.kernel.simd(), self.arguments.inputs.scale);
        pack::write_rows::<K::Simd, T>(simd, dq, self.plan.width, scale, to);
    }

    /// One block of queries of one head against the keys of a task.
    fn block(
        &self,
        place: Place,
        head: usize,
        queries: &Queries,
        keys: &mut Keys<'_>,
        own: Own<'_, K::Element>,
        dq: &mut [f32],
    ) {
        let (plan, shape, kernel) = (&self.plan, self.shape, self.kernel);
        let (simd, d) = (kernel.simd(), self.shape.d);
        let per_word = K::Element::PER_WORD;
        let inner = inner::<K::Element>(d);
        let arguments = &self.arguments;
        let Queries { first, n, .. } = *queries;
        let token = place.first + first;
        let q = arguments.inputs.q.rows(place.sample, token, n, head);
        let dout = arguments.dout.rows(place.sample, token, n, head);
        let out = arguments.out.rows(place.sample, token, n, head);
        pack::rows::<K::Simd, K::Element, T>(simd, q, own.q_rows);
        pack::rows::<K::Simd, K::Element, T>(simd, dout, own.do_rows);
        let turned = plan.queries;
        pack::turned_rows::<K::Simd, K::Element, T>(simd, q, own.q_turned, turned);
        pack::turned_rows::<K::Simd, K::Element, T>(simd, dout, own.do_turned, turned);
        pack::row_dots::<K::Simd, T>(simd, dout, out, own.delta);
        let lse = &arguments.lse[(place.sample * shape.nq + head) * shape.seq + token..][..n];
        for (to, lse) in own.lse.iter_mut().zip(lse) {
            *to = lse * std::f32::consts::LOG2_E;
        }
        // A pair may need one row more than there are queries: `gradients` writes zeros for it.
        let rows_end = n.next_multiple_of(2);
        let factor = arguments.inputs.scale * std::f32::consts::LOG2_E;
        let row = pack::row_stride::<K::Element>(d);

        // Keys behind the last query are seen by none.
        let seen = keys.n.min(first + n - keys.first);
        for at in (0..seen).step_by(plan.keys) {
            let in_block = (seen - at).min(plan.keys);
            for strip in (0..in_block).step_by(GRAIN) {
                let key = keys.first + at + strip;
                // Queries before the strip's first key see none of it. Blocks begin at multiples of
                // the strip's width, so this is one too.
                let skip = key.saturating_sub(first);
                let rows = n - skip;
                let column = at + strip;
                let scores = Product {
                    rows,
                    panels: 2,
                    k: inner,
                    a_row: row,
                    b_panel: WIDTH * inner,
                    c_row: GRAIN,
                    add: false,
                };
                let panel = column / WIDTH * WIDTH * inner;
                kernel.multiply(
                    scores,
                    &own.q_rows[skip * row..],
                    &own.k_turned[panel..],
                    own.s,
                );
                kernel.multiply(
                    scores,
                    &own.do_rows[skip * row..],
                    &own.v_turned[panel..],
                    own.dp,
                );
                let ds_rows = &mut own.ds_rows[skip * plan.keys + strip..];
                let strip = Strip {
                    s: own.s,
                    dp: own.dp,
                    rows,
                    ahead: (first + skip) as isize - key as isize,
                    factor,
                    lse: &own.lse[skip..n],
                    delta: &own.delta[skip..n],
                    panel: WIDTH * plan.queries,
                    row: plan.keys,
                };
                gradients::<_, K::Element>(simd, strip, own.p, own.ds_panels, ds_rows);
                let sums = Product {
                    rows: d,
                    panels: 2,
                    k: (rows_end - skip).next_multiple_of(per_word),
                    a_row: turned,
                    b_panel: WIDTH * plan.queries,
                    c_row: GRAIN,
                    add: !(queries.opens && key >= first),
                };
                let (dv, dk) = (&mut keys.dv[column * d..], &mut keys.dk[column * d..]);
                kernel.multiply(sums, &own.do_turned[skip..], own.p, dv);
                kernel.multiply(sums, &own.q_turned[skip..], own.ds_panels, dk);
            }
            // Where the block meets the diagonal, each strip of rows has its own number of keys.
            let begin = keys.first + at;
            let step = if begin + in_block <= first + 1 {
                n
            } else {
                GRAIN
            };
            for skip in (0..n).step_by(step) {
                let rows = (n - skip).min(step);
                let reach = in_block.min((first + skip + rows).saturating_sub(begin));
                let product = Product {
                    rows,
                    panels: plan.width / WIDTH,
                    k: reach.next_multiple_of(per_word),
                    a_row: plan.keys,
                    b_panel: WIDTH * keys.wide,
                    c_row: plan.width,
                    add: !(queries.fresh && at == 0),
                };
                if reach > 0 {
                    let ds = &own.ds_rows[skip * plan.keys..];
                    kernel.multiply(
                        product,
                        ds,
                        &own.k_panels[at * WIDTH..],
                        &mut dq[skip * plan.width..],
                    );
                }
            }
        }
    }
}

/// A strip of scores and where it lies.
struct Strip<'a> {
    /// Scores, rows of [`GRAIN`].
    s: &'a mut [f32],
    /// Gradients of the probabilities, as the scores.
    dp: &'a mut [f32],
    /// Rows, one per query.
    rows: usize,
    /// First query less first key: row `i` sees the columns up to `i + ahead`.
    ahead: isize,
    /// From a score to a power of two.
    factor: f32,
    /// Log-sum-exp of the rows, base 2.
    lse: &'a [f32],
    /// `Σ dO ∘ O` of the rows.
    delta: &'a [f32],
    /// From one panel to the next.
    panel: usize,
    /// From one row of `ds_rows` to the next.
    row: usize,
}

per_level! {
/// Turns scores and gradients of probabilities into panels of probabilities and gradients of
/// scores, the latter also as rows. A row that a pair lacks is zero.
fn gradients[S, E: Element](
    simd: S, strip: Strip<'_>, p: &mut [E], ds_panels: &mut [E], ds_rows: &mut [E],
) {
    let Strip { s, dp, rows, ahead, factor, lse, delta, panel, row } = strip;
    let zero = simd.splat(0.0);
    let factor = simd.splat(factor);
    // Rows from here on see every column.
    let open = usize::try_from(GRAIN as isize - 1 - ahead).unwrap_or(0);
    let (lse, delta) = (&lse[..rows], &delta[..rows]);
    let mut i = 0;
    while i < rows {
        let (mut probability, mut gradient) = ([[zero; 2]; 2], [[zero; 2]; 2]);
        for r in 0..2 {
            if i + r == rows {
                break;
            }
            let (minus, delta) = (simd.splat(-lse[i + r]), simd.splat(delta[i + r]));
            let s: &[f32; GRAIN] = head(&s[(i + r) * GRAIN..]);
            let dp: &[f32; GRAIN] = head(&dp[(i + r) * GRAIN..]);
            for v in 0..2 {
                let score = simd.load(head(&s[v * WIDTH..]));
                let mut weight = simd.exp2(simd.fma(score, factor, minus));
                if i + r < open {
                    let columns = (i + r) as isize + ahead + 1 - (v * WIDTH) as isize;
                    let hidden = (u32::from(u16::MAX) << columns.clamp(0, WIDTH as isize)) as u16;
                    weight = simd.select(hidden, zero, weight);
                }
                let dp = simd.load(head(&dp[v * WIDTH..]));
                probability[r][v] = weight;
                gradient[r][v] = simd.mul(weight, simd.sub(dp, delta));
            }
        }
        let (first, second) = p[i * WIDTH..].split_at_mut(panel - i * WIDTH);
        E::store_row_pair(simd, probability[0][0], probability[1][0], first);
        E::store_row_pair(simd, probability[0][1], probability[1][1], &mut second[i * WIDTH..]);
        let (first, second) = ds_panels[i * WIDTH..].split_at_mut(panel - i * WIDTH);
        let (even, odd) = ds_rows[i * row..].split_at_mut(row);
        E::store_row_pair_twice(
            simd, gradient[0], gradient[1], [even, odd], [first, &mut second[i * WIDTH..]],
        );
        i += 2;
    }
}
}
