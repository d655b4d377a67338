// The state of libtorch's default random generators.

#include "gpu.h"
#include "guarded.h"
#include "shim.h"

#include <mutex>

#include <ATen/Context.h>
#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

namespace {

at::Generator generator(int32_t device) {
  const c10::Device where = device < 0 ? c10::Device(c10::DeviceType::CPU) : gpu(device);
  return at::globalContext().defaultGenerator(where);
}

} // namespace

char *oxitron_generator_read(int32_t device, at::Tensor **state) {
  return guarded([&] {
    at::Generator source = generator(device);
    const std::lock_guard<std::mutex> lock(source.mutex());
    *state = new at::Tensor(source.get_state());
  });
}

char *oxitron_generator_write(int32_t device, const at::Tensor *state) {
  return guarded([&] {
    at::Generator target = generator(device);
    const std::lock_guard<std::mutex> lock(target.mutex());
    target.set_state(*state);
  });
}
