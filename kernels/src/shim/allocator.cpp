// A counting CPU allocator: libtorch keeps statistics for CUDA memory only.
//
// It wraps c10::alloc_cpu and asks malloc for the size of a block when it is freed. A block needs no
// header then, and its data pointer stays its own context, which is what c10::Allocator::raw_deleter
// promises.
//
// Large blocks are advised to lie in huge pages, where the system gives them to those who ask:
// a step streams through gigabytes, and a page fault or a missed translation per 4 KiB costs more
// than the advice.

#include "shim.h"

#include <atomic>
#include <cstring>
#include <exception>
#include <malloc.h>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

namespace {

std::atomic<uint64_t> current_bytes{0};
std::atomic<uint64_t> peak_bytes{0};
std::atomic<uint64_t> allocation_count{0};

// From here on a block is worth huge pages (2 MiB on x86-64 and most of ARM): at least one of them
// lies wholly inside.
constexpr size_t huge_from = size_t{4} << 20;

void advise(void *block, size_t bytes) {
#ifdef __linux__
  if (bytes < huge_from) {
    return;
  }
  static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto start = (reinterpret_cast<uintptr_t>(block) + page - 1) / page * page;
  const auto end = (reinterpret_cast<uintptr_t>(block) + bytes) / page * page;
  // Only advice: a system without huge pages refuses, and nothing is lost.
  (void)madvise(reinterpret_cast<void *>(start), end - start, MADV_HUGEPAGE);
#else
  (void)block;
  (void)bytes;
#endif
}

void release(void *block) {
  if (block == nullptr) {
    return;
  }
  current_bytes.fetch_sub(malloc_usable_size(block), std::memory_order_relaxed);
  c10::free_cpu(block);
}

struct CountingAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void *block = c10::alloc_cpu(bytes);
    if (block != nullptr) {
      advise(block, bytes);
      const uint64_t size = malloc_usable_size(block);
      const uint64_t now = current_bytes.fetch_add(size, std::memory_order_relaxed) + size;
      uint64_t peak = peak_bytes.load(std::memory_order_relaxed);
      while (peak < now &&
             !peak_bytes.compare_exchange_weak(peak, now, std::memory_order_relaxed)) {
      }
      allocation_count.fetch_add(1, std::memory_order_relaxed);
    }
    return {block, block, &release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void *to, const void *from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

} // namespace

char *oxitron_memory_install() {
  try {
    // Tensors may outlive every static of this file, so the allocator is never destroyed.
    static CountingAllocator *allocator = new CountingAllocator;
    c10::SetCPUAllocator(allocator);
    return nullptr;
  } catch (const std::exception &error) {
    return strdup(error.what());
  } catch (...) {
    return strdup("an exception that is no std::exception");
  }
}

void oxitron_memory_read(uint64_t *current, uint64_t *peak, uint64_t *allocations) {
  *current = current_bytes.load(std::memory_order_relaxed);
  *peak = peak_bytes.load(std::memory_order_relaxed);
  *allocations = allocation_count.load(std::memory_order_relaxed);
}

void oxitron_memory_reset_peak() {
  peak_bytes.store(current_bytes.load(std::memory_order_relaxed), std::memory_order_relaxed);
}
