// What every kernel shares: dtypes, 16-byte access, sums over a block, exported names.
//
// No header of CUDA is included, so that the run-time compiler alone is enough to build a kernel.
// The same text compiles as plain C++ against `emulator.h`, which comes first there.
//
// Conventions of all kernels:
//   * `f32` and `bf16` are the dtypes; arithmetic between loading and storing is fp32.
//   * Data moves in groups of 8 elements: one 16-byte access of bf16, two of fp32. A pointer or row
//     that does not allow it (`aligned` is false) is read element by element with the same result.
//   * A sum is taken in an order that depends on sizes alone, never on timing: no atomics.
//   * Sizes and offsets are 64 bits wide where they count elements of a tensor.
#pragma once

using f32 = float;
using f64 = double;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;

// bfloat16, kept as its bits.
struct alignas(2) bf16 {
  u16 bits;
};

#define DEVICE __device__ __forceinline__
#define WARP 32u
#define EVERY_LANE 0xffffffffu

// ---- dtypes -------------------------------------------------------------------------------------

DEVICE float to_f32(f32 x) { return x; }
DEVICE float to_f32(bf16 x) { return __uint_as_float(static_cast<u32>(x.bits) << 16); }

// Two numbers rounded to nearest even; the first lies in the lower half.
DEVICE u32 bf16_pair(float low, float high) {
#ifdef OXITRON_EMULATOR
  return emulator::round_bf16(low) | emulator::round_bf16(high) << 16;
#else
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#endif
}

template <class T> DEVICE T from_f32(float x);
template <> DEVICE f32 from_f32<f32>(float x) { return x; }
template <> DEVICE bf16 from_f32<bf16>(float x) {
  return bf16{static_cast<u16>(bf16_pair(x, 0.0f) & 0xffffu)};
}

// ---- groups of 8 elements -----------------------------------------------------------------------

#define GROUP 8u

struct alignas(16) Quad {
  u32 word[4];
};

DEVICE Quad load16(const void *at) {
#ifdef OXITRON_EMULATOR
  emulator::check_aligned(at, 16);
#endif
  return *static_cast<const Quad *>(at);
}

DEVICE void store16(void *at, Quad quad) {
#ifdef OXITRON_EMULATOR
  emulator::check_aligned(at, 16);
#endif
  *static_cast<Quad *>(at) = quad;
}

DEVICE void load_group(const f32 *at, float (&x)[GROUP]) {
  for (u32 half = 0; half < 2; half++) {
    const Quad quad = load16(at + 4 * half);
    for (u32 i = 0; i < 4; i++) {
      x[4 * half + i] = __uint_as_float(quad.word[i]);
    }
  }
}

DEVICE void load_group(const bf16 *at, float (&x)[GROUP]) {
  const Quad quad = load16(at);
  for (u32 i = 0; i < 4; i++) {
    x[2 * i] = __uint_as_float(quad.word[i] << 16);
    x[2 * i + 1] = __uint_as_float(quad.word[i] & 0xffff0000u);
  }
}

DEVICE void store_group(f32 *at, const float (&x)[GROUP]) {
  for (u32 half = 0; half < 2; half++) {
    Quad quad;
    for (u32 i = 0; i < 4; i++) {
      quad.word[i] = __float_as_uint(x[4 * half + i]);
    }
    store16(at + 4 * half, quad);
  }
}

DEVICE void store_group(bf16 *at, const float (&x)[GROUP]) {
  Quad quad;
  for (u32 i = 0; i < 4; i++) {
    quad.word[i] = bf16_pair(x[2 * i], x[2 * i + 1]);
  }
  store16(at, quad);
}

// The group that begins at element `start` of a row of `length` elements; what lies past its end
// counts as 0. `aligned`: rows begin at multiples of 16 bytes and `length` is a multiple of 8.
template <class T>
DEVICE void load_row(const T *row, u64 start, u64 length, bool aligned, float (&x)[GROUP]) {
  if (aligned) {
    load_group(row + start, x);
    return;
  }
  for (u32 i = 0; i < GROUP; i++) {
    x[i] = start + i < length ? to_f32(row[start + i]) : 0.0f;
  }
}

// The counterpart of `load_row`.
template <class T>
DEVICE void store_row(T *row, u64 start, u64 length, bool aligned, const float (&x)[GROUP]) {
  if (aligned) {
    store_group(row + start, x);
    return;
  }
  for (u32 i = 0; i < GROUP; i++) {
    if (start + i < length) {
      row[start + i] = from_f32<T>(x[i]);
    }
  }
}

// ---- dynamic shared memory ----------------------------------------------------------------------

// `DYNAMIC_SHARED(type, name);` makes `name` a `type *` to the shared memory that the launch asks
// for. It begins at a multiple of 16 bytes. All uses in a kernel, of whatever types, name the same.
#ifdef OXITRON_EMULATOR
#define DYNAMIC_SHARED(type, name) type *const name = emulator::dynamic_shared<type>()
#else
extern __shared__ __align__(16) unsigned char dynamic_shared[];
#define DYNAMIC_SHARED(type, name) type *const name = reinterpret_cast<type *>(dynamic_shared)
#endif

// ---- sums over a block --------------------------------------------------------------------------

template <class V> DEVICE V warp_sum(V value) {
  for (u32 apart = WARP / 2; apart > 0; apart /= 2) {
    value += __shfl_xor_sync(EVERY_LANE, value, apart);
  }
  return value;
}

// The sum over a block of whole warps, in every thread. All threads must call it.
template <class V> DEVICE V block_sum(V value) {
  __shared__ V partial[WARP];
  const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  value = warp_sum(value);
  if (warps == 1) {
    return value;
  }
  // The sums of an earlier call may still be read.
  __syncthreads();
  if (lane == 0) {
    partial[warp] = value;
  }
  __syncthreads();
  return warp_sum(lane < warps ? partial[lane] : V(0));
}

// ---- exported names -----------------------------------------------------------------------------

// A kernel `name` that the host can launch: `KERNEL(name)(parameters) { body }` and, after it,
// `EXPORT(name)`.
#define KERNEL(name) extern "C" __global__ void name

#ifdef OXITRON_EMULATOR
#define EXPORT(name)                                                                               \
  extern "C" const char *oxitron_emulate_##name(const emulator::Launch *launch,                    \
                                                void **arguments) {                                \
    return emulator::run(name, *launch, arguments);                                                \
  }
#else
#define EXPORT(name)
#endif
