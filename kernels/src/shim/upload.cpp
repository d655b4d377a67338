// Host memory to a GPU without waiting for the GPU.

#include "gpu.h"
#include "guarded.h"
#include "shim.h"

#include <ATen/core/Tensor.h>

char *oxitron_upload(const at::Tensor *host, int32_t device, at::Tensor **uploaded) {
  return guarded([&] {
    // Page-locked memory comes from libtorch's cache, which takes it back when the copy is done.
    *uploaded = new at::Tensor(
        host->pin_memory().to(gpu(device), host->scalar_type(), /*non_blocking=*/true));
  });
}
