// The C face of what libtorch offers only to C++. Every function that can fail returns null on
// success and otherwise a message allocated by malloc, which the caller frees; what it would have
// written is then left as it was.
//
// A tensor passes as `at::Tensor *`, the handle that tch keeps too. A tensor given stays the
// caller's; a tensor handed out through `at::Tensor **` is a new handle that the caller deletes.
// No function records a graph for gradients.
//
// No header of CUDA is needed: the functions reach a GPU through interfaces that libtorch_cpu and
// libc10 declare and libtorch_cuda fills in once it is loaded. libtorch asks for its CUDA half once
// and remembers the answer, so it is loaded before the first question about GPUs.
#pragma once

#include <cstdint>

namespace at {
class Tensor;
}

extern "C" {

// ---- CPU memory ---------------------------------------------------------------------------------

// Makes every later CPU allocation of libtorch counted. Call once, early.
char *oxitron_memory_install();

// Bytes alive, the largest number of bytes alive since the last reset, and allocations so far.
void oxitron_memory_read(uint64_t *current, uint64_t *peak, uint64_t *allocations);

// Lets the peak start again from the bytes alive now.
void oxitron_memory_reset_peak();

// ---- devices ------------------------------------------------------------------------------------

// The number of GPUs that this process sees; 0 without libtorch_cuda, driver or GPU. Never fails
// (libtorch prints a warning to stderr, once, where the driver refuses).
int32_t oxitron_cuda_devices();

// Starts libtorch's CUDA half; the message of a failure says why there is no GPU to use. Other
// functions do so by themselves where they have to.
char *oxitron_cuda_initialize();

// The GPU on which this thread makes streams, events and tensors without an index.
char *oxitron_device_current(int32_t *device);
char *oxitron_device_select(int32_t device);

// Waits until the GPU has done all that was asked of it, on every stream.
char *oxitron_device_synchronize(int32_t device);

// ---- streams and events -------------------------------------------------------------------------

// A stream is its `CUstream`, which is the `cudaStream_t` too; null is the default stream, which
// orders itself with every blocking stream of the device. The current stream is a thread's own, one
// for each device.
char *oxitron_stream_current(int32_t device, void **stream);

// Makes `stream` this thread's current one on `device`. The stream may come from anywhere, must
// belong to the device's primary context, and must outlive its use here.
char *oxitron_stream_select(int32_t device, void *stream);

// A stream of libtorch's pool (32 for each priority, handed out in turn, never destroyed); it does
// not order itself with the default stream.
char *oxitron_stream_from_pool(int32_t device, int32_t high_priority, void **stream);

char *oxitron_stream_synchronize(int32_t device, void *stream);

// Keeps the memory of `tensor` from being given to another tensor before the work that `stream` has
// been given so far, as seen when the tensor is freed, is done. Needed where a stream other than
// the one current at allocation uses it. Memory that libtorch's allocator does not own is left
// alone.
char *oxitron_stream_uses(int32_t device, void *stream, const at::Tensor *tensor);

// An event; one with `timing` costs a little more to record.
char *oxitron_event_new(int32_t timing, void **event);
void oxitron_event_free(void *event);

// Marks the point that `stream` has reached. A further call moves the mark; the device must then be
// the one of the first call.
char *oxitron_event_record(void *event, int32_t device, void *stream);

// Lets later work of `stream` wait for the mark, without blocking the host; blocks the host; asks.
// An event that was never recorded counts as done.
char *oxitron_event_wait(const void *event, int32_t device, void *stream);
char *oxitron_event_synchronize(const void *event);
char *oxitron_event_done(const void *event, int32_t *done);

// Milliseconds between two marks that are done, of events with `timing`.
char *oxitron_event_elapsed(const void *start, const void *end, double *milliseconds);

// ---- memory of a GPU ----------------------------------------------------------------------------

// What libtorch's caching allocator did on one GPU. Peaks count from the last reset.
struct OxitronDeviceMemory {
  // Bytes of tensors alive, as the allocator rounded them up.
  uint64_t allocated;
  uint64_t allocated_peak;
  // Bytes taken from the driver, in use or kept for later.
  uint64_t reserved;
  uint64_t reserved_peak;
  // Blocks handed out so far.
  uint64_t allocations;
  // Calls to the driver for memory so far: a steady loop makes none.
  uint64_t driver_allocations;
  // Times that the cache had to be emptied to satisfy a request, and times that even this failed.
  uint64_t retries;
  uint64_t failures;
};

char *oxitron_device_memory_read(int32_t device, OxitronDeviceMemory *memory);
char *oxitron_device_memory_reset_peak(int32_t device);

// Gives memory that no tensor uses back to the driver, on every device; waits for the GPU.
char *oxitron_device_memory_release();

// Bytes that the driver has left, for every process together, and bytes that the GPU has.
char *oxitron_device_memory_total(int32_t device, uint64_t *left, uint64_t *total);

// ---- copies -------------------------------------------------------------------------------------

// to = from, two contiguous tensors of one shape and dtype. Between page-locked host memory and a
// GPU the copy goes into the GPU's current stream of this thread and the host does not wait: it
// leaves both tensors as they are until that stream has come so far. Pageable memory is copied at
// once or staged by the driver. On the CPU the copy is done on return.
char *oxitron_copy(at::Tensor *to, const at::Tensor *from);

// A copy of the CPU tensor `host` on a GPU, made by the current stream. `host` is not needed any
// more when the call returns, and the host does not wait for what the GPU is doing.
char *oxitron_upload(const at::Tensor *host, int32_t device, at::Tensor **uploaded);

// ---- numerics -----------------------------------------------------------------------------------

// Settings of the process. On a GPU, `deterministic` makes libtorch's ops choose an algorithm whose
// result has the same bits each time, or fail where they have none; `tf32` lets products of fp32
// round their inputs to TF32; `reduced` lets products of bf16 add partial sums up in bf16.
char *oxitron_numerics_set(int32_t deterministic, int32_t tf32, int32_t reduced);

// The state of libtorch's default generator of a GPU, or with `device` -1 of the CPU: bytes on the
// CPU (16 for a GPU: seed and offset). A state fits the kind of device that it was read from.
char *oxitron_generator_read(int32_t device, at::Tensor **state);
char *oxitron_generator_write(int32_t device, const at::Tensor *state);

// Counts the times that libtorch blocks this thread until a GPU is done (a scalar read, a copy to
// pageable memory, `nonzero`, a wait for a stream), from now on or no longer. Waits for a device or
// an event do not count, nor does what bypasses libtorch. While one thread counts, every other
// thread prints a warning for each wait of its own.
char *oxitron_host_waits_watch(int32_t on);
uint64_t oxitron_host_waits_count();

// ---- products -----------------------------------------------------------------------------------

// out = beta·out + alpha·a·b, in place, without a copy of `out`. With beta = 0 what `out` held is
// not read.
//
// out [m, n], a [m, k], b [k, n]; each has adjacent elements in one of its two dimensions and, in
// the other, a stride of at least its extent: rows or columns of a larger buffer and transposed
// views are read where they lie, anything else is copied first. `out` shares no memory with a or b.
// a and b have one dtype; `out` has it too or, on a GPU only, is fp32 where they are bf16: then no
// rounding happens between the sums and `out`. Sums are fp32.
char *oxitron_product(at::Tensor *out, const at::Tensor *a, const at::Tensor *b, double beta,
                      double alpha);

// ---- attention ----------------------------------------------------------------------------------

// Which of libtorch's kernels computes attention on a GPU (sm_80 and newer). Common to all:
//   * q [batch, seq_q, heads, d], k and v [batch, seq_k, kv_heads, d] or, packed, the same without
//     `batch`; one dtype; the elements of a head are adjacent, other strides are free; for bf16
//     every head begins at a multiple of 16 bytes.
//   * kv_heads divides heads: query head h reads head h / (heads / kv_heads).
//   * Packed: sequence i owns rows starts[i]..starts[i + 1]; starts are int32 on the GPU, adjacent,
//     and go from 0 to the number of rows.
//   * out has the shape and dtype of q, gradients those of their inputs; all are contiguous. The
//     logarithms of the row sums (`lse`, fp32) have a layout of the kernel's own: only the backward
//     pass of the same kernel reads them.
//   * No dropout, no bias, no window.
enum OxitronAttentionKernel : int32_t {
  // Flash attention 2, its sm_80 kernels on every GPU. bf16 (fp16), d a multiple of 8 up to 256,
  // dense or packed. lse is [batch, heads, seq_q], packed [heads, rows]. The backward pass adds dq
  // up in an order that depends on timing unless asked not to. With grouped queries it needs room
  // for the keys' and values' gradients of every query head, and rounds those to the dtype before
  // it adds a group up.
  OXITRON_FLASH = 0,
  // cuDNN, with kernels made for Hopper and newer. bf16 (fp16), d a multiple of 8 up to 128 (256 on
  // sm_90), dense only, seq_k > 1. lse is [batch, heads, seq_q, 1]. A plan is built for each new
  // combination of sizes and strides, once for each thread, and never dropped: sizes should stay
  // the same from step to step. The backward pass cannot be made deterministic.
  OXITRON_CUDNN = 1,
  // The memory-efficient kernels, for what the others refuse: fp32 (products of three TF32 terms
  // each), fp16 and bf16, any d, dense or packed, at most 65535 sequences. lse is
  // [sequences, heads, longest_q rounded up to 32]. Grouped keys and values are copied to every
  // query head, and a d that is no multiple of 8 is padded in a copy.
  OXITRON_EFFICIENT = 2,
};

struct OxitronAttention {
  const at::Tensor *q;
  const at::Tensor *k;
  const at::Tensor *v;
  // Where sequences begin in q and in k, and where the last one ends: [sequences + 1]. Both null
  // for dense tensors.
  const at::Tensor *starts_q;
  const at::Tensor *starts_k;
  // The longest sequences, known to the host; not read for dense tensors.
  int64_t longest_q;
  int64_t longest_k;
  // Factor of the scores.
  double scale;
  // Row i sees keys 0..=i. The lengths of a query's and a key's sequence must be equal then.
  int32_t causal;
};

char *oxitron_attention_forward(int32_t kernel, const OxitronAttention *inputs, at::Tensor **out,
                                at::Tensor **lse);

// `out` and `lse` as the forward pass of the same kernel made them; `dout` has the shape of out.
char *oxitron_attention_backward(int32_t kernel, const OxitronAttention *inputs,
                                 const at::Tensor *out, const at::Tensor *lse,
                                 const at::Tensor *dout, int32_t deterministic, at::Tensor **dq,
                                 at::Tensor **dk, at::Tensor **dv);
}
