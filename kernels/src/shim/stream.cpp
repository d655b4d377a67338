// Streams of a GPU by their raw handle, and events.

#include "gpu.h"
#include "guarded.h"
#include "shim.h"

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>
#include <c10/core/Stream.h>

namespace {

// libtorch knows a stream that it did not make by the handle as its id. The ids that it makes are
// odd, a handle is the address of something aligned, and the default stream is 0 as both.
c10::Stream external(int32_t device, void *stream) {
  const auto id = reinterpret_cast<c10::StreamId>(stream);
  TORCH_CHECK(id % 2 == 0, stream, " is no stream's address");
  return c10::Stream(c10::Stream::UNSAFE, gpu(device), id);
}

c10::Event *as_event(void *event) { return static_cast<c10::Event *>(event); }
const c10::Event *as_event(const void *event) { return static_cast<const c10::Event *>(event); }

} // namespace

char *oxitron_stream_current(int32_t device, void **stream) {
  return guarded([&] {
    *stream = cuda()->getStreamNativeHandle(cuda()->getStream(gpu(device)));
  });
}

char *oxitron_stream_select(int32_t device, void *stream) {
  return guarded([&] { cuda()->exchangeStream(external(device, stream)); });
}

char *oxitron_stream_from_pool(int32_t device, int32_t high_priority, void **stream) {
  return guarded([&] {
    const c10::Stream pooled = cuda()->getStreamFromGlobalPool(gpu(device), high_priority != 0);
    *stream = cuda()->getStreamNativeHandle(pooled);
  });
}

char *oxitron_stream_synchronize(int32_t device, void *stream) {
  return guarded([&] { cuda()->synchronizeStream(external(device, stream)); });
}

char *oxitron_stream_uses(int32_t device, void *stream, const at::Tensor *tensor) {
  return guarded([&] {
    cuda()->recordDataPtrOnStream(tensor->storage().data_ptr(), external(device, stream));
  });
}

char *oxitron_event_new(int32_t timing, void **event) {
  return guarded([&] {
    const auto flag =
        timing != 0 ? c10::EventFlag::BACKEND_DEFAULT : c10::EventFlag::PYTORCH_DEFAULT;
    *event = new c10::Event(c10::DeviceType::CUDA, flag);
  });
}

void oxitron_event_free(void *event) { delete as_event(event); }

char *oxitron_event_record(void *event, int32_t device, void *stream) {
  return guarded([&] { as_event(event)->record(external(device, stream)); });
}

char *oxitron_event_wait(const void *event, int32_t device, void *stream) {
  return guarded([&] { as_event(event)->block(external(device, stream)); });
}

char *oxitron_event_synchronize(const void *event) {
  return guarded([&] { as_event(event)->synchronize(); });
}

char *oxitron_event_done(const void *event, int32_t *done) {
  return guarded([&] { *done = as_event(event)->query() ? 1 : 0; });
}

char *oxitron_event_elapsed(const void *start, const void *end, double *milliseconds) {
  return guarded([&] { *milliseconds = as_event(start)->elapsedTime(*as_event(end)); });
}
