// Attention by libtorch's three families of GPU kernels.

#include "guarded.h"
#include "shim.h"

#include <optional>
#include <tuple>
#include <utility>

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_cudnn_attention_backward.h>
#include <ATen/ops/_cudnn_attention_forward.h>
#include <ATen/ops/_efficient_attention_backward.h>
#include <ATen/ops/_efficient_attention_forward.h>
#include <ATen/ops/_flash_attention_backward.h>
#include <ATen/ops/_flash_attention_forward.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>

namespace {

using Forward = std::pair<at::Tensor, at::Tensor>;
using Backward = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

struct Saved {
  const at::Tensor &out;
  const at::Tensor &lse;
  const at::Tensor &dout;
};

bool packed(const OxitronAttention &in) { return in.starts_q != nullptr; }

int64_t longest_q(const OxitronAttention &in) { return packed(in) ? in.longest_q : in.q->size(1); }
int64_t longest_k(const OxitronAttention &in) { return packed(in) ? in.longest_k : in.k->size(1); }

void check(const OxitronAttention &in) {
  const int64_t dimensions = packed(in) ? 3 : 4;
  TORCH_CHECK(packed(in) == (in.starts_k != nullptr), "starts of one side only");
  TORCH_CHECK(in.q->dim() == dimensions && in.k->dim() == dimensions && in.v->dim() == dimensions,
              "q, k and v must have ", dimensions, " dimensions, found ", in.q->sizes(), ", ",
              in.k->sizes(), " and ", in.v->sizes());
  TORCH_CHECK(in.k->size(-2) > 0 && in.q->size(-2) % in.k->size(-2) == 0, in.k->size(-2),
              " key heads do not divide ", in.q->size(-2), " query heads");
  // The kernels agree on what causal means only where there are as many queries as keys.
  TORCH_CHECK(in.causal == 0 || (in.q->size(packed(in) ? 0 : 1) == in.k->size(packed(in) ? 0 : 1) &&
                                 longest_q(in) == longest_k(in)),
              "causal attention of ", in.q->sizes(), " to ", in.k->sizes());
}

// ---- flash --------------------------------------------------------------------------------------

Forward flash_forward(const OxitronAttention &in) {
  std::optional<at::Tensor> starts_q, starts_k;
  if (packed(in)) {
    starts_q = *in.starts_q;
    starts_k = *in.starts_k;
  }
  auto [out, lse, random, unused, mask] = at::_flash_attention_forward(
      *in.q, *in.k, *in.v, starts_q, starts_k, longest_q(in), longest_k(in), 0.0, in.causal != 0,
      /*return_debug_mask=*/false, in.scale);
  return {std::move(out), std::move(lse)};
}

// Its choice of algorithm follows the setting of the process (`oxitron_numerics_set`).
Backward flash_backward(const OxitronAttention &in, const Saved &saved) {
  const at::Tensor none;
  // Without dropout no random state is read: any tensor will do.
  return at::_flash_attention_backward(
      saved.dout, *in.q, *in.k, *in.v, saved.out, saved.lse, packed(in) ? *in.starts_q : none,
      packed(in) ? *in.starts_k : none, longest_q(in), longest_k(in), 0.0, in.causal != 0,
      saved.lse, saved.lse, in.scale);
}

// ---- cuDNN --------------------------------------------------------------------------------------

void check_dense(const OxitronAttention &in) {
  // libtorch 2.11 has packed sequences here, but builds a plan for each call, and its backward pass
  // takes the size of a head for the longest sequence.
  TORCH_CHECK(!packed(in), "libtorch's cuDNN attention takes no packed sequences");
}

Forward cudnn_forward(const OxitronAttention &in) {
  check_dense(in);
  auto results = at::_cudnn_attention_forward(
      in.q->transpose(1, 2), in.k->transpose(1, 2), in.v->transpose(1, 2), std::nullopt,
      std::nullopt, std::nullopt, longest_q(in), longest_k(in), /*compute_log_sumexp=*/true, 0.0,
      in.causal != 0, /*return_debug_mask=*/false, in.scale);
  return {std::get<0>(results).transpose(1, 2), std::get<1>(results)};
}

Backward cudnn_backward(const OxitronAttention &in, const Saved &saved, bool deterministic) {
  check_dense(in);
  TORCH_CHECK(!deterministic, "libtorch's cuDNN attention has no deterministic backward pass");
  const at::Tensor none;
  // Without dropout no seed is read, but on some devices its dtype is looked at.
  const at::Tensor seed = at::empty({}, in.q->options().dtype(at::kLong));
  // Plans are found again by the strides of q, k and v alone, so dout must always have the same.
  auto [dq, dk, dv] = at::_cudnn_attention_backward(
      saved.dout.contiguous().transpose(1, 2), in.q->transpose(1, 2), in.k->transpose(1, 2),
      in.v->transpose(1, 2), saved.out.transpose(1, 2), saved.lse, seed, seed, none, none, none,
      longest_q(in), longest_k(in), 0.0, in.causal != 0, in.scale);
  return {dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)};
}

// ---- memory-efficient ---------------------------------------------------------------------------

constexpr int64_t head_alignment = 8;

// [batch, seq, heads, d]; packed sequences are one batch.
at::Tensor batched(const OxitronAttention &in, const at::Tensor &x) {
  return packed(in) ? x.unsqueeze(0) : x;
}

// Zeros behind the end of each head change neither scores nor the rest of the output.
at::Tensor padded(const at::Tensor &x) {
  const int64_t over = x.size(3) % head_alignment;
  return over == 0 ? x : at::constant_pad_nd(x, {0, head_alignment - over});
}

at::Tensor every_head(const at::Tensor &x, int64_t heads) {
  const int64_t group = heads / x.size(2);
  if (group == 1) {
    return x;
  }
  return x.unsqueeze(3)
      .expand({x.size(0), x.size(1), x.size(2), group, x.size(3)})
      .reshape({x.size(0), x.size(1), heads, x.size(3)});
}

at::Tensor group_sums(const at::Tensor &x, int64_t kv_heads) {
  const int64_t group = x.size(2) / kv_heads;
  return group == 1 ? x : x.view({x.size(0), x.size(1), kv_heads, group, x.size(3)}).sum(3);
}

// The counterpart of `batched` and `padded`.
at::Tensor trimmed(const OxitronAttention &in, const at::Tensor &x) {
  const at::Tensor rows = x.narrow(3, 0, in.q->size(-1)).contiguous();
  return packed(in) ? rows.squeeze(0) : rows;
}

struct Efficient {
  at::Tensor q, k, v;
  std::optional<at::Tensor> starts_q, starts_k;
  int64_t mask;

  explicit Efficient(const OxitronAttention &in)
      : q(padded(batched(in, *in.q))),
        k(every_head(padded(batched(in, *in.k)), in.q->size(-2))),
        v(every_head(padded(batched(in, *in.v)), in.q->size(-2))),
        mask(in.causal != 0 ? 1 : 0) {
    if (packed(in)) {
      starts_q = *in.starts_q;
      starts_k = *in.starts_k;
    }
  }
};

Forward efficient_forward(const OxitronAttention &in) {
  const Efficient wide(in);
  auto results = at::_efficient_attention_forward(
      wide.q, wide.k, wide.v, std::nullopt, wide.starts_q, wide.starts_k, longest_q(in),
      longest_k(in), 0.0, wide.mask, /*compute_log_sumexp=*/true, in.scale);
  return {trimmed(in, std::get<0>(results)), std::get<1>(results)};
}

Backward efficient_backward(const OxitronAttention &in, const Saved &saved, bool deterministic) {
  const Efficient wide(in);
  const std::optional<int64_t> splits = deterministic ? std::optional<int64_t>(1) : std::nullopt;
  // Without dropout no random state is read: any tensor will do.
  auto [dq, dk, dv, dbias] = at::_efficient_attention_backward(
      padded(batched(in, saved.dout)), wide.q, wide.k, wide.v, std::nullopt,
      padded(batched(in, saved.out)).contiguous(), wide.starts_q, wide.starts_k, longest_q(in),
      longest_k(in), saved.lse, 0.0, saved.lse, saved.lse, wide.mask,
      /*bias_requires_grad=*/false, in.scale, splits);
  return {trimmed(in, dq), trimmed(in, group_sums(dk, in.k->size(-2))),
          trimmed(in, group_sums(dv, in.k->size(-2)))};
}

} // namespace

char *oxitron_attention_forward(int32_t kernel, const OxitronAttention *inputs, at::Tensor **out,
                                at::Tensor **lse) {
  return guarded([&] {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    check(*inputs);
    Forward result;
    switch (kernel) {
    case OXITRON_FLASH:
      result = flash_forward(*inputs);
      break;
    case OXITRON_CUDNN:
      result = cudnn_forward(*inputs);
      break;
    case OXITRON_EFFICIENT:
      result = efficient_forward(*inputs);
      break;
    default:
      TORCH_CHECK(false, "no attention kernel ", kernel);
    }
    *out = new at::Tensor(std::move(result.first));
    *lse = new at::Tensor(std::move(result.second));
  });
}

char *oxitron_attention_backward(int32_t kernel, const OxitronAttention *inputs,
                                 const at::Tensor *out, const at::Tensor *lse,
                                 const at::Tensor *dout, int32_t deterministic, at::Tensor **dq,
                                 at::Tensor **dk, at::Tensor **dv) {
  return guarded([&] {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    check(*inputs);
    const Saved saved{*out, *lse, *dout};
    Backward result;
    switch (kernel) {
    case OXITRON_FLASH:
      result = flash_backward(*inputs, saved);
      break;
    case OXITRON_CUDNN:
      result = cudnn_backward(*inputs, saved, deterministic != 0);
      break;
    case OXITRON_EFFICIENT:
      result = efficient_backward(*inputs, saved, deterministic != 0);
      break;
    default:
      TORCH_CHECK(false, "no attention kernel ", kernel);
    }
    *dq = new at::Tensor(std::move(std::get<0>(result)));
    *dk = new at::Tensor(std::move(std::get<1>(result)));
    *dv = new at::Tensor(std::move(std::get<2>(result)));
  });
}
