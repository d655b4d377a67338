// How a C++ exception becomes a message of the C face.
#pragma once

#include <cstring>
#include <exception>

#include <c10/util/Exception.h>

// Runs `body`: null, or what it threw as text allocated by malloc. libtorch's own errors come
// without the C++ stack that `what` would append.
template <class Body> char *guarded(Body body) {
  try {
    body();
    return nullptr;
  } catch (const c10::Error &error) {
    return strdup(error.what_without_backtrace());
  } catch (const std::exception &error) {
    return strdup(error.what());
  } catch (...) {
    return strdup("an exception that is no std::exception");
  }
}
