// Copies between host and GPU that the host does not wait for.

#include "guarded.h"
#include "shim.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>

char *oxitron_copy(at::Tensor *to, const at::Tensor *from) {
  return guarded([&] {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    // Anything else goes through a buffer in pageable memory, for which the host would wait.
    TORCH_CHECK(to->scalar_type() == from->scalar_type() && to->sizes() == from->sizes() &&
                    to->is_contiguous() && from->is_contiguous(),
                "a copy of ", from->sizes(), " ", from->scalar_type(), " to ", to->sizes(), " ",
                to->scalar_type(), " between contiguous tensors that are not alike");
    to->copy_(*from, /*non_blocking=*/true);
  });
}
