// Changing dtype between fp32 and bf16, and sums of two flat buffers (see `cast.rs` and
// `linear_add.rs`).
//
// Grid of all kernels: ceil(n / 4096) blocks. Block: 256 threads (any number is right where the
// grid is ceil(n / (16 * threads)) blocks). A thread moves four units of 4 elements, so that each
// access of a warp is contiguous in fp32 and in bf16; all loads are under way before the first is
// used. The last block, unless it is full, and all blocks of pointers that are not aligned go
// element by element.

#include "common.cuh"

#define UNIT 4u
#define UNITS 4u

// Four elements: 16 bytes of fp32, 8 bytes of bf16.
DEVICE void load(const f32 *at, float (&x)[UNIT]) {
  const Quad quad = load16(at);
  for (u32 i = 0; i < UNIT; i++) {
    x[i] = __uint_as_float(quad.word[i]);
  }
}

DEVICE void load(const bf16 *at, float (&x)[UNIT]) {
#ifdef OXITRON_EMULATOR
  emulator::check_aligned(at, sizeof(u64));
#endif
  const u64 four = *reinterpret_cast<const u64 *>(at);
  const u32 low = static_cast<u32>(four), high = static_cast<u32>(four >> 32);
  x[0] = __uint_as_float(low << 16);
  x[1] = __uint_as_float(low & 0xffff0000u);
  x[2] = __uint_as_float(high << 16);
  x[3] = __uint_as_float(high & 0xffff0000u);
}

DEVICE void store(f32 *at, const float (&x)[UNIT]) {
  Quad quad;
  for (u32 i = 0; i < UNIT; i++) {
    quad.word[i] = __float_as_uint(x[i]);
  }
  store16(at, quad);
}

DEVICE void store(bf16 *at, const float (&x)[UNIT]) {
#ifdef OXITRON_EMULATOR
  emulator::check_aligned(at, sizeof(u64));
#endif
  *reinterpret_cast<u64 *>(at) = u64(bf16_pair(x[2], x[3])) << 32 | bf16_pair(x[0], x[1]);
}

template <class T> DEVICE bool is_aligned(const T *at) {
  return reinterpret_cast<u64>(at) % (UNIT * sizeof(T)) == 0;
}

// Where a block's elements begin and how many there are; 0 in a block past the end.
struct Part {
  u64 begin;
  u32 count, full;
};

DEVICE Part part_of(u64 n) {
  const u32 full = blockDim.x * UNIT * UNITS;
  const u64 begin = u64(blockIdx.x) * full;
  const u64 rest = n > begin ? n - begin : 0;
  return Part{begin, rest < full ? u32(rest) : full, full};
}

template <class A, class B> DEVICE void convert(const A *x, u64 n, B *out) {
  const Part part = part_of(n);
  x += part.begin;
  out += part.begin;
  if (part.count < part.full || !is_aligned(x) || !is_aligned(out)) {
    for (u32 i = threadIdx.x; i < part.count; i += blockDim.x) {
      out[i] = from_f32<B>(to_f32(x[i]));
    }
    return;
  }
  float value[UNITS][UNIT];
  for (u32 k = 0; k < UNITS; k++) {
    load(x + (k * blockDim.x + threadIdx.x) * UNIT, value[k]);
  }
  for (u32 k = 0; k < UNITS; k++) {
    store(out + (k * blockDim.x + threadIdx.x) * UNIT, value[k]);
  }
}

// sum = a + b; the sum may be written where a is read.
template <class A, class B> DEVICE void add(const A *a, const B *b, u64 n, A *sum) {
  const Part part = part_of(n);
  a += part.begin;
  b += part.begin;
  sum += part.begin;
  if (part.count < part.full || !is_aligned(a) || !is_aligned(b) || !is_aligned(sum)) {
    for (u32 i = threadIdx.x; i < part.count; i += blockDim.x) {
      sum[i] = from_f32<A>(to_f32(a[i]) + to_f32(b[i]));
    }
    return;
  }
  float value[UNITS][UNIT], more[UNITS][UNIT];
  for (u32 k = 0; k < UNITS; k++) {
    load(a + (k * blockDim.x + threadIdx.x) * UNIT, value[k]);
    load(b + (k * blockDim.x + threadIdx.x) * UNIT, more[k]);
  }
  for (u32 k = 0; k < UNITS; k++) {
    for (u32 i = 0; i < UNIT; i++) {
      value[k][i] += more[k][i];
    }
    store(sum + (k * blockDim.x + threadIdx.x) * UNIT, value[k]);
  }
}

// out = x, rounded to nearest even where `out` is narrower.
#define CAST(A, B)                                                                                 \
  KERNEL(cast_##A##_##B)(const A *x, u64 n, B *out) { convert(x, n, out); }                        \
  EXPORT(cast_##A##_##B)

CAST(f32, f32)
CAST(f32, bf16)
CAST(bf16, f32)
CAST(bf16, bf16)

// out += x
#define ACCUMULATE(A)                                                                              \
  KERNEL(accumulate_##A)(const A *x, u64 n, f32 *out) { add(out, x, n, out); }                     \
  EXPORT(accumulate_##A)

ACCUMULATE(f32)
ACCUMULATE(bf16)

// sum = R(residual + product)
#define ADD(R, T)                                                                                  \
  KERNEL(add_##R##_##T)(const R *residual, const T *product, u64 n, R *sum) {                      \
    add(residual, product, n, sum);                                                                \
  }                                                                                                \
  EXPORT(add_##R##_##T)

ADD(f32, f32)
ADD(f32, bf16)
ADD(bf16, f32)
ADD(bf16, bf16)
