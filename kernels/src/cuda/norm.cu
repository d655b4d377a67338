// Sum of squares of a flat buffer, and how many of its elements are not finite.
//
// A block adds up one stretch of the buffer; a second kernel adds up what the blocks found, in
// their order. Squares are taken and added in fp64: those of fp32 numbers fit with room to spare
// (they overflow fp32 from 1.8e19 on and vanish below 1e-23), and no error grows with the length.
//
// What fp64 costs: a conversion and a fused multiply-add for each element. On cards with fp64 at
// half the rate of fp32 (A100, H100, H200) that is about a third of what they do while the elements
// arrive from memory, two thirds for bf16, and so nothing. Cards with 1/64 of the rate become bound
// by it, at about their bandwidth for fp32 and half of it for bf16. Sums of a few squares in fp32
// would spare them that, at the price of a scale to guard against overflow; they are not what this
// is built for.

#include "common.cuh"

// Groups that a thread has under way.
constexpr u32 AT_ONCE = 4;

DEVICE bool is_finite(f64 x) { return fabs(x) <= 1.7976931348623157e308; }

// Calls `take` for each element of this thread's share of `x`: groups that lie a block's width
// apart. What lies past the end of a group counts as 0.
template <class G, class Take>
DEVICE void for_each(const G *x, u64 length, bool aligned, Take take) {
  const u64 width = u64(blockDim.x) * GROUP;
  for (u64 start = u64(threadIdx.x) * GROUP; start < length; start += AT_ONCE * width) {
    float value[AT_ONCE][GROUP];
    // One decision for all loads: nothing is waited for between them.
    const bool whole = aligned && start + (AT_ONCE - 1) * width + GROUP <= length;
    if (whole) {
#pragma unroll
      for (u32 j = 0; j < AT_ONCE; j++) {
        load_group(x + start + j * width, value[j]);
      }
    } else {
#pragma unroll
      for (u32 j = 0; j < AT_ONCE; j++) {
        load_row(x, start + j * width, length, false, value[j]);
      }
    }
#pragma unroll
    for (u32 j = 0; j < AT_ONCE; j++) {
      for (u32 i = 0; i < GROUP; i++) {
        take(value[j][i]);
      }
    }
  }
}

// Grid: ceil(n / block_elements) blocks. Block: 256 threads. `block_elements` is a multiple of 8
// that depends on n alone: ceil(n / 8192) rounded up to a multiple of 8192. Block b takes the
// elements from b * block_elements on.
template <class G>
DEVICE void partial(const G *x, u64 n, u64 block_elements, f64 *sums, f64 *counts) {
  const u64 first = blockIdx.x * block_elements;
  const u64 length = first < n ? (n - first < block_elements ? n - first : block_elements) : 0;
  const G *share = x + first;
  const bool aligned = reinterpret_cast<u64>(share) % 16 == 0;
  f64 sum = 0.0;
  for_each(share, length, aligned, [&](float value) {
    // The square is exact, so fused or not, the sum is the same.
    const f64 wide = value;
    sum += wide * wide;
  });
  // Squares of finite elements cannot add up to what is not finite: only then is there anything to
  // count, in a second walk.
  f64 bad = 0.0;
  if (!is_finite(sum)) {
    for_each(share, length, aligned, [&](float value) { bad += is_finite(value) ? 0.0 : 1.0; });
  }
  sum = block_sum(sum);
  bad = block_sum(bad);
  if (threadIdx.x == 0) {
    sums[blockIdx.x] = sum;
    counts[blockIdx.x] = bad;
  }
}

#define PARTIAL(G)                                                                                 \
  KERNEL(sum_of_squares_partial_##G)                                                               \
  (const G *x, u64 n, u64 block_elements, f64 *partial_sums, f64 *partial_counts) {                \
    partial<G>(x, n, block_elements, partial_sums, partial_counts);                                \
  }                                                                                                \
  EXPORT(sum_of_squares_partial_##G)

PARTIAL(f32)

// Grid: one block. Block: 256 threads. Adds what `blocks` blocks found to `sum` and `non_finite`.
KERNEL(sum_of_squares_finish)
(const f64 *partial_sums, const f64 *partial_counts, u32 blocks, f64 *sum, f64 *non_finite) {
  f64 total = 0.0, bad = 0.0;
#pragma unroll 8
  for (u32 block = threadIdx.x; block < blocks; block += blockDim.x) {
    total += partial_sums[block];
    bad += partial_counts[block];
  }
  total = block_sum(total);
  bad = block_sum(bad);
  if (threadIdx.x == 0) {
    sum[0] += total;
    non_finite[0] += bad;
  }
}
EXPORT(sum_of_squares_finish)
