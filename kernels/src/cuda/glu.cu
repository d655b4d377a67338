// The gated activation of a feed-forward layer and its gradient (see `linear_glu.rs` and
// `matmul/epilogue/glu.rs`).
//
// A gate is x * sigmoid(z(x)): SiLU with z = x, and with a cubic z the approximation of GELU by
// tanh. Both passes compute in fp32 from gate and up as they are stored.
//
// A thread takes one group of 8 of a row.
// Block: ceil(i / 8) threads rounded up to whole warps, at most 256. Grid: n * ceil(i / (8 *
// threads)) blocks; those of a row follow each other. Any number of threads is right with that
// grid.

#include "common.cuh"

// x held within ±bound; NaN stays NaN.
DEVICE float clamp(float x, float bound) {
  x = x < -bound ? -bound : x;
  return x > bound ? bound : x;
}

struct Silu {
  // z(x)
  DEVICE static float argument(float x) { return x; }
  // x * z'(x)
  DEVICE static float scaled_slope(float x) { return x; }
};

// z = sqrt(8 / pi) * (x + 0.044715 * x^3)
struct GeluTanh {
  // Beyond ±30 the sigmoid is 0 or 1, and powers of x would only overflow.
  DEVICE static float cubic(float x, float cube) {
    x = clamp(x, 30.0f);
    const float scaled = x * 1.595769121605731f;
    return x * x * cube * scaled + scaled;
  }
  DEVICE static float argument(float x) { return cubic(x, 0.044715f); }
  DEVICE static float scaled_slope(float x) { return cubic(x, 3.0f * 0.044715f); }
};

// 1 / (1 + exp(-x)), as accurate as numbers of dtype T are: the fast exponential is off by 1e-7
// times its argument, which is nothing beside bf16.
template <class T> DEVICE float sigmoid(float x) {
  // From -87 on down the sigmoid is nothing beside 1, and exp(87) is still finite.
  const float minus = x < -87.0f ? 87.0f : -x;
  const float power = sizeof(T) == 2 ? __expf(minus) : expf(minus);
  return __fdividef(1.0f, 1.0f + power);
}

// A thread's row and where its group begins in it.
struct Place {
  u64 row, start;
};

DEVICE Place place(u64 i) {
  const u32 width = blockDim.x * GROUP, blocks = (static_cast<u32>(i) + width - 1) / width;
  return Place{blockIdx.x / blocks, u64(blockIdx.x % blocks) * width + threadIdx.x * GROUP};
}

// Stores 16 bytes to global memory in one access. NVRTC was seen to take a struct apart and to
// write it word by word.
DEVICE void write(void *to, u32 a, u32 b, u32 c, u32 d) {
#ifdef OXITRON_EMULATOR
  store16(to, Quad{{a, b, c, d}});
#else
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
#endif
}

DEVICE void write_group(f32 *to, const float (&x)[GROUP]) {
  for (u32 k = 0; k < GROUP; k += 4) {
    write(to + k, __float_as_uint(x[k]), __float_as_uint(x[k + 1]), __float_as_uint(x[k + 2]),
          __float_as_uint(x[k + 3]));
  }
}

DEVICE void write_group(bf16 *to, const float (&x)[GROUP]) {
  write(to, bf16_pair(x[0], x[1]), bf16_pair(x[2], x[3]), bf16_pair(x[4], x[5]),
        bf16_pair(x[6], x[7]));
}

// As `store_row`.
template <class T>
DEVICE void write_row(T *row, u64 start, u64 length, bool aligned, const float (&x)[GROUP]) {
  if (aligned) {
    write_group(row + start, x);
  } else {
    store_row(row, start, length, false, x);
  }
}

// gated = act(gate) * up
template <class G, class T>
DEVICE void forward(const T *gate_up, u64 i, bool aligned, T *gated) {
  const auto [row, start] = place(i);
  if (start >= i) {
    return;
  }
  const T *gates = gate_up + row * 2 * i;
  float gate[GROUP], up[GROUP];
  load_row(gates, start, i, aligned, gate);
  load_row(gates + i, start, i, aligned, up);
  for (u32 k = 0; k < GROUP; k++) {
    up[k] *= gate[k] * sigmoid<T>(G::argument(gate[k]));
  }
  write_row(gated + row * i, start, i, aligned, up);
}

// The gradients of gate and up, from that of the activation.
template <class G, class T>
DEVICE void backward(const T *d_gated, const T *gate_up, u64 i, bool aligned, T *d_gate_up) {
  const auto [row, start] = place(i);
  if (start >= i) {
    return;
  }
  const T *gates = gate_up + row * 2 * i;
  float gate[GROUP], up[GROUP], d[GROUP];
  load_row(gates, start, i, aligned, gate);
  load_row(gates + i, start, i, aligned, up);
  load_row(d_gated + row * i, start, i, aligned, d);
  for (u32 k = 0; k < GROUP; k++) {
    const float s = sigmoid<T>(G::argument(gate[k]));
    const float ds = d[k] * s;
    // (g * s(z))' = s(z) * (1 + g * z' * (1 - s(z)))
    const float slope = G::scaled_slope(gate[k]) * (1.0f - s) + 1.0f;
    d[k] = ds * gate[k];
    gate[k] = ds * up[k] * slope;
  }
  T *gradients = d_gate_up + row * 2 * i;
  write_row(gradients, start, i, aligned, gate);
  write_row(gradients + i, start, i, aligned, d);
}

// Each branch knows `aligned`, so that its loads are not kept apart by tests of it.
#define GLU(name, G, T)                                                                            \
  KERNEL(__launch_bounds__(256) glu_forward_##name##_##T)                                          \
  (const T *gate_up, u64 n, u64 i, i32 aligned, T *gated) {                                        \
    if (aligned) {                                                                                 \
      forward<G>(gate_up, i, true, gated);                                                         \
    } else {                                                                                       \
      forward<G>(gate_up, i, false, gated);                                                        \
    }                                                                                              \
  }                                                                                                \
  EXPORT(glu_forward_##name##_##T)                                                                 \
  KERNEL(__launch_bounds__(256) glu_backward_##name##_##T)                                         \
  (const T *d_gated, const T *gate_up, u64 n, u64 i, i32 aligned, T *d_gate_up) {                  \
    if (aligned) {                                                                                 \
      backward<G>(d_gated, gate_up, i, true, d_gate_up);                                           \
    } else {                                                                                       \
      backward<G>(d_gated, gate_up, i, false, d_gate_up);                                          \
    }                                                                                              \
  }                                                                                                \
  EXPORT(glu_backward_##name##_##T)

GLU(silu, Silu, f32)
GLU(silu, Silu, bf16)
GLU(gelu_tanh, GeluTanh, f32)
GLU(gelu_tanh, GeluTanh, bf16)
