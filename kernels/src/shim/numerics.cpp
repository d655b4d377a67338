// Which algorithms and roundings libtorch's ops may choose.
//
// Attention and products are called by kernel (`attention.cpp`, `product.cpp`), so the order in
// which libtorch would try its attention kernels is left alone, and so are cuDNN's settings, which
// are about convolutions.

#include "guarded.h"
#include "shim.h"

#include <ATen/Context.h>

char *oxitron_numerics_set(int32_t deterministic, int32_t tf32, int32_t reduced) {
  return guarded([&] {
    at::Context &context = at::globalContext();
    context.setDeterministicAlgorithms(deterministic != 0, /*warn_only=*/false);
    // Otherwise the deterministic mode writes every new tensor once for nothing.
    context.setDeterministicFillUninitializedMemory(false);
    context.setFloat32MatmulPrecision(tf32 != 0 ? "high" : "highest");
    context.setAllowBF16ReductionCuBLAS(reduced != 0);
  });
}
