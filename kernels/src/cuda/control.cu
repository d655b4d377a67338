// The step's verdict from the sums of all ranks, taken on the device (see `control.rs` of the
// trainer for what is agreed upon, and `spikes.rs` for where limits come from).
//
// Every operation is one of IEEE fp64 with its own rounding, in the order of the CPU's: the same
// sums give the same bits on either.

#include "decision.cuh"

DEVICE bool is_finite(f64 x) { return fabs(x) <= 1.7976931348623157e308; }

// 1 - beta^steps. The power is taken by squaring, with the very products of Rust's `powi`: so a run
// that changes devices goes on with the same corrections, where a library's `pow` would differ in
// the last bit, which 1 - beta^1 magnifies by 1 / (1 - beta).
DEVICE f64 correction(f64 beta, i64 steps) {
  const i64 most = 0x7fffffff;
  u32 left = static_cast<u32>(steps < most ? steps : most);
  f64 power = 1.0;
  while (true) {
    if (left & 1u) {
      power = __dmul_rn(power, beta);
    }
    left >>= 1;
    if (left == 0) {
      break;
    }
    beta = __dmul_rn(beta, beta);
  }
  return __dsub_rn(1.0, power);
}

// The number of targets that a sum of such numbers stands for: at least 0.
DEVICE f64 count(f64 sum) { return sum >= 1.0 ? floor(sum) : 0.0; }

// Grid: one block. Block: one thread. `sums`: loss, targets, and squares of the gradient of the
// summed loss. A limit that is infinite watches nothing; `clip_norm` 0 clips nothing. `record`, 8
// numbers for the host to read a step later: mean loss, gradient norm, gradient scale, cause,
// Adam's time, targets, summed loss, 0. A step without update leaves Adam's time and the
// corrections as they were.
KERNEL(decide)
(const f64 *sums, f64 clip_norm, f64 loss_limit, f64 norm_limit, f64 beta1, f64 beta2, f64 *record,
 Decision *decision) {
  const f64 loss = sums[0], targets = count(sums[1]);
  const f64 mean = targets > 0.0 ? loss / targets : 0.0;
  const f64 norm = sqrt(sums[2]) / fmax(targets, 1.0);
  Cause cause = UPDATE;
  if (targets == 0.0) {
    cause = NO_TARGET;
  } else if (!is_finite(loss)) {
    cause = LOSS_NOT_FINITE;
  } else if (!is_finite(norm)) {
    cause = NORM_NOT_FINITE;
  } else if (mean > loss_limit) {
    cause = LOSS_ABOVE_LIMIT;
  } else if (norm > norm_limit) {
    cause = NORM_ABOVE_LIMIT;
  }
  f64 scale = 0.0;
  i64 steps = decision->adam_steps;
  if (cause == UPDATE) {
    // The small constant is that of torch.nn.utils.clip_grad_norm_, kept for parity.
    const f64 clip = clip_norm > 0.0 ? fmin(clip_norm / (norm + 1e-6), 1.0) : 1.0;
    scale = clip / targets;
    steps += 1;
    decision->correction1 = correction(beta1, steps);
    decision->correction2 = correction(beta2, steps);
  }
  decision->gradient_scale = scale;
  decision->adam_steps = steps;
  decision->update = cause == UPDATE;
  decision->cause = cause;
  record[0] = mean;
  record[1] = norm;
  record[2] = scale;
  record[3] = cause;
  record[4] = static_cast<f64>(steps);
  record[5] = targets;
  record[6] = loss;
  record[7] = 0.0;
}
EXPORT(decide)
