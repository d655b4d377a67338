// AdamW on flat ranges (see `adamw.rs` for the definition and the order of rounding).
//
// Each fp32 operation has its own rounding, as on the CPU, where the compiler would otherwise fuse
// products and sums: in fp32 both give the same bits.
//
// Every stream is read and written once. A block loads its elements first and works out the step's
// scalars while they are on their way.

#include "common.cuh"
#include "decision.cuh"

// Hyper-parameters of one step over one range of parameters.
struct AdamW {
  f64 lr;
  f64 beta1;
  f64 beta2;
  f64 eps;
  f64 weight_decay;
};

// Scalars of a step, rounded to fp32 once.
struct Scalars {
  float decay;
  float grad_scale;
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float root_correction2;
  float eps;
  float minus_step_size;
};

DEVICE Scalars scalars(const AdamW &a, const Decision &decision) {
  Scalars s;
  s.decay = static_cast<float>(__dsub_rn(1.0, __dmul_rn(a.lr, a.weight_decay)));
  s.grad_scale = static_cast<float>(decision.gradient_scale);
  s.one_minus_beta1 = static_cast<float>(1.0 - a.beta1);
  s.beta2 = static_cast<float>(a.beta2);
  s.one_minus_beta2 = static_cast<float>(1.0 - a.beta2);
  s.root_correction2 = static_cast<float>(sqrt(decision.correction2));
  s.eps = static_cast<float>(a.eps);
  s.minus_step_size = -static_cast<float>(a.lr / decision.correction1);
  return s;
}

// One element; the weight and both moments are updated.
DEVICE void update(const Scalars &s, float grad, float &w, float &m, float &v) {
  const float g = __fmul_rn(grad, s.grad_scale);
  const float decayed = __fmul_rn(w, s.decay);
  const float first = __fadd_rn(m, __fmul_rn(s.one_minus_beta1, __fsub_rn(g, m)));
  const float square = __fmul_rn(__fmul_rn(s.one_minus_beta2, g), g);
  const float second = __fadd_rn(__fmul_rn(v, s.beta2), square);
  const float root = __fdiv_rn(__fsqrt_rn(second), s.root_correction2);
  const float change = __fdiv_rn(__fmul_rn(s.minus_step_size, first), __fadd_rn(root, s.eps));
  m = first;
  v = second;
  w = __fadd_rn(decayed, change);
}

DEVICE bool is_aligned(const void *at) { return reinterpret_cast<u64>(at) % 16 == 0; }

// Where the 8 elements of a thread lie in each stream. Aligned, they are a group. Otherwise they
// lie a block's width apart, so that neighbouring threads have neighbouring elements all the same.
struct Place {
  u64 start, apart, n;
  bool whole;
};

template <class T> DEVICE void load(const T *x, const Place &place, float (&value)[GROUP]) {
  for (u32 i = 0; i < GROUP; i++) {
    const u64 at = place.start + i * place.apart;
    value[i] = at < place.n ? to_f32(x[at]) : 0.0f;
  }
}

template <class T> DEVICE void store(T *x, const Place &place, const float (&value)[GROUP]) {
  if (place.whole) {
    store_group(x + place.start, value);
    return;
  }
  for (u32 i = 0; i < GROUP; i++) {
    const u64 at = place.start + i * place.apart;
    if (at < place.n) {
      x[at] = from_f32<T>(value[i]);
    }
  }
}

// Grid: ceil(n / 2048) blocks. Block: 256 threads. `weight_out` may be null. Without an update
// nothing is written. Pointers need the alignment of their elements alone.
template <class M, class T>
DEVICE void step(f32 *master, M *exp_avg, M *exp_avg_sq, const f32 *grad, T *weight_out, u64 n,
                 const AdamW &settings, const Decision *decision) {
  const bool aligned = is_aligned(master) && is_aligned(exp_avg) && is_aligned(exp_avg_sq) &&
                       is_aligned(grad) && is_aligned(weight_out);
  const u64 first = u64(blockIdx.x) * blockDim.x * GROUP;
  Place place{first + threadIdx.x, blockDim.x, n, false};
  if (aligned) {
    const u64 start = first + threadIdx.x * GROUP;
    place = Place{start, 1, n, start + GROUP <= n};
  }
  float w[GROUP], m[GROUP], v[GROUP], g[GROUP];
  // One decision for all loads: nothing is waited for between them.
  if (place.whole) {
    load_group(master + place.start, w);
    load_group(exp_avg + place.start, m);
    load_group(exp_avg_sq + place.start, v);
    load_group(grad + place.start, g);
  } else {
    load(master, place, w);
    load(exp_avg, place, m);
    load(exp_avg_sq, place, v);
    load(grad, place, g);
  }
  if (decision->update == 0) {
    return;
  }
  __shared__ Scalars shared;
  if (threadIdx.x == 0) {
    shared = scalars(settings, *decision);
  }
  __syncthreads();
  const Scalars s = shared;
  for (u32 i = 0; i < GROUP; i++) {
    update(s, g[i], w[i], m[i], v[i]);
  }
  store(master, place, w);
  store(exp_avg, place, m);
  store(exp_avg_sq, place, v);
  if (weight_out != nullptr) {
    store(weight_out, place, w);
  }
}

#define STEP(M, T)                                                                                 \
  KERNEL(__launch_bounds__(256) adamw_##M##_##T)                                                   \
  (f32 *master, M *exp_avg, M *exp_avg_sq, const f32 *grad, T *weight_out, u64 n, AdamW settings,  \
   const Decision *decision) {                                                                     \
    step<M, T>(master, exp_avg, exp_avg_sq, grad, weight_out, n, settings, decision);              \
  }                                                                                                \
  EXPORT(adamw_##M##_##T)

STEP(f32, f32)
STEP(f32, bf16)
STEP(bf16, f32)
STEP(bf16, bf16)
