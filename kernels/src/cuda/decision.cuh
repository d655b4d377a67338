// What a step decided on the device, and what the optimizer needs of it.
//
// It stays in device memory from step to step: `decide` (control.cu) brings it up to date and
// `adamw` reads it, so that no step waits for the host to learn whether it may update.
#pragma once

#include "common.cuh"

// Why a step updates, or does not. The first that holds is named.
enum Cause : i32 {
  // It updates.
  UPDATE = 0,
  // The batch has no target token.
  NO_TARGET = 1,
  // The loss is infinite or NaN.
  LOSS_NOT_FINITE = 2,
  // The gradient norm is infinite or NaN.
  NORM_NOT_FINITE = 3,
  // The mean loss stands out of the steps before.
  LOSS_ABOVE_LIMIT = 4,
  // The gradient norm stands out of the steps before.
  NORM_ABOVE_LIMIT = 5,
};

struct Decision {
  // The gradient is multiplied by this: clip factor over the number of targets. 0 without an
  // update.
  f64 gradient_scale;
  // 1 - beta^adam_steps for the first and the second moment, as of the last update.
  f64 correction1;
  f64 correction2;
  // Updates so far, this step's included: Adam's time.
  i64 adam_steps;
  // Whether this step updates.
  i32 update;
  // A `Cause`.
  i32 cause;
};
