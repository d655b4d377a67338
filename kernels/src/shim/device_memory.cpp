// What libtorch's caching allocator did on a GPU.

#include "gpu.h"
#include "guarded.h"
#include "shim.h"

#include <ATen/Context.h>
#include <c10/core/CachingDeviceAllocator.h>

namespace {

// The allocator knows no device before libtorch's CUDA half has started.
c10::DeviceAllocator *allocator() {
  at::globalContext().lazyInitDevice(c10::DeviceType::CUDA);
  return c10::getDeviceAllocator(c10::DeviceType::CUDA);
}

} // namespace

char *oxitron_device_memory_read(int32_t device, OxitronDeviceMemory *memory) {
  return guarded([&] {
    const auto stats = allocator()->getDeviceStats(gpu(device).index());
    const auto whole = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    const auto &allocated = stats.allocated_bytes[whole];
    const auto &reserved = stats.reserved_bytes[whole];
    memory->allocated = static_cast<uint64_t>(allocated.current);
    memory->allocated_peak = static_cast<uint64_t>(allocated.peak);
    memory->reserved = static_cast<uint64_t>(reserved.current);
    memory->reserved_peak = static_cast<uint64_t>(reserved.peak);
    memory->allocations = static_cast<uint64_t>(stats.allocation[whole].allocated);
    memory->driver_allocations = static_cast<uint64_t>(stats.num_device_alloc);
    memory->retries = static_cast<uint64_t>(stats.num_alloc_retries);
    memory->failures = static_cast<uint64_t>(stats.num_ooms);
  });
}

char *oxitron_device_memory_reset_peak(int32_t device) {
  return guarded([&] { allocator()->resetPeakStats(gpu(device).index()); });
}

char *oxitron_device_memory_release() {
  return guarded([] { allocator()->emptyCache(); });
}

char *oxitron_device_memory_total(int32_t device, uint64_t *left, uint64_t *total) {
  return guarded([&] {
    const auto [free_bytes, all_bytes] =
        allocator()->getMemoryInfo(gpu(device).index());
    *left = free_bytes;
    *total = all_bytes;
  });
}
