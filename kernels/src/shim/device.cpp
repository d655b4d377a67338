// The GPUs of this process as libtorch sees them.

#include "gpu.h"
#include "guarded.h"
#include "shim.h"

#include <ATen/Context.h>

int32_t oxitron_cuda_devices() {
  return c10::impl::hasDeviceGuardImpl(c10::DeviceType::CUDA) ? cuda()->deviceCount() : 0;
}

char *oxitron_cuda_initialize() {
  return guarded([] { at::globalContext().lazyInitDevice(c10::DeviceType::CUDA); });
}

char *oxitron_device_current(int32_t *device) {
  return guarded([&] { *device = cuda()->getDevice().index(); });
}

char *oxitron_device_select(int32_t device) {
  return guarded([&] { cuda()->setDevice(gpu(device)); });
}

char *oxitron_device_synchronize(int32_t device) {
  return guarded([&] { cuda()->synchronizeDevice(gpu(device).index()); });
}
