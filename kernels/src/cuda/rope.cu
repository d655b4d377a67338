// Rotary position embedding in the half-split layout (see `rope.rs`).
//
// A thread turns a group of the first half of one head with that of the second half. Cosines and
// sines are [limit, half] in fp32; all heads of a row use the same ones, which come from the L1
// cache but for the first.
//
// Block: (groups, together) with groups = ceil(half / 8), at most 256, and together = 256 / groups.
// Grid: ceil(n * heads / together) blocks, where `heads` are all heads of a row that a kernel
// touches. Any block is right whose second size is `together` in that grid.

#include "common.cuh"

// A thread's head, of `heads` in each row.
struct Place {
  u64 row;
  u32 head;
};

DEVICE Place place(u32 heads) {
  const u64 number = u64(blockIdx.x) * blockDim.y + threadIdx.y;
  const u64 row = number / heads;
  return Place{row, static_cast<u32>(number - row * heads)};
}

// The angles of a table of `limit` rows, looked up by position.
struct Table {
  const f32 *cos;
  const f32 *sin;
  u64 limit;
  const i64 *positions;
};

// Groups of a head in fp32: one of its first half and its counterpart.
struct Turned {
  float first[GROUP], second[GROUP];
};

template <class T>
DEVICE void load_pair(const T *head, u32 start, u32 half, bool aligned, Turned &x) {
  load_row(head, start, half, aligned, x.first);
  load_row(head + half, start, half, aligned, x.second);
}

template <class T>
DEVICE void store_pair(T *head, u32 start, u32 half, bool aligned, const Turned &x) {
  store_row(head, start, half, aligned, x.first);
  store_row(head + half, start, half, aligned, x.second);
}

DEVICE void turn(const Table &table, u64 row, u32 start, u32 half, float direction, bool aligned,
                 Turned &x) {
  const u64 position = static_cast<u64>(table.positions[row]);
  const u64 at = (position < table.limit ? position : 0) * half;
  float cos[GROUP], sin[GROUP];
  load_row(table.cos + at, start, half, aligned, cos);
  load_row(table.sin + at, start, half, aligned, sin);
  if (position >= table.limit) {
    // Nothing can be refused here: the step must be found not finite.
    direction = __uint_as_float(0x7fc00000u);
  }
  for (u32 i = 0; i < GROUP; i++) {
    const float a = x.first[i], b = x.second[i], c = cos[i], s = sin[i] * direction;
    x.first[i] = a * c - b * s;
    x.second[i] = b * c + a * s;
  }
}

template <class T>
DEVICE void rotate(T *x, u64 n, u32 heads, u32 half, u64 row_stride, const Table &table,
                   float direction, bool aligned) {
  const auto [row, number] = place(heads);
  if (row >= n) {
    return;
  }
  T *head = x + row * row_stride + number * (2 * u64(half));
  for (u32 start = threadIdx.x * GROUP; start < half; start += blockDim.x * GROUP) {
    Turned pair;
    load_pair(head, start, half, aligned, pair);
    turn(table, row, start, half, direction, aligned, pair);
    store_pair(head, start, half, aligned, pair);
  }
}

// Turns `heads` heads of each row of x in place; rows lie `row_stride` elements apart.
#define ROTATE(T)                                                                                  \
  KERNEL(__launch_bounds__(256) rope_rotate_##T)                                                   \
  (T *x, u64 n, u32 heads, u32 half, u64 row_stride, const f32 *cos, const f32 *sin, u64 limit,    \
   const i64 *positions, float direction, i32 aligned) {                                           \
    const Table table{cos, sin, limit, positions};                                                 \
    if (aligned) {                                                                                 \
      rotate(x, n, heads, half, row_stride, table, direction, true);                               \
    } else {                                                                                       \
      rotate(x, n, heads, half, row_stride, table, direction, false);                              \
    }                                                                                              \
  }                                                                                                \
  EXPORT(rope_rotate_##T)

ROTATE(f32)
ROTATE(bf16)
