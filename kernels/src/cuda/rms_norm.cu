// RMSNorm, forward and backward (see `rms_norm.rs` for the definition and the order of rounding).
//
// Both read a row twice. A thread holds 16 elements between the two passes, so a row of up to 16
// times the block's threads comes from memory once; the second pass over a wider one finds it in
// the L2 cache. Rows differ in dtype (R is the residual stream's, T the layers'), and each access
// of a warp is contiguous in both: a unit is 16 bytes of the wider dtype.
//
// Forward: a warp or a block per row.
// Backward: a block takes `rows` rows in turn and gathers its share of the weight's gradient in
// shared memory, which leaves the registers to loads under way; a second kernel adds the shares up
// in their order.

#include "common.cuh"

// ---- units --------------------------------------------------------------------------------------

// Elements of a unit where rows of A and of B are read side by side.
template <class A, class B>
constexpr u32 UNIT = 16 / (sizeof(A) > sizeof(B) ? sizeof(A) : sizeof(B));

// Elements of a row that a thread and a warp take at once. A warp's are contiguous, and units of
// one thread lie so far apart that the warp's accesses are contiguous too: the distance is a
// constant, which becomes part of the instructions.
#define PER_THREAD 16u
#define PER_WARP (WARP * PER_THREAD)

// Where a thread's first unit of N elements begins in a row.
template <u32 N> DEVICE u32 first_unit() {
  return threadIdx.x / WARP * PER_WARP + threadIdx.x % WARP * N;
}

// N elements as they lie in memory: half the registers of fp32 numbers where T is bf16, and nothing
// waits for them before they are unpacked.
template <class T, u32 N> struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Packed {
  u32 word[N * sizeof(T) / 4];
};

template <u32 N> DEVICE void unpack(const Packed<f32, N> &packed, float (&x)[N]) {
  for (u32 i = 0; i < N; i++) {
    x[i] = __uint_as_float(packed.word[i]);
  }
}

template <u32 N> DEVICE void unpack(const Packed<bf16, N> &packed, float (&x)[N]) {
  for (u32 i = 0; i < N; i += 2) {
    x[i] = __uint_as_float(packed.word[i / 2] << 16);
    x[i + 1] = __uint_as_float(packed.word[i / 2] & 0xffff0000u);
  }
}

template <u32 N> DEVICE void pack(const float (&x)[N], Packed<f32, N> &packed) {
  for (u32 i = 0; i < N; i++) {
    packed.word[i] = __float_as_uint(x[i]);
  }
}

template <u32 N> DEVICE void pack(const float (&x)[N], Packed<bf16, N> &packed) {
  for (u32 i = 0; i < N; i += 2) {
    packed.word[i / 2] = bf16_pair(x[i], x[i + 1]);
  }
}

// One access of global memory each. NVRTC was seen to take a struct apart and to write it word by
// word, four times as many accesses.
DEVICE void write(const u32 (&word)[2], void *to) {
#ifdef OXITRON_EMULATOR
  emulator::check_aligned(to, sizeof word);
#endif
  *static_cast<u64 *>(to) = u64(word[1]) << 32 | word[0];
}

DEVICE void write(const u32 (&word)[4], void *to) {
#ifdef OXITRON_EMULATOR
  store16(to, Quad{{word[0], word[1], word[2], word[3]}});
#else
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3])
               : "memory");
#endif
}

// The unit at `row`, which is element `start` of a row of `h`; what lies past its end counts as 0.
template <bool ALIGNED, class T, u32 N>
DEVICE void load(const T *row, u32 start, u32 h, Packed<T, N> &unit) {
  if (ALIGNED && start < h) {
#ifdef OXITRON_EMULATOR
    emulator::check_aligned(row, alignof(Packed<T, N>));
#endif
    unit = *reinterpret_cast<const Packed<T, N> *>(row);
    return;
  }
  float x[N];
  for (u32 i = 0; i < N; i++) {
    x[i] = !ALIGNED && start + i < h ? to_f32(row[i]) : 0.0f;
  }
  pack(x, unit);
}

// The counterpart of `load`.
template <bool ALIGNED, class T, u32 N>
DEVICE void store(T *row, u32 start, u32 h, const Packed<T, N> &unit) {
  if (ALIGNED) {
    if (start < h) {
      write(unit.word, row);
    }
    return;
  }
  float x[N];
  unpack(unit, x);
  for (u32 i = 0; i < N; i++) {
    if (start + i < h) {
      row[i] = from_f32<T>(x[i]);
    }
  }
}

// A thread's share of sums in shared or global memory: `load` reads it, this writes it.
template <bool ALIGNED, u32 N>
DEVICE void store_share(f32 *share, u32 start, u32 h, const Packed<f32, N> &sums) {
  if (ALIGNED && start < h) {
    *reinterpret_cast<Packed<f32, N> *>(share) = sums;
    return;
  }
  for (u32 i = 0; i < N; i++) {
    if (!ALIGNED && start + i < h) {
      share[i] = __uint_as_float(sums.word[i]);
    }
  }
}

// ---- forward ------------------------------------------------------------------------------------

template <bool ALIGNED, bool ONCE, class R, class T>
DEVICE void forward(const R *x, const T *delta, const T *w, float eps, u32 h, R *sum, T *y,
                    f32 *rstd) {
  constexpr u32 N = UNIT<R, T>, UNITS = PER_THREAD / N, HELD = ONCE ? UNITS : 1;
  const u64 row = u64(blockIdx.x) * blockDim.y + threadIdx.y;
  const u32 all = blockDim.x * PER_THREAD;
  x += row * h;
  y += row * h;
  if (delta != nullptr) {
    delta += row * h;
    sum += row * h;
  }
  Packed<R, N> held[HELD];
  float squares = 0.0f;
  for (u32 base = first_unit<N>(); base < h; base += all) {
#pragma unroll 1
    for (u32 part = 0; part < UNITS; part += HELD) {
      const u32 start = base + part * WARP * N;
#pragma unroll
      for (u32 k = 0; k < HELD; k++) {
        load<ALIGNED>(x + start + k * WARP * N, start + k * WARP * N, h, held[k]);
      }
      if (delta != nullptr) {
        Packed<T, N> more[HELD];
#pragma unroll
        for (u32 k = 0; k < HELD; k++) {
          load<ALIGNED>(delta + start + k * WARP * N, start + k * WARP * N, h, more[k]);
        }
#pragma unroll
        for (u32 k = 0; k < HELD; k++) {
          float value[N], change[N];
          unpack(held[k], value);
          unpack(more[k], change);
          for (u32 i = 0; i < N; i++) {
            value[i] += change[i];
          }
          pack(value, held[k]);
          store<ALIGNED>(sum + start + k * WARP * N, start + k * WARP * N, h, held[k]);
        }
      }
#pragma unroll
      for (u32 k = 0; k < HELD; k++) {
        float value[N];
        unpack(held[k], value);
        for (u32 i = 0; i < N; i++) {
          squares += value[i] * value[i];
        }
      }
    }
    if (ONCE) {
      break;
    }
  }
  const float scale = rsqrtf(block_sum(squares) / float(h) + eps);
  if (threadIdx.x == 0) {
    rstd[row] = scale;
  }
  const R *whole = delta != nullptr ? sum : x;
  for (u32 base = first_unit<N>(); base < h; base += all) {
#pragma unroll 1
    for (u32 part = 0; part < UNITS; part += HELD) {
#pragma unroll
      for (u32 k = 0; k < HELD; k++) {
        const u32 start = base + (part + k) * WARP * N;
        if (!ONCE) {
          load<ALIGNED>(whole + start, start, h, held[k]);
        }
        Packed<T, N> unit;
        float value[N], weight[N];
        load<ALIGNED>(w + start, start, h, unit);
        unpack(unit, weight);
        unpack(held[k], value);
        for (u32 i = 0; i < N; i++) {
          value[i] = to_f32(from_f32<T>(value[i] * scale)) * weight[i];
        }
        pack(value, unit);
        store<ALIGNED>(y + start, start, h, unit);
      }
    }
    if (ONCE) {
      break;
    }
  }
}

// A delta, where given, is added to x first, and the sum is written: `sum = x + delta`,
// `y = norm(sum)`. The sum may be written where x is read.
//
// Block: (threads, rows). Threads of a row: ceil(h / 16) rounded up to whole warps, at most 1024;
// any number of whole warps is right for any h. Rows: 1, but where 32 threads do for a row (h <=
// 512) the largest power of 2 up to 8 that divides n; more than one need 32 threads.
// Grid: n / rows blocks.
#define FORWARD(R, T)                                                                              \
  KERNEL(rms_norm_forward_##R##_##T)                                                               \
  (const R *x, const T *delta, const T *w, float eps, u64 h, i32 aligned, R *sum, T *y,            \
   f32 *rstd) {                                                                                    \
    if (aligned && h <= blockDim.x * PER_THREAD) {                                                 \
      forward<true, true>(x, delta, w, eps, h, sum, y, rstd);                                      \
    } else if (aligned) {                                                                          \
      forward<true, false>(x, delta, w, eps, h, sum, y, rstd);                                     \
    } else {                                                                                       \
      forward<false, false>(x, delta, w, eps, h, sum, y, rstd);                                    \
    }                                                                                              \
  }                                                                                                \
  EXPORT(rms_norm_forward_##R##_##T)

FORWARD(f32, f32)
FORWARD(f32, bf16)
FORWARD(bf16, f32)
FORWARD(bf16, bf16)

// ---- backward -----------------------------------------------------------------------------------

// The widest row whose share of the weight's gradient lies in shared memory: as wide as the most
// threads hold, and well within the 48 KiB that every block may have, static memory included.
#define SHARED_COLUMNS (512 * PER_THREAD)

template <bool ALIGNED, bool ONCE, class R, class T>
DEVICE void backward(const T *dy, const R *x, const T *w, const f32 *rstd, u64 n, u32 h, u64 rows,
                     R *dx, T *rounded, f32 *partials) {
  DYNAMIC_SHARED(f32, gathered);
  constexpr u32 N = UNIT<R, T>, UNITS = PER_THREAD / N, HELD = ONCE ? UNITS : 1;
  const u32 all = blockDim.x * PER_THREAD;
  // A thread reads and writes its own columns alone: nothing of this waits for other threads.
  f32 *const result = partials + (partials != nullptr ? u64(blockIdx.x) * h : 0);
  const bool narrow = ONCE || h <= SHARED_COLUMNS;
  if (partials != nullptr) {
    for (u32 base = first_unit<N>(); base < h; base += all) {
      for (u32 k = 0; k < UNITS; k++) {
        f32 *const share = narrow ? gathered : result;
        store_share<ALIGNED>(share + base + k * WARP * N, base + k * WARP * N, h, Packed<f32, N>{});
      }
      if (ONCE) {
        break;
      }
    }
  }
  const u64 begin = blockIdx.x * rows, end = begin + rows < n ? begin + rows : n;
  for (u64 row = begin; row < end; row++) {
    const u64 at = row * h;
    const float scale = rstd[row];
    Packed<T, N> gradient[HELD];
    Packed<R, N> input[HELD], stream[HELD];
    float dot = 0.0f;
    for (u32 base = first_unit<N>(); base < h; base += all) {
#pragma unroll 1
      for (u32 part = 0; part < UNITS; part += HELD) {
        const u32 start = base + part * WARP * N;
#pragma unroll
        for (u32 k = 0; k < HELD; k++) {
          load<ALIGNED>(dy + at + start + k * WARP * N, start + k * WARP * N, h, gradient[k]);
          load<ALIGNED>(x + at + start + k * WARP * N, start + k * WARP * N, h, input[k]);
          if (ONCE) {
            load<ALIGNED>(dx + at + start + k * WARP * N, start + k * WARP * N, h, stream[k]);
          }
        }
#pragma unroll
        for (u32 k = 0; k < HELD; k++) {
          Packed<T, N> unit;
          float d[N], value[N], weight[N];
          load<ALIGNED>(w + start + k * WARP * N, start + k * WARP * N, h, unit);
          unpack(unit, weight);
          unpack(gradient[k], d);
          unpack(input[k], value);
          for (u32 i = 0; i < N; i++) {
            dot += d[i] * weight[i] * value[i];
          }
          if (partials != nullptr) {
            Packed<f32, N> sums;
            float dw[N];
            f32 *const share = narrow ? gathered : result;
            load<ALIGNED>(share + start + k * WARP * N, start + k * WARP * N, h, sums);
            unpack(sums, dw);
            for (u32 i = 0; i < N; i++) {
              dw[i] += d[i] * (value[i] * scale);
            }
            pack(dw, sums);
            store_share<ALIGNED>(share + start + k * WARP * N, start + k * WARP * N, h, sums);
          }
        }
      }
      if (ONCE) {
        break;
      }
    }
    // With x̂ = x·rstd and g = dy·w: dx = rstd · (g − x̂ · mean(g·x̂)).
    const float mean = block_sum(dot) * scale / float(h);
    for (u32 base = first_unit<N>(); base < h; base += all) {
#pragma unroll 1
      for (u32 part = 0; part < UNITS; part += HELD) {
#pragma unroll
        for (u32 k = 0; k < HELD; k++) {
          const u32 start = base + (part + k) * WARP * N;
          if (!ONCE) {
            load<ALIGNED>(dy + at + start, start, h, gradient[k]);
            load<ALIGNED>(x + at + start, start, h, input[k]);
            load<ALIGNED>(dx + at + start, start, h, stream[k]);
          }
          Packed<T, N> unit;
          float d[N], value[N], weight[N], total[N];
          load<ALIGNED>(w + start, start, h, unit);
          unpack(unit, weight);
          unpack(gradient[k], d);
          unpack(input[k], value);
          unpack(stream[k], total);
          for (u32 i = 0; i < N; i++) {
            total[i] += scale * (d[i] * weight[i] - value[i] * (scale * mean));
          }
          pack(total, stream[k]);
          store<ALIGNED>(dx + at + start, start, h, stream[k]);
          if (rounded != nullptr) {
            unpack(stream[k], total);
            pack(total, unit);
            store<ALIGNED>(rounded + at + start, start, h, unit);
          }
        }
      }
      if (ONCE) {
        break;
      }
    }
  }
  if (partials != nullptr && narrow) {
    for (u32 base = first_unit<N>(); base < h; base += all) {
      for (u32 k = 0; k < UNITS; k++) {
        Packed<f32, N> sums;
        load<ALIGNED>(gathered + base + k * WARP * N, base + k * WARP * N, h, sums);
        store_share<ALIGNED>(result + base + k * WARP * N, base + k * WARP * N, h, sums);
      }
      if (ONCE) {
        break;
      }
    }
  }
}

// Block: ceil(h / 16) threads rounded up to whole warps, at most 512; any number of whole warps up
// to that is right for any h.
// Grid: ceil(n / rows) blocks with rows = max(4, ceil(n * h / 2^22)): a thousand blocks for rows of
// 4096 and more of them for narrower rows, while the shares are a small part of what is moved.
// Dynamic shared memory: 4 * h bytes where partials are wanted and h <= 8192, else none.
// Two of the largest blocks share a multiprocessor, but for fp32 alone, which takes more registers.
#define BACKWARD(R, T, blocks)                                                                     \
  KERNEL(__launch_bounds__(512, blocks) rms_norm_backward_##R##_##T)                               \
  (const T *dy, const R *x, const T *w, const f32 *rstd, u64 n, u64 h, u64 rows, i32 aligned,      \
   R *dx, T *rounded, f32 *partials) {                                                             \
    if (aligned && h <= blockDim.x * PER_THREAD) {                                                 \
      backward<true, true>(dy, x, w, rstd, n, h, rows, dx, rounded, partials);                     \
    } else if (aligned) {                                                                          \
      backward<true, false>(dy, x, w, rstd, n, h, rows, dx, rounded, partials);                    \
    } else {                                                                                       \
      backward<false, false>(dy, x, w, rstd, n, h, rows, dx, rounded, partials);                   \
    }                                                                                              \
  }                                                                                                \
  EXPORT(rms_norm_backward_##R##_##T)

BACKWARD(f32, f32, 1)
BACKWARD(f32, bf16, 2)
BACKWARD(bf16, f32, 2)
BACKWARD(bf16, bf16, 2)

// ---- the weight's gradient ----------------------------------------------------------------------

// Columns of a block: one 32-byte sector of memory of each row.
#define COLUMNS 8u

// dw += the sum of the blocks' shares [blocks, h]. Each thread takes every so many-th share of one
// column; the threads' sums are added in their order.
//
// Grid: ceil(h / 8) blocks. Block: 1024 threads.
KERNEL(__launch_bounds__(1024) rms_norm_add_partials)
(const f32 *partials, u64 blocks, u64 h, f32 *dw) {
  __shared__ f32 sums[WARP][COLUMNS];
  const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  const u64 column = u64(blockIdx.x) * COLUMNS + lane % COLUMNS;
  const u32 apart = blockDim.x / COLUMNS;
  float sum = 0.0f;
  if (column < h) {
#pragma unroll 8
    for (u64 block = threadIdx.x / COLUMNS; block < blocks; block += apart) {
      sum += partials[block * h + column];
    }
  }
  for (u32 step = COLUMNS; step < WARP; step *= 2) {
    sum += __shfl_xor_sync(EVERY_LANE, sum, step);
  }
  if (lane < COLUMNS) {
    sums[warp][lane] = sum;
  }
  __syncthreads();
  if (warp == 0) {
    sum = 0.0f;
    for (u32 other = lane / COLUMNS; other < warps; other += WARP / COLUMNS) {
      sum += sums[other][lane % COLUMNS];
    }
    for (u32 step = COLUMNS; step < WARP; step *= 2) {
      sum += __shfl_xor_sync(EVERY_LANE, sum, step);
    }
    if (lane < COLUMNS && column < h) {
      dw[column] += sum;
    }
  }
}
EXPORT(rms_norm_add_partials)
