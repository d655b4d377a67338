// Products that add to what is there.

#include "guarded.h"
#include "shim.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>

char *oxitron_product(at::Tensor *out, const at::Tensor *a, const at::Tensor *b, double beta,
                      double alpha) {
  return guarded([&] {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    // libtorch sees that the summand and the result are one tensor and hands it to the BLAS as the
    // accumulator.
    if (out->scalar_type() == a->scalar_type()) {
      at::addmm_out(*out, *out, *a, *b, beta, alpha);
    } else {
      at::addmm_out(*out, *out, *a, *b, out->scalar_type(), beta, alpha);
    }
  });
}
