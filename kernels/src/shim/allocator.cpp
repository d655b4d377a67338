// A counting CPU allocator: libtorch keeps statistics for CUDA memory only.
//
// It wraps c10::alloc_cpu, so alignment and transparent huge pages stay as libtorch has them, and
// asks malloc for the size of a block when it is freed. A block needs no header then, and its data
// pointer stays its own context, which is what c10::Allocator::raw_deleter promises.

#include "shim.h"

#include <atomic>
#include <cstring>
#include <exception>
#include <malloc.h>

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

namespace {

std::atomic<uint64_t> current_bytes{0};
std::atomic<uint64_t> peak_bytes{0};
std::atomic<uint64_t> allocation_count{0};

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
