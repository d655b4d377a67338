// Losses of rows of logits; where wanted, each row becomes its own gradient where it lies (see
// `linear_cross_entropy.rs` and its `softmax.rs` for the definition and the order of rounding).
//
// A row is too wide for the registers of a block, so a gradient takes two walks: one for the
// largest logit and the sum of exponentials, which are kept up together, and one for the gradient.
// The second walk must not come from memory. The level-2 cache alone would serve it badly: two
// blocks on each of 132 multiprocessors, which it takes to keep memory busy while the other block
// sums or writes, hold 49 MB in rows of 92544 bf16, all of its 50 MB, and re-reading costs it as
// much throughput as the writing. Shared memory alone holds one such row for each multiprocessor,
// and then nothing overlaps. So a row's beginning stays in shared memory, as far as the launch
// gives any, and its end is read again from the cache, the newest part first. How much is kept does
// not change a bit of the result.

#include "packed.cuh"

// Groups that a thread has under way.
constexpr u32 AT_ONCE = 4;

// A target that is not to be predicted.
constexpr i64 IGNORED = -100;

// Stands for the largest of no numbers. Finite, so that no difference from it is NaN.
constexpr float LOWEST = -1e38f;

// Exponentials as accurate as numbers of dtype T are, of differences to the largest logit. `scaled`
// brings a logit to the unit in which differences are taken, `natural` brings it back.
template <class T> struct Exponential;

template <> struct Exponential<f32> {
  static DEVICE float scaled(float x) { return x; }
  static DEVICE float natural(float x) { return x; }
  static DEVICE float of(float difference) { return expf(difference); }
  static DEVICE float of(float x, float most) { return expf(x - most); }
};

// Powers of 2: an element costs one fused multiply-add and one instruction for the power. What the
// rounding of the scaled maximum shifts, it shifts for all terms alike and for the maximum itself.
template <> struct Exponential<bf16> {
  static constexpr float LOG2_E = 1.44269504f;
  static DEVICE float scaled(float x) { return x * LOG2_E; }
  static DEVICE float natural(float x) { return x * 0.693147181f; }
  static DEVICE float of(float difference) {
#ifdef OXITRON_EMULATOR
    return exp2f(difference);
#else
    // What would be denormal becomes 0, which spares three instructions.
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(difference));
    return power;
#endif
  }
  static DEVICE float of(float x, float most) { return of(__fmaf_rn(x, LOG2_E, -most)); }
};

// The largest of some numbers, scaled, and the sum of exp(x - most) over them.
struct Softmax {
  float most;
  float sum;
};

// Of the numbers that a warp's lanes have seen together. The sums are first brought to the common
// largest number, so that lanes add the same terms and all get the same bits.
template <class T> DEVICE Softmax warp_softmax(Softmax mine) {
  Softmax all = mine;
  for (u32 apart = WARP / 2; apart > 0; apart /= 2) {
    all.most = fmaxf(all.most, __shfl_xor_sync(EVERY_LANE, all.most, apart));
  }
  all.sum = warp_sum(mine.sum * Exponential<T>::of(mine.most - all.most));
  return all;
}

// The same over a block, in every thread. To be called once.
template <class T> DEVICE Softmax block_softmax(Softmax mine) {
  __shared__ Softmax partial[WARP];
  const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  mine = warp_softmax<T>(mine);
  if (lane == 0) {
    partial[warp] = mine;
  }
  __syncthreads();
  return warp_softmax<T>(lane < warps ? partial[lane] : Softmax{LOWEST, 0.0f});
}

// A row of logits as one block walks over it: in trips of `AT_ONCE` groups for each thread.
template <class T> struct Row {
  T *logits;
  u32 v, vocab;
  // Where the first trips' elements stay, and how many trips those are. A thread reads back only
  // what it has put there, so there is nothing to wait for.
  T *kept;
  u32 kept_trips;
  bool aligned;

  DEVICE u32 trip_columns() const { return AT_ONCE * GROUP * blockDim.x; }
  DEVICE u32 trips() const { return (v + trip_columns() - 1) / trip_columns(); }
  DEVICE u32 column(u32 trip, u32 j) const {
    return trip * trip_columns() + (j * blockDim.x + threadIdx.x) * GROUP;
  }

  // The logits of a trip; what lies past the vocabulary counts as -infinity.
  DEVICE void load(u32 trip, float (&x)[AT_ONCE][GROUP], bool keep, bool again) const {
    const float nothing = __uint_as_float(0xff800000u);
    Packed<T> group[AT_ONCE];
    if (again && trip < kept_trips) {
#pragma unroll
      for (u32 j = 0; j < AT_ONCE; j++) {
        load_packed(kept + column(trip, j), group[j]);
      }
    } else {
#pragma unroll
      for (u32 j = 0; j < AT_ONCE; j++) {
        group[j] = packed<T>(nothing);
      }
#pragma unroll
      for (u32 j = 0; j < AT_ONCE; j++) {
        load_packed_row(logits, column(trip, j), vocab, aligned, group[j]);
      }
      if (keep && trip < kept_trips) {
#pragma unroll
        for (u32 j = 0; j < AT_ONCE; j++) {
          store_packed(kept + column(trip, j), group[j]);
        }
      }
    }
#pragma unroll
    for (u32 j = 0; j < AT_ONCE; j++) {
      unpack(group[j], x[j]);
      const u32 start = column(trip, j);
      if (start + GROUP > vocab) {
        for (u32 i = 0; i < GROUP; i++) {
          x[j][i] = start + i < vocab ? x[j][i] : nothing;
        }
      }
    }
  }

  DEVICE void clear() const {
    const float zero[GROUP] = {};
    for (u32 start = threadIdx.x * GROUP; start < v; start += blockDim.x * GROUP) {
      store_row(logits, start, v, aligned, zero);
    }
  }
};

// The largest logit and the sum of exponentials, of the columns that this thread walks over.
template <class T> DEVICE Softmax walk(const Row<T> &row, bool keep) {
  Softmax seen{LOWEST, 0.0f};
  const u32 trips = row.trips();
  for (u32 trip = 0; trip < trips; trip++) {
    float x[AT_ONCE][GROUP];
    row.load(trip, x, keep, false);
    float most = x[0][0];
#pragma unroll
    for (u32 j = 0; j < AT_ONCE; j++) {
      for (u32 i = 0; i < GROUP; i++) {
        most = fmaxf(most, x[j][i]);
      }
    }
    most = fmaxf(seen.most, Exponential<T>::scaled(most));
    float sum = 0.0f;
#pragma unroll
    for (u32 j = 0; j < AT_ONCE; j++) {
      float part = 0.0f;
      for (u32 i = 0; i < GROUP; i++) {
        part += Exponential<T>::of(x[j][i], most);
      }
      sum += part;
    }
    seen.sum = seen.sum * Exponential<T>::of(seen.most - most) + sum;
    seen.most = most;
  }
  return seen;
}

// Turns a row into its gradient: factor * exp(x - most), less the weight at the target. The end of
// the row comes first: it is the likeliest to be in the cache.
template <class T>
DEVICE void turn(const Row<T> &row, float most, float factor, u32 target, float weight) {
  for (u32 trip = row.trips(); trip-- > 0;) {
    float x[AT_ONCE][GROUP];
    row.load(trip, x, false, true);
#pragma unroll
    for (u32 j = 0; j < AT_ONCE; j++) {
      const u32 start = row.column(trip, j);
      if (start >= row.v) {
        break;
      }
      for (u32 i = 0; i < GROUP; i++) {
        x[j][i] = Exponential<T>::of(x[j][i], most) * factor;
      }
      if (target - start < GROUP) {
        for (u32 i = 0; i < GROUP; i++) {
          x[j][i] -= start + i == target ? weight : 0.0f;
        }
      }
      if (start + GROUP > row.vocab) {
        for (u32 i = 0; i < GROUP; i++) {
          x[j][i] = start + i < row.vocab ? x[j][i] : 0.0f;
        }
      }
      store_row(row.logits, start, row.v, row.aligned, x[j]);
    }
  }
}

// Grid: a block per row. Block: whole warps, ceil(v / 32) threads rounded up to them, at most 512.
// Dynamic shared memory: that of `kept` elements, where a gradient is wanted; a trip of a whole
// block is 16384 elements, and whole trips are kept. 96 KiB is best where a multiprocessor has 227
// KiB for its blocks, 64 KiB where it has 163; 0 will do. `v` lies between
// rows, and is less than 2^31.
template <class T>
DEVICE void cross_entropy(T *logits, u64 v, u64 vocab, u64 kept, const i64 *targets,
                          const f32 *weights, bool gradient, bool aligned, T *memory, f32 *losses) {
  Row<T> row{logits + blockIdx.x * v, static_cast<u32>(v), static_cast<u32>(vocab), memory, 0,
             aligned};
  if (aligned && gradient) {
    row.kept_trips = static_cast<u32>(kept / row.trip_columns());
  }
  const i64 wanted = targets[blockIdx.x];
  if (wanted == IGNORED) {
    if (threadIdx.x == 0) {
      losses[blockIdx.x] = 0.0f;
    }
    if (gradient) {
      row.clear();
    }
    return;
  }
  const u64 target = static_cast<u64>(wanted);
  float weight = weights != nullptr ? weights[blockIdx.x] : 1.0f, at_target = 0.0f;
  if (target < vocab) {
    // Read before anything of the row is overwritten.
    at_target = to_f32(row.logits[target]);
  } else {
    // Nothing can be refused here: the step must be found not finite.
    weight = __uint_as_float(0x7fc00000u);
  }
  const Softmax all = block_softmax<T>(walk(row, gradient));
  if (threadIdx.x == 0) {
    const float most = Exponential<T>::natural(all.most);
    losses[blockIdx.x] = (logf(all.sum) + most - at_target) * weight;
  }
  if (gradient) {
    turn(row, all.most, weight / all.sum, static_cast<u32>(target), weight);
  }
}

#define CROSS_ENTROPY(T)                                                                           \
  KERNEL(__launch_bounds__(512, 2) cross_entropy_##T)                                              \
  (T *logits, u64 v, u64 vocab, u64 kept, const i64 *targets, const f32 *weights, i32 gradient,    \
   i32 aligned, f32 *losses) {                                                                     \
    DYNAMIC_SHARED(T, memory);                                                                     \
    cross_entropy<T>(logits, v, vocab, kept, targets, weights, gradient, aligned, memory, losses); \
  }                                                                                                \
  EXPORT(cross_entropy_##T)

CROSS_ENTROPY(f32)
CROSS_ENTROPY(bf16)

// Grid: one block. Block: 1024 threads. Adds `n` losses to `total`.
KERNEL(sum_losses)(const f32 *losses, u64 n, f64 *total) {
  f64 sum = 0.0;
#pragma unroll 8
  for (u64 i = threadIdx.x; i < n; i += blockDim.x) {
    sum += losses[i];
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    total[0] += sum;
  }
}
EXPORT(sum_losses)
