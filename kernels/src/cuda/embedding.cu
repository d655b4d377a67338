// Token embedding: picking rows of a matrix, and adding gradients back to them (see
// `embedding.rs`).

#include "packed.cuh"

// ---- forward ------------------------------------------------------------------------------------

// Rows that a block has under way: their ids, and then the rows themselves, are each waited for
// once.
constexpr u32 ROWS = 4;

template <class T, class R>
DEVICE void forward(const i64 *ids, const T *w, u64 v, u64 n, u64 h, bool aligned, R *y) {
  const u64 first = u64(blockIdx.x) * ROWS;
  const T *row[ROWS];
  bool known[ROWS];
#pragma unroll
  for (u32 r = 0; r < ROWS; r++) {
    const i64 id = first + r < n ? ids[first + r] : 0;
    known[r] = id >= 0 && static_cast<u64>(id) < v;
    row[r] = w + (known[r] ? id : 0) * h;
  }
  for (u64 start = u64(threadIdx.x) * GROUP; start < h; start += u64(blockDim.x) * GROUP) {
    Packed<T> group[ROWS];
#pragma unroll
    for (u32 r = 0; r < ROWS; r++) {
      group[r] = packed<T>(__uint_as_float(0x7fc00000u));
      if (known[r]) {
        load_packed_row(row[r], start, h, aligned, group[r]);
      }
    }
#pragma unroll
    for (u32 r = 0; r < ROWS; r++) {
      if (first + r < n) {
        float value[GROUP];
        unpack(group[r], value);
        store_row(y + (first + r) * h, start, h, aligned, value);
      }
    }
  }
}

// Grid: ceil(n / 4) blocks. Block: whole warps, ceil(h / 8) threads rounded up to them, at most
// 512. An id outside 0..v gives a row of NaN: nothing can be refused here, and the step must be
// found not finite.
#define FORWARD(T, R)                                                                              \
  KERNEL(__launch_bounds__(512) embedding_forward_##T##_##R)                                       \
  (const i64 *ids, const T *w, u64 v, u64 n, u64 h, i32 aligned, R *y) {                           \
    forward<T, R>(ids, w, v, n, h, aligned, y);                                                    \
  }                                                                                                \
  EXPORT(embedding_forward_##T##_##R)

FORWARD(f32, f32)
FORWARD(f32, bf16)
FORWARD(bf16, f32)
FORWARD(bf16, bf16)

// ---- backward -----------------------------------------------------------------------------------

// The rows of one id are a segment. A block has 256 columns of 16 segments. Each of its warps adds
// up one segment, row by row in their order onto the sum so far, as the CPU does. A segment of more
// than `LONG` rows is left to all warps together: each takes every 16th row, and what the warps
// have found is added up in their order. So the order depends on the number of rows alone.
//
// The segments of a block lie far apart in their order, for frequent ids are often neighbours. Of
// 65536 rows of 4096 bf16, an id with 5% of them has 16 blocks adding up 1.7 MB each, of which each
// keeps 32 KB under way: about 50 us, where all rows together take some 250 us to read and write.

constexpr u32 WARPS = 16;
constexpr u32 COLUMNS = WARP * GROUP;
constexpr u32 LONG = 64;

// No row.
constexpr u32 NONE = 0xffffffffu;

struct Segment {
  const i32 *rows;
  u32 length;
  i64 id;
};

// Adds every `step`-th row of a segment from `row` on to `sum`, for the columns from `start` on.
template <class R>
DEVICE void add_rows(const Segment &segment, u32 row, u32 step, const R *dy, u32 start, u64 h,
                     bool aligned, float (&sum)[GROUP]) {
  // 64 bytes of each thread under way.
  constexpr u32 AT_ONCE = 8 / sizeof(R);
  for (; row < segment.length; row += AT_ONCE * step) {
    // Positions first: the rows that they name are then under way together.
    u32 position[AT_ONCE];
#pragma unroll
    for (u32 j = 0; j < AT_ONCE; j++) {
      const u32 next = row + j * step;
      position[j] = next < segment.length ? segment.rows[next] : NONE;
    }
    // Adding -0 changes nothing, not even another -0.
    Packed<R> group[AT_ONCE];
#pragma unroll
    for (u32 j = 0; j < AT_ONCE; j++) {
      group[j] = packed<R>(-0.0f);
      if (position[j] != NONE) {
        load_packed_row(dy + position[j] * h, start, h, aligned, group[j]);
      }
    }
#pragma unroll
    for (u32 j = 0; j < AT_ONCE; j++) {
      float value[GROUP];
      unpack(group[j], value);
      for (u32 i = 0; i < GROUP; i++) {
        sum[i] += value[i];
      }
    }
  }
}

template <class R>
DEVICE void backward(const i32 *order, const i32 *starts, u32 segments, const i64 *ids, const R *dy,
                     u64 v, u64 h, bool aligned, f32 *dw) {
  __shared__ float partial[WARPS][COLUMNS];
  const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  // Blocks of the same segments are neighbours: together they read whole rows.
  const u32 slabs = static_cast<u32>((h + COLUMNS - 1) / COLUMNS);
  const u32 start = blockIdx.x % slabs * COLUMNS + lane * GROUP;
  const u32 first = blockIdx.x / slabs, apart = gridDim.x / slabs;
  // A segment's rows and id; of length 0 where there is nothing to add.
  const auto segment = [&](u32 of_warp) {
    const u64 number = first + u64(of_warp) * apart;
    Segment s{order, 0, 0};
    if (number < segments) {
      s.rows = order + starts[number];
      s.length = static_cast<u32>(starts[number + 1] - starts[number]);
      if (s.length > 0) {
        s.id = ids[s.rows[0]];
        s.length = s.id >= 0 && static_cast<u64>(s.id) < v ? s.length : 0;
      }
    }
    return s;
  };
  float sum[GROUP];
  const Segment own = segment(warp);
  const bool is_long = own.length > LONG;
  if (own.length > 0 && !is_long) {
    load_row(dw + own.id * h, start, h, aligned && start < h, sum);
    add_rows(own, 0, 1, dy, start, h, aligned, sum);
    store_row(dw + own.id * h, start, h, aligned && start < h, sum);
  }
  if (!__syncthreads_or(is_long)) {
    return;
  }
  for (u32 of_warp = 0; of_warp < WARPS; of_warp++) {
    const Segment shared = segment(of_warp);
    if (shared.length <= LONG) {
      continue;
    }
    for (u32 i = 0; i < GROUP; i++) {
      sum[i] = 0.0f;
    }
    add_rows(shared, warp, WARPS, dy, start, h, aligned, sum);
    for (u32 i = 0; i < GROUP; i++) {
      partial[warp][i * WARP + lane] = sum[i];
    }
    __syncthreads();
    if (warp == 0) {
      load_row(dw + shared.id * h, start, h, aligned && start < h, sum);
      for (u32 i = 0; i < GROUP; i++) {
        float found = partial[0][i * WARP + lane];
        for (u32 other = 1; other < WARPS; other++) {
          found += partial[other][i * WARP + lane];
        }
        sum[i] += found;
      }
      store_row(dw + shared.id * h, start, h, aligned && start < h, sum);
    }
    __syncthreads();
  }
}

// Grid: ceil(h / 256) * ceil(segments / 16) blocks. Block: 512 threads. `order` lists the rows of
// `dy` so that equal ids are neighbours, in ascending order within an id; segment s is
// order[starts[s] .. starts[s + 1]]. An id outside 0..v is passed over: the forward pass has made
// NaN of it.
#define BACKWARD(R)                                                                                \
  KERNEL(__launch_bounds__(512, 2) embedding_backward_##R)                                         \
  (const i32 *order, const i32 *starts, u32 segments, const i64 *ids, const R *dy, u64 v, u64 h,   \
   i32 aligned, f32 *dw) {                                                                         \
    backward<R>(order, starts, segments, ids, dy, v, h, aligned, dw);                              \
  }                                                                                                \
  EXPORT(embedding_backward_##R)

BACKWARD(f32)
BACKWARD(bf16)
