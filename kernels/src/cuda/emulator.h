// Runs CUDA kernels on the processor: with this header before it, the text of a `.cu` file is plain
// C++17, and a launch runs one block after another on the calling thread.
//
//   c++ -O1 -std=c++17 -ffp-contract=off -shared -fPIC -include emulator.h -x c++ kernel.cu
//
// What it emulates. The threads of a block are fibers: each runs until it waits at a barrier or at
// an exchange of its warp, then another goes on. Nothing runs in lockstep. The launch's schedule
// says which thread is next: 0, the first that can run; 1, the last; any other number seeds a
// random choice, made anew each time. Blocks take turns in the same spirit. A kernel whose bits
// depend on the schedule has a race. A block whose threads never wait is a plain loop on one stack.
//
// What it checks. A launch returns null, or a message about the first of these faults:
//   * a grid, a block, an amount of shared memory or arguments that cannot be launched;
//   * a thread that returns while others wait for it, or a barrier after some threads have returned
//     (devices count those as arrived; our kernels promise that there are none);
//   * threads that wait for each other for ever, or at different kinds of barriers;
//   * an exchange whose mask does not name its own lane or the one that it reads from, or names one
//     that has returned or is past the end of the block (`__syncwarp` may do the latter);
//   * a wide access at an address that is no multiple of its size (`check_aligned`);
//   * a write to the 256 bytes past the end of dynamic shared memory;
//   * `__trap()` and a failed `assert`.
// Shared memory holds bytes 0xff, NaN in every type, when a block begins, so that reading before
// writing shows in the results. Dynamic shared memory begins at a multiple of 16 bytes, of no more.
//
// What it does not. There is no memory model: threads see what others wrote at once, so a missing
// fence passes unseen, and so does a missing barrier unless a schedule that was tried tells. Blocks
// never overlap. A thread that spins for ever hangs; one with 64 KiB of local variables crashes.
// Accesses past the end of a tensor or of static shared memory are undefined, as in all of C++.
// Registers, launch bounds, the sum of static and dynamic shared memory and speed are not modelled.
// Fast intrinsics (`__expf`) are exact here; what a device contracts is rounded twice.
//
// How static shared memory is found: `__shared__` makes variables thread-local. A shared library of
// kernels has no other such variables, so its thread-local storage as a whole is shared memory.
#pragma once
#define OXITRON_EMULATOR 1

#include <link.h>
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <mutex>
#include <numeric>
#include <utility>

// Nothing but the entry points leaves a library. Otherwise the loader would merge the instances of
// templates, and with them the shared memory, of all libraries in a process.
#pragma GCC visibility push(hidden)

#define __global__ __attribute__((visibility("hidden")))
#define __device__ __attribute__((visibility("hidden")))
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static thread_local

namespace emulator {

using u32 = uint32_t;
using u64 = uint64_t;

// As the host builds it.
struct __attribute__((visibility("default"))) Launch {
  unsigned grid[3], block[3], shared_bytes;
  unsigned long long schedule;
  unsigned argument_count;
  const unsigned *argument_bytes; // null: the arguments are taken to be those of the kernel
};

inline struct Index {
  unsigned x, y, z;
} threadIdx, blockIdx, blockDim, gridDim;

constexpr u32 LANES = 32, MOST_THREADS = 1024, MOST_SHARED = 227 * 1024, GUARD = 256;

// ---- fibers -------------------------------------------------------------------------------------

[[noreturn]] inline void fiber_main();

#if defined(__x86_64__) || defined(__aarch64__)
// The stack pointer; all else that a call preserves lies on the stack.
using Context = void *;

// Saves the running context in `*from` and continues `to`. Defined in assembly, since the compiler
// must take it for a call that can change every variable: other fibers run meanwhile.
extern "C" void oxitron_fiber_switch(Context *from, Context to);
__forceinline__ void continue_with(Context &from, Context &to) { oxitron_fiber_switch(&from, to); }

#if defined(__x86_64__)
#define FIBER_SWITCH                                                                               \
  "push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15; mov %rsp, (%rdi);"            \
  "mov %rsi, %rsp; pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret;"
// Six registers, the address to return to, and a return address for `fiber_main` that none uses.
constexpr size_t FRAME = 8, ENTRY = 6;
#else
#define FIBER_MOVE(op)                                                                             \
  op " x19, x20, [sp];" op " x21, x22, [sp, #16];" op " x23, x24, [sp, #32];"                      \
  op " x25, x26, [sp, #48];" op " x27, x28, [sp, #64];" op " x29, x30, [sp, #80];"                 \
  op " d8, d9, [sp, #96];" op " d10, d11, [sp, #112];" op " d12, d13, [sp, #128];"                 \
  op " d14, d15, [sp, #144];"
#define FIBER_SWITCH                                                                               \
  "sub sp, sp, #160;" FIBER_MOVE("stp") "mov x2, sp; str x2, [x0]; mov sp, x1;" FIBER_MOVE("ldp")  \
  "add sp, sp, #160; ret;"
// Twenty registers, of which the twelfth holds the address to return to.
constexpr size_t FRAME = 20, ENTRY = 11;
#endif
asm(".pushsection .text; .weak oxitron_fiber_switch; .hidden oxitron_fiber_switch;"
    "oxitron_fiber_switch:" FIBER_SWITCH ".popsection");

inline void prepare(Context &context, unsigned char *stack, size_t bytes) {
  const uintptr_t top = reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t(15);
  uintptr_t *const frame = reinterpret_cast<uintptr_t *>(top) - FRAME;
  memset(frame, 0, FRAME * sizeof *frame);
  frame[ENTRY] = reinterpret_cast<uintptr_t>(&fiber_main);
  context = frame;
}
#else
using Context = ucontext_t;
inline void continue_with(Context &from, Context &to) { swapcontext(&from, &to); }
inline void prepare(Context &context, unsigned char *stack, size_t bytes) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  makecontext(&context, fiber_main, 0);
}
#endif

// A stack for each thread of a block, above a page that becomes inaccessible when it is first used.
constexpr size_t STACK = 64 * 1024, PAGE = 4096;
alignas(PAGE) inline unsigned char stacks[MOST_THREADS][PAGE + STACK];

// ---- the state of a launch ----------------------------------------------------------------------

enum Wait : u32 { SYNC, SYNC_OR, SYNC_AND, SYNC_COUNT, WARP, IDX, UP, DOWN, XOR, BALLOT, ANY, ALL };
constexpr const char *NAMES[] = {"__syncthreads", "__syncthreads_or", "__syncthreads_and",
                                 "__syncthreads_count", "__syncwarp", "__shfl_sync",
                                 "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync",
                                 "__ballot_sync", "__any_sync", "__all_sync"};

// Lanes of a warp that wait at the same place for the others of the same mask.
struct Exchange {
  Wait wait;
  u32 mask, arrived, votes;
};

struct Warp {
  u32 present, returned, open;
  Exchange exchanges[LANES];
};

// It waits, if it does, at `wait` for the lanes of `mask`, to get the value of the lane `source`.
struct Thread {
  Index index;
  u32 lane, mask, source;
  Wait wait;
  u64 value, result;
  Warp *warp;
  bool started, returned;
  Context context;
};

struct State {
  std::mutex busy;
  void (*call)(const void *);
  const void *bound;
  u64 schedule, random;
  bool failed;
  // The threads of a block, those that have returned, the stacks in use and those ever used.
  u32 threads, returned, stacks, protected_stacks;
  // The barrier: how many wait at it, for how many of them the predicate holds; the last outcome.
  Wait barrier;
  u32 arrived, votes, result;
  // Shared memory: the variables of this library, and what the launch asks for.
  char *variables;
  size_t variable_bytes, dynamic_bytes;
  // The threads that can run, the next one in the schedule's order last.
  u32 ready_count;
  Thread *ready[MOST_THREADS], *current, thread[MOST_THREADS];
  Warp warp[MOST_THREADS / LANES];
  Context host;
};

inline State state{};

// What a launch uses begins at byte 16, which is no multiple of 32.
alignas(64) inline unsigned char dynamic_memory[16 + MOST_SHARED + GUARD];
template <class T> T *dynamic_shared() { return reinterpret_cast<T *>(dynamic_memory + 16); }

// Lies among the shared variables and so tells where they are. It is written after a launch's last
// block has begun, and each host thread has its own.
static thread_local char message[512];

// ---- faults -------------------------------------------------------------------------------------

// Ends the launch. The block's threads never go on, which is safe: kernels have no destructors.
[[noreturn, gnu::noinline, gnu::cold]] inline void fail(const char *format, ...) {
  const int length = snprintf(message, sizeof message, "block (%u, %u, %u), thread (%u, %u, %u): ",
                              blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y,
                              threadIdx.z);
  va_list values;
  va_start(values, format);
  vsnprintf(message + length, sizeof message - size_t(length), format, values);
  va_end(values);
  state.failed = true;
  continue_with(state.current->context, state.host);
  __builtin_unreachable();
}

template <class... V> __forceinline__ void require(bool holds, const char *format, V... values) {
  if (__builtin_expect(!holds, 0)) {
    fail(format, values...);
  }
}

__forceinline__ void check_aligned(const void *at, u32 bytes) {
  const u32 past = u32(reinterpret_cast<uintptr_t>(at) % bytes);
  require(past == 0, "an access of %u bytes, %u bytes past a multiple of that", bytes, past);
}

// Some thread waits elsewhere than the first: were all at the same place, they would have gone on.
[[noreturn, gnu::noinline, gnu::cold]] inline void fail_deadlocked() {
  const Thread *first = state.thread;
  while (first->returned) {
    first++;
  }
  const Thread *other = first;
  while (other->returned || (other->wait == first->wait && other->mask == first->mask)) {
    other++;
  }
  threadIdx = first->index;
  fail("waits for ever at %s with mask %#x, while thread (%u, %u, %u) waits at %s with mask %#x",
       NAMES[first->wait], first->mask, other->index.x, other->index.y, other->index.z,
       NAMES[other->wait], other->mask);
}

// ---- who runs next ------------------------------------------------------------------------------

inline u64 draw() {
  u64 x = state.random += 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

// Lets those of `count` threads from `first` on run whose lane `mask` names.
inline void make_ready(Thread *first, u32 count, u32 mask) {
  for (u32 i = 0; i < count; i++) {
    const u32 at = state.schedule == 1 ? i : count - 1 - i;
    if ((mask >> at % LANES & 1) != 0) {
      state.ready[state.ready_count++] = first + at;
    }
  }
}

// Makes the next thread the current one.
__forceinline__ Thread *choose() {
  if (state.ready_count == 0) {
    fail_deadlocked();
  }
  Thread *&last = state.ready[--state.ready_count];
  if (state.schedule > 1) {
    std::swap(last, state.ready[(draw() >> 32) * (state.ready_count + 1) >> 32]);
  }
  state.current = last;
  threadIdx = last->index;
  return last;
}

// Gives a thread a stack. The tops, all in use at once, are spread over the lines of the caches.
inline void start(Thread *thread) {
  const u32 number = state.stacks++;
  if (number == state.protected_stacks && getpagesize() == int(PAGE)) {
    mprotect(stacks[number], PAGE, PROT_NONE);
    state.protected_stacks++;
  }
  thread->started = true;
  prepare(thread->context, stacks[number] + PAGE, STACK - number * 192 % PAGE);
}

// Lets others run until the current thread has been made ready and is chosen.
__forceinline__ void suspend() {
  Thread *const self = state.current, *const next = choose();
  if (next == self) {
    return;
  }
  if (!next->started) {
    start(next);
  }
  continue_with(self->context, next->context);
}

inline void leave(Thread *self) {
  const char *waited_for = state.arrived > 0 ? NAMES[state.barrier] : nullptr;
  for (u32 i = 0; i < self->warp->open; i++) {
    if ((self->warp->exchanges[i].mask >> self->lane & 1) != 0) {
      waited_for = NAMES[self->warp->exchanges[i].wait];
    }
  }
  require(waited_for == nullptr, "returned while others wait for it at %s", waited_for);
  self->returned = true;
  self->warp->returned |= 1u << self->lane;
  state.returned++;
}

// Runs threads that have not started, one after another, for as long as none of them waits.
[[noreturn]] inline void fiber_main() {
  for (;;) {
    state.call(state.bound);
    Thread *const self = state.current;
    leave(self);
    if (state.returned == state.threads) {
      for (u32 i = 0; i < GUARD; i++) {
        require(dynamic_shared<unsigned char>()[state.dynamic_bytes + i] == 0xff,
                "the block wrote past its %zu bytes of dynamic shared memory", state.dynamic_bytes);
      }
      continue_with(self->context, state.host);
    }
    Thread *const next = choose();
    if (next->started) {
      continue_with(self->context, next->context);
    }
    next->started = true;
  }
}

// ---- barriers and exchanges ---------------------------------------------------------------------

// The number of threads whose predicate holds.
inline u32 barrier(Wait wait, bool predicate) {
  require(state.returned == 0, "waits at %s, but %u of the block's threads have returned",
          NAMES[wait], state.returned);
  require(state.arrived == 0 || state.barrier == wait, "waits at %s, while others wait at %s",
          NAMES[wait], NAMES[state.barrier]);
  state.barrier = state.current->wait = wait;
  state.current->mask = ~0u;
  state.votes += predicate;
  if (++state.arrived == state.threads) {
    state.result = state.votes;
    state.arrived = state.votes = 0;
    make_ready(state.thread, state.threads, ~0u);
  }
  suspend();
  return state.result;
}

// For votes the lanes whose value is not 0, for shuffles the value of the lane `source`.
inline u64 exchange(Wait wait, u32 mask, u64 value, u32 source) {
  Thread *const self = state.current, *const lanes = self - self->lane;
  Warp &warp = *self->warp;
  const char *const name = NAMES[wait];
  mask &= wait == WARP ? warp.present : ~0u;
  require(mask >> self->lane & 1, "%s with mask %#x, which does not name its own lane, %u", name,
          mask, self->lane);
  const u32 gone = mask & (warp.returned | ~warp.present);
  require(gone == 0, "%s with mask %#x, but lanes %#x have returned or are past the block", name,
          mask, gone);
  require(mask >> source & 1, "%s reads from lane %u, which its mask %#x does not name", name,
          source, mask);
  self->wait = wait;
  self->mask = mask;
  self->value = value;
  self->source = source;
  Exchange *at = warp.exchanges, *const end = at + warp.open;
  while (at < end && (at->wait != wait || at->mask != mask)) {
    at++;
  }
  if (at == end) {
    *at = {wait, mask, 0, 0};
    warp.open++;
  }
  at->arrived |= 1u << self->lane;
  at->votes |= u32(value != 0) << self->lane;
  if (at->arrived == mask) {
    for (u32 i = 0; i < LANES; i++) {
      if ((mask >> i & 1) != 0) {
        lanes[i].result = wait >= BALLOT ? at->votes : lanes[lanes[i].source].value;
      }
    }
    *at = warp.exchanges[--warp.open];
    make_ready(lanes, LANES, mask);
  }
  suspend();
  return self->result;
}

__forceinline__ u32 vote(Wait wait, u32 mask, bool predicate) {
  return u32(exchange(wait, mask, predicate, state.current->lane));
}

// As the instruction `shfl.sync`: in segments of `width` lanes; one whose source lies outside of
// its segment (for `XOR`: past it) reads its own value.
template <class T> T shuffle(Wait wait, u32 mask, T value, u32 operand, u32 width) {
  static_assert(std::is_trivially_copyable<T>::value && (sizeof(T) == 4 || sizeof(T) == 8));
  require(width != 0 && LANES % width == 0, "%s in segments of %u lanes", NAMES[wait], width);
  operand %= LANES;
  const u32 lane = state.current->lane, first = lane & ~(width - 1);
  u32 source = wait == IDX    ? first + operand % width
               : wait == UP   ? lane - operand
               : wait == DOWN ? lane + operand
                              : lane ^ operand;
  if (wait == UP ? lane < first + operand : source >= first + width) {
    source = lane;
  }
  u64 bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = exchange(wait, mask, bits, source);
  return memcpy(&value, &bits, sizeof value), value;
}

// ---- launches -----------------------------------------------------------------------------------

// Looks for the calling thread's thread-local variables of this library.
inline int find_variables(dl_phdr_info *library, size_t, void *) {
  char *const start = static_cast<char *>(library->dlpi_tls_data);
  for (u32 i = 0; start != nullptr && i < library->dlpi_phnum; i++) {
    const auto &part = library->dlpi_phdr[i];
    if (part.p_type == PT_TLS && message >= start && message < start + part.p_memsz) {
      state.variables = start;
      state.variable_bytes = part.p_memsz;
      return 1;
    }
  }
  return 0;
}

// What is wrong with a launch of a kernel whose `count` parameters have the sizes `bytes`, or null.
inline const char *refusal(const Launch &launch, const u32 *bytes, u32 count) {
  const u32 *const block = launch.block, *const grid = launch.grid;
  bool fits = block[2] <= 64 && launch.shared_bytes <= MOST_SHARED;
  for (u32 i = 0; i < 3; i++) {
    fits = fits && grid[i] > 0 && grid[i] <= (i == 0 ? 0x7fffffff : 0xffff) && block[i] > 0;
  }
  if (!fits || u64(block[0]) * block[1] > MOST_THREADS / block[2]) {
    return "a grid has 1 to 2147483647, 65535 and 65535 blocks; a block has 1 to 1024 threads, at "
           "most 64 in its third dimension, and at most 227 KiB of shared memory";
  }
  if (launch.argument_bytes != nullptr &&
      (launch.argument_count != count || memcmp(launch.argument_bytes, bytes, 4 * count) != 0)) {
    return "number and sizes of the arguments are not those of the kernel's parameters";
  }
  return nullptr;
}

inline void run_block(u64 number) {
  blockIdx = {u32(number % gridDim.x), u32(number / gridDim.x % gridDim.y),
              u32(number / gridDim.x / gridDim.y)};
  memset(state.variables, 0xff, state.variable_bytes);
  memset(dynamic_shared<char>(), 0xff, state.dynamic_bytes + GUARD);
  state.returned = state.arrived = state.votes = state.ready_count = state.stacks = 0;
  for (u32 i = 0; i < state.threads; i++) {
    Thread &thread = state.thread[i];
    thread.started = thread.returned = false;
    thread.warp->present = ~0u >> (LANES - 1 - thread.lane);
    thread.warp->returned = thread.warp->open = 0;
  }
  make_ready(state.thread, state.threads, ~0u);
  start(choose());
  continue_with(state.host, state.current->context);
}

inline const char *run_blocks(const Launch &launch, void (*call)(const void *), const void *bound) {
  const std::lock_guard<std::mutex> one_launch_at_a_time(state.busy);
  gridDim = {launch.grid[0], launch.grid[1], launch.grid[2]};
  blockDim = {launch.block[0], launch.block[1], launch.block[2]};
  state.call = call;
  state.bound = bound;
  state.schedule = state.random = launch.schedule;
  state.dynamic_bytes = launch.shared_bytes;
  state.failed = false;
  state.threads = blockDim.x * blockDim.y * blockDim.z;
  for (u32 i = 0; i < state.threads; i++) {
    const u32 row = i / blockDim.x;
    state.thread[i].index = {i % blockDim.x, row % blockDim.y, row / blockDim.y};
    state.thread[i].lane = i % LANES;
    state.thread[i].warp = &state.warp[i / LANES];
  }
  dl_iterate_phdr(find_variables, nullptr);
  // Steps of a length that shares no factor with the number of blocks lead to each block once.
  const u64 blocks = u64(gridDim.x) * gridDim.y * gridDim.z;
  u64 block = launch.schedule == 0 ? 0 : launch.schedule == 1 ? blocks - 1 : draw() % blocks;
  u64 step = launch.schedule == 0 ? 1 : blocks - 1;
  while (launch.schedule > 1 && std::gcd(step = draw() % blocks, blocks) != 1) {
  }
  for (u64 i = 0; i < blocks && !state.failed; i++, block = (block + step) % blocks) {
    run_block(block);
  }
  return state.failed ? message : nullptr;
}

template <class... A, size_t... I>
void apply(void (*kernel)(A...), [[maybe_unused]] void **arguments, std::index_sequence<I...>) {
  kernel(*static_cast<A *>(arguments[I])...);
}

// Runs `kernel`; `arguments` points to its arguments' values. Returns null or what was wrong, in
// words that last until the same host thread's next launch.
template <class... A>
const char *run(void (*kernel)(A...), const Launch &launch, void **arguments) {
  const u32 bytes[] = {u32(sizeof(A))..., 0};
  if (const char *const why = refusal(launch, bytes, sizeof...(A))) {
    return why;
  }
  const auto bound = std::make_pair(kernel, arguments);
  const auto call = [](const void *it) {
    const auto [kernel, arguments] = *static_cast<decltype(bound) *>(it);
    apply(kernel, arguments, std::index_sequence_for<A...>());
  };
  return run_blocks(launch, call, &bound);
}

// ---- what kernels call --------------------------------------------------------------------------

template <class T> __forceinline__ T load(const T *at) { return check_aligned(at, sizeof(T)), *at; }
template <class T> void store(T *at, T value) { check_aligned(at, sizeof(T)), *at = value; }

template <class To, class From> To cast_bits(From from) {
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// The bits of the nearest bfloat16, of the even one where two are as near; NaN becomes 0x7fff.
inline u32 round_bf16(float x) {
  const u32 bits = cast_bits<u32>(x);
  return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline namespace builtins {
inline void __syncthreads() { barrier(SYNC, false); }
inline int __syncthreads_or(int x) { return barrier(SYNC_OR, x != 0) > 0; }
inline int __syncthreads_and(int x) { return barrier(SYNC_AND, x == 0) == 0; }
inline int __syncthreads_count(int x) { return int(barrier(SYNC_COUNT, x != 0)); }
inline void __syncwarp(u32 mask = ~0u) { vote(WARP, mask, false); }
inline u32 __ballot_sync(u32 mask, int x) { return vote(BALLOT, mask, x != 0); }
inline int __any_sync(u32 mask, int x) { return vote(ANY, mask, x != 0) != 0; }
inline int __all_sync(u32 mask, int x) { return vote(ALL, mask, x == 0) == 0; }

#define SHUFFLE(name, wait, Operand)                                                               \
  template <class T> T name(u32 mask, T value, Operand operand, int width = 32) {                  \
    return shuffle(wait, mask, value, u32(operand), u32(width));                                   \
  }
SHUFFLE(__shfl_sync, IDX, int)
SHUFFLE(__shfl_up_sync, UP, u32)
SHUFFLE(__shfl_down_sync, DOWN, u32)
SHUFFLE(__shfl_xor_sync, XOR, int)
#undef SHUFFLE
[[noreturn]] inline void __trap() { fail("__trap()"); }

// Of integers. Of two floats it is the one that is a number, if only one is.
using std::max, std::min;
inline float min(float x, float y) { return fminf(x, y); }
inline float max(float x, float y) { return fmaxf(x, y); }
inline double min(double x, double y) { return fmin(x, y); }
inline double max(double x, double y) { return fmax(x, y); }

#define ROUNDED(T, letter, root, fused, fused_rn)                                                  \
  inline T __##letter##add_rn(T x, T y) { return x + y; }                                          \
  inline T __##letter##sub_rn(T x, T y) { return x - y; }                                          \
  inline T __##letter##mul_rn(T x, T y) { return x * y; }                                          \
  inline T __##letter##div_rn(T x, T y) { return x / y; }                                          \
  inline T __##letter##rcp_rn(T x) { return 1 / x; }                                               \
  inline T __##letter##sqrt_rn(T x) { return root(x); }                                            \
  inline T fused_rn(T x, T y, T z) { return fused(x, y, z); }
ROUNDED(float, f, sqrtf, fmaf, __fmaf_rn)
ROUNDED(double, d, sqrt, fma, __fma_rn)
#undef ROUNDED
inline float __fdividef(float x, float y) { return x / y; }
} // namespace builtins
} // namespace emulator
using namespace emulator::builtins;
using emulator::threadIdx, emulator::blockIdx, emulator::blockDim, emulator::gridDim;

// Macros, since the C library declares functions under some of the names.
#define __ldg emulator::load
#define __ldca emulator::load
#define __ldcg emulator::load
#define __ldcs emulator::load
#define __stcg emulator::store
#define __stcs emulator::store
#define __float_as_uint emulator::cast_bits<unsigned, float>
#define __float_as_int emulator::cast_bits<int, float>
#define __uint_as_float emulator::cast_bits<float, unsigned>
#define __int_as_float emulator::cast_bits<float, int>
#define __expf expf
#define __logf logf
#define rsqrtf(x) (1.0f / sqrtf(x))

#undef assert
#define assert(x) ((x) ? void() : emulator::fail("assertion failed: %s", #x))

#pragma GCC visibility pop
