//! Sizes of blocks and of scratch, from the shape and the caches.

use super::Shape;
use crate::microkernel::Element;
use crate::microkernel::pack::row_stride;
use crate::simd::vector::WIDTH;
use crate::sys::caches::Caches;
use crate::sys::scratch::{Area, Layout};

/// Columns of a strip, two panels: what one pass of the micro-kernel holds in registers. Blocks
/// are multiples of it, so a strip meets the diagonal only at its own first row.
pub(super) const GRAIN: usize = 2 * WIDTH;

/// Which passes a scratch buffer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passes {
    /// The forward pass alone.
    Forward,
    /// Both.
    Both,
}

/// The greatest multiple of [`GRAIN`] of at most `tokens`, within `least..=most`.
fn block(tokens: usize, least: usize, most: usize) -> usize {
    (tokens / GRAIN * GRAIN).clamp(least, most)
}

/// The most columns that documents of more than `short` tokens have in all, each one's tokens
/// rounded up to [`GRAIN`]. Short documents, of which there may be as many as tokens, are kept out
/// of shared areas: memory follows from the number of tokens alone.
fn columns(tokens: usize, short: usize) -> usize {
    tokens + tokens / (short + 1) * (GRAIN - 1)
}

/// Inner length of products over the head dimension.
pub(super) fn inner<E: Element>(d: usize) -> usize {
    d.next_multiple_of(E::PER_WORD)
}

/// Blocks and areas of the forward pass.
pub(super) struct Forward<E> {
    /// Tokens of a block of queries: a task takes this many in every head of a group.
    pub(super) queries: usize,
    /// Tokens of a block of keys.
    pub(super) keys: usize,
    /// The most columns of all long documents: those that are more than one task.
    pub(super) columns: usize,
    /// Keys `[nkv, batch · seq]` as dense rows.
    pub(super) k: Area<E>,
    /// Values turned, `[nkv][block of keys][d][columns of the block]`.
    pub(super) v: Area<E>,
    /// Of a thread: keys of a short document, as `k`.
    pub(super) own_k: Area<E>,
    /// Of a thread: values of a short document, as `v`.
    pub(super) own_v: Area<E>,
    /// Of a thread: queries of a task as panels, `[strip]`.
    pub(super) q: Area<E>,
    /// Of a thread: sums of outputs turned, `[strip][d][GRAIN]`.
    pub(super) o: Area<f32>,
    /// Of a thread: running maxima, `[strip][GRAIN]`.
    pub(super) most: Area<f32>,
    /// Of a thread: running sums, `[strip][GRAIN]`.
    pub(super) sum: Area<f32>,
    /// Of a thread: scores of a strip turned, `[keys][GRAIN]`.
    pub(super) s: Area<f32>,
    /// Of a thread: probabilities of a strip in two panels.
    pub(super) p: Area<E>,
    /// From one thread's areas to the next one's.
    pub(super) per_thread: usize,
    /// fp32 numbers of the buffer.
    pub(super) len: usize,
}

impl<E: Element> Forward<E> {
    pub(super) fn new(shape: Shape, threads: usize, caches: Caches) -> Self {
        let (d, size) = (shape.d, size_of::<E>());
        let inner = inner::<E>(d);
        // L1 holds a strip's scores and probabilities, its queries and its sums; keys and values
        // stream past it from L2, each line used by a whole strip. 32 KiB and d = 64 in bf16: 64.
        let strip = GRAIN * (inner * size + 4 * d);
        let per_key = GRAIN * (4 + size);
        let keys = block((caches.l1 * 3 / 4).saturating_sub(strip) / per_key, 64, 256);
        // A quarter of L2 holds queries and sums of a task; a block of keys is read from farther
        // away once per task. More than 128 tokens would leave too few tasks for many threads.
        let per_query = shape.group() * (inner * size + 4 * d);
        let queries = block(caches.l2 / 4 / per_query, GRAIN, 128);
        let strips = shape.group() * queries / GRAIN;

        let tokens = shape.batch * shape.seq;
        let columns = columns(tokens, queries);
        let mut layout = Layout::default();
        let k = layout.take(shape.nkv * tokens * row_stride::<E>(d));
        let v = layout.take(shape.nkv * columns * d);
        let shared = layout.end();
        let own_k = layout.take(queries * row_stride::<E>(d));
        let own_v = layout.take(queries * d);
        let q = layout.take(strips * GRAIN * inner);
        let o = layout.take(strips * GRAIN * d);
        let most = layout.take(strips * GRAIN);
        let sum = layout.take(strips * GRAIN);
        let s = layout.take(keys * GRAIN);
        let p = layout.take(keys * GRAIN);
        let per_thread = layout.end() - shared;
        Forward {
            queries,
            keys,
            columns,
            k,
            v,
            own_k,
            own_v,
            q,
            o,
            most,
            sum,
            s,
            p,
            per_thread,
            len: Layout::buffer_len(shared + threads * per_thread),
        }
    }
}

/// Blocks and areas of the backward pass.
pub(super) struct Backward<E> {
    /// Tokens of a block of queries, rows of the products.
    pub(super) queries: usize,
    /// Tokens of a block of keys.
    pub(super) keys: usize,
    /// Tokens of the square that a task takes, of queries and keys alike.
    pub(super) square: usize,
    /// The most columns of all long documents: those of more than one square.
    pub(super) columns: usize,
    /// The most squares along one side of all long documents.
    pub(super) squares: usize,
    /// Width of the rows of `dq`.
    pub(super) width: usize,
    /// Sums of dq, `[nq, batch · seq, width]`.
    pub(super) dq: Area<f32>,
    /// Sums of dk turned, `[nkv][strip][d][GRAIN]`.
    pub(super) dk: Area<f32>,
    /// Sums of dv, as `dk`.
    pub(super) dv: Area<f32>,
    /// Tasks done, `[nkv][rows or columns][squares]`.
    pub(super) done: Area<u32>,
    /// Of a thread: keys of a square, turned, as panels.
    pub(super) k_turned: Area<E>,
    /// Of a thread: values of a square, turned, as panels.
    pub(super) v_turned: Area<E>,
    /// Of a thread: keys of a square as panels.
    pub(super) k_panels: Area<E>,
    /// Of a thread: queries of a block as rows.
    pub(super) q_rows: Area<E>,
    /// Of a thread: the same, turned.
    pub(super) q_turned: Area<E>,
    /// Of a thread: gradients of a block's outputs as rows.
    pub(super) do_rows: Area<E>,
    /// Of a thread: the same, turned.
    pub(super) do_turned: Area<E>,
    /// Of a thread: log-sum-exp of a block's queries, base 2.
    pub(super) lse: Area<f32>,
    /// Of a thread: `Σ dout · out` of a block's queries.
    pub(super) delta: Area<f32>,
    /// Of a thread: scores of a strip.
    pub(super) s: Area<f32>,
    /// Of a thread: gradients of a strip's probabilities.
    pub(super) dp: Area<f32>,
    /// Of a thread: probabilities of a strip in two panels.
    pub(super) p: Area<E>,
    /// Of a thread: gradients of a strip's scores in two panels.
    pub(super) ds_panels: Area<E>,
    /// Of a thread: gradients of a block's scores as rows.
    pub(super) ds_rows: Area<E>,
    /// Of a thread: sums of dq of a block, for documents of one square.
    pub(super) own_dq: Area<f32>,
    /// Of a thread: sums of dk of a square, for documents of one square.
    pub(super) own_dk: Area<f32>,
    /// Of a thread: as `own_dk`.
    pub(super) own_dv: Area<f32>,
    /// From one thread's areas to the next one's.
    pub(super) per_thread: usize,
    /// fp32 numbers of the buffer.
    pub(super) len: usize,
}

impl<E: Element> Backward<E> {
    pub(super) fn new(shape: Shape, threads: usize, caches: Caches) -> Self {
        let (d, size) = (shape.d, size_of::<E>());
        let inner = inner::<E>(d);
        let width = d.next_multiple_of(WIDTH);
        // Half of L2 holds keys and values of a square (packed three ways) and the sums of their
        // gradients; the larger the square, the less packing. 1 MiB and d = 64 in bf16: 512. More
        // would leave too few squares for many threads.
        let per_key = 3 * inner * size + 8 * d;
        let square = block(caches.l2 / 2 / per_key, 64, 512);
        // 3/8 of L2 hold what a step keeps of its queries: the more there are, the fewer times sums
        // of dK and dV pass through registers. 1 MiB and d = 64 in bf16: 256.
        let keys = 128;
        let per_query = 4 * inner * size + 2 * GRAIN * (4 + size) + keys * size;
        let queries = block(caches.l2 * 3 / 8 / per_query, GRAIN, square.min(256));

        let tokens = shape.batch * shape.seq;
        let columns = columns(tokens, square);
        // A long document has at most twice as many squares as would fit without a remainder.
        let squares = 2 * tokens / square;
        let mut layout = Layout::default();
        let dq = layout.take(shape.nq * tokens * width);
        let dk = layout.take(shape.nkv * columns * d);
        let dv = layout.take(shape.nkv * columns * d);
        let done = layout.take(shape.nkv * 2 * squares);
        let shared = layout.end();
        let k_turned = layout.take(square * inner);
        let v_turned = layout.take(square * inner);
        let k_panels = layout.take(square * width);
        let q_rows = layout.take(queries * row_stride::<E>(d));
        let q_turned = layout.take(queries * d);
        let do_rows = layout.take(queries * row_stride::<E>(d));
        let do_turned = layout.take(queries * d);
        let lse = layout.take(queries);
        let delta = layout.take(queries);
        let s = layout.take(queries * GRAIN);
        let dp = layout.take(queries * GRAIN);
        let p = layout.take(queries * GRAIN);
        let ds_panels = layout.take(queries * GRAIN);
        let ds_rows = layout.take(queries * keys);
        let own_dq = layout.take(queries * width);
        let own_dk = layout.take(square * d);
        let own_dv = layout.take(square * d);
        let per_thread = layout.end() - shared;
        Backward {
            queries,
            keys,
            square,
            columns,
            squares,
            width,
            dq,
            dk,
            dv,
            done,
            k_turned,
            v_turned,
            k_panels,
            q_rows,
            q_turned,
            do_rows,
            do_turned,
            lse,
            delta,
            s,
            dp,
            p,
            ds_panels,
            ds_rows,
            own_dq,
            own_dk,
            own_dv,
            per_thread,
            len: Layout::buffer_len(shared + threads * per_thread),
        }
    }
}
