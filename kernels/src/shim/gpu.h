// How the files of the shim name a GPU and reach libtorch's half for it.
#pragma once

#include <cstdint>

#include <c10/core/Device.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

inline c10::Device gpu(int32_t device) {
  return {c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device)};
}

// Throws where libtorch_cuda is not loaded.
inline const c10::impl::DeviceGuardImplInterface *cuda() {
  return c10::impl::getDeviceGuardImpl(c10::DeviceType::CUDA);
}
