// How often the host waits for a GPU inside libtorch.
//
// libtorch has no counter, but a mode in which each such wait gives a warning, and a handler for
// the warnings of a thread. The mode is an enumeration of libc10_cuda's, {off, warn, fail}, that
// only headers of CUDA declare; its mangled name reaches it.

#include "guarded.h"
#include "shim.h"

#include <string_view>

#include <dlfcn.h>

#include <c10/util/Exception.h>

namespace {

constexpr const char *mode_name = "_ZZN3c104cuda13warning_stateEvE14warning_state_";
constexpr std::string_view wait_text = "called a synchronizing CUDA operation";

struct CountingHandler final : c10::WarningHandler {
  c10::WarningHandler *next = nullptr;
  uint64_t count = 0;

  void process(const c10::Warning &warning) override {
    if (std::string_view(warning.msg()).find(wait_text) != std::string_view::npos) {
      count++;
    } else {
      next->process(warning);
    }
  }
};

thread_local CountingHandler handler;

} // namespace

char *oxitron_host_waits_watch(int32_t on) {
  return guarded([&] {
    auto *mode = static_cast<int *>(dlsym(RTLD_DEFAULT, mode_name));
    TORCH_CHECK(mode != nullptr, "libc10_cuda is not loaded or not the one expected: ", dlerror());
    c10::WarningHandler *current = c10::WarningUtils::get_warning_handler();
    if (on != 0 && current != &handler) {
      handler.next = current;
      c10::WarningUtils::set_warning_handler(&handler);
    } else if (on == 0 && current == &handler) {
      c10::WarningUtils::set_warning_handler(handler.next);
    }
    *mode = on != 0 ? 1 : 0;
  });
}

uint64_t oxitron_host_waits_count() { return handler.count; }
