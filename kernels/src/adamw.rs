//! AdamW (Loshchilov & Hutter 2019) on flat slices: fp32 master weights, moments in fp32 or bf16.
//!
//! The arithmetic follows `torch.optim.AdamW` (single-tensor, not capturable) operation by
//! operation, each rounded to fp32; scalars are prepared in fp64 and rounded once. That keeps a
//! run in fp32 within rounding of the same run under PyTorch.
//!
//! Moments in bf16 are widened, computed with in fp32, and rounded to nearest even when they are
//! stored; the weight is updated with what they were before that rounding. A moment whose decay is
//! slower than a bf16 step (2⁻⁸) would round back to what it was, so such betas are not for bf16;
//! the configuration refuses them.

use tch::Tensor;

use crate::decision::Decision;
use crate::float::{Float, with_float};
use crate::simd::simd;
use crate::sys::operands::{Operands, sizes};
use crate::sys::parallel::parallel_split;
use crate::sys::split::Rows;
use crate::{Error, cuda};

mod on_gpu;

const OP: &str = "adamw.step";

/// Elements of one block: the five streams of a block stay within a second-level cache.
const GRAIN: usize = 8192;

/// Hyper-parameters of one step over one range of parameters.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay; 0 for norms and biases.
    pub weight_decay: f64,
}

/// The state of one flat range of parameters, all `[n]`.
pub struct State<'a> {
    /// The weights in full precision, fp32 (updated).
    pub master: &'a mut Tensor,
    /// First moment, fp32 or bf16 (updated).
    pub exp_avg: &'a mut Tensor,
    /// Second moment, of the same dtype (updated).
    pub exp_avg_sq: &'a mut Tensor,
}

/// Scalars of a step, rounded to fp32 where PyTorch rounds them.
#[derive(Clone, Copy)]
struct Scalars {
    decay: f32,
    grad_scale: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    root_correction2: f32,
    eps: f32,
    minus_step_size: f32,
}

/// One step: `grad: [n]` fp32 is read, `state` updated, and the new weights are also written to
/// `weight_out: [n]` (fp32 or bf16, rounded to nearest even) where given. The gradient's factor and
/// Adam's time are those of the `decision`; where that is to skip the step, nothing is written.
/// Elementwise: same bits on any number of threads and any split of the range.
///
/// # Errors
/// The argument errors of [`Error`].
pub fn step(
    adamw: &AdamW,
    state: State<'_>,
    grad: &Tensor,
    weight_out: Option<&mut Tensor>,
    decision: &Decision,
) -> Result<(), Error> {
    let [n] = sizes(OP, "master", state.master)?;
    if let Some(gpu) = cuda::of(OP, "master", state.master)? {
        return on_gpu::step(&gpu, n, adamw, state, grad, weight_out, decision);
    }
    let decision = decision.state(OP)?;
    if decision.update == 0 {
        return Ok(());
    }
    let scalars = Scalars {
        decay: (1.0 - adamw.lr * adamw.weight_decay) as f32,
        grad_scale: decision.gradient_scale as f32,
        one_minus_beta1: (1.0 - adamw.beta1) as f32,
        beta2: adamw.beta2 as f32,
        one_minus_beta2: (1.0 - adamw.beta2) as f32,
        root_correction2: decision.correction2.sqrt() as f32,
        eps: adamw.eps as f32,
        minus_step_size: -(adamw.lr / decision.correction1) as f32,
    };
    with_float!(OP, "exp_avg", state.exp_avg => M: {
        match weight_out {
            None => run::<M, f32>(n, scalars, state, grad, None),
            Some(out) => with_float!(OP, "weight_out", out => T: {
                run::<M, T>(n, scalars, state, grad, Some(out))
            }),
        }
    })
}

fn run<M: Float, T: Float>(
    n: usize,
    scalars: Scalars,
    state: State<'_>,
    grad: &Tensor,
    weight_out: Option<&mut Tensor>,
) -> Result<(), Error> {
    let mut operands = Operands::new(OP);
    let grad = operands.read::<f32>("grad", grad, &[n])?;
    let master = Rows::new(operands.write::<f32>("master", state.master, &[n])?, GRAIN);
    let m = Rows::new(operands.write::<M>("exp_avg", state.exp_avg, &[n])?, GRAIN);
    let v = Rows::new(
        operands.write::<M>("exp_avg_sq", state.exp_avg_sq, &[n])?,
        GRAIN,
    );
    let out = weight_out
        .map(|out| {
            operands
                .write::<T>("weight_out", out, &[n])
                .map(|out| Rows::new(out, GRAIN))
        })
        .transpose()?;
    parallel_split(
        n.div_ceil(GRAIN),
        1,
        (master, m, v, out),
        |range, (w, m, v, out)| {
            let grad = &grad[range.start * GRAIN..][..w.len()];
            match out {
                Some(out) => update(scalars, grad, w, m, v, out),
                None => update::<M, T>(scalars, grad, w, m, v, &mut []),
            }
        },
    );
    Ok(())
}

simd! {
fn update<M: Float, T: Float>(
    s: Scalars, grad: &[f32], w: &mut [f32], m: &mut [M], v: &mut [M], out: &mut [T],
) {
    let n = grad.len();
    let (w, m, v) = (&mut w[..n], &mut m[..n], &mut v[..n]);
    for i in 0..n {
        let g = grad[i] * s.grad_scale;
        let decayed = w[i] * s.decay;
        let (m_before, v_before) = (m[i].to_f32(), v[i].to_f32());
        let first = m_before + s.one_minus_beta1 * (g - m_before);
        let second = v_before * s.beta2 + s.one_minus_beta2 * g * g;
        let denominator = second.sqrt() / s.root_correction2 + s.eps;
        m[i] = M::from_f32(first);
        v[i] = M::from_f32(second);
        w[i] = decayed + s.minus_step_size * first / denominator;
    }
    for (out, w) in out.iter_mut().zip(w) {
        *out = T::from_f32(*w);
    }
}
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::testing::*;
    use tch::Kind;

    const N: i64 = 20_011;

    const SCALE: f64 = 0.37;
    const HYPER: AdamW = AdamW {
        lr: 3e-3,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
    };

    /// As [`super::step`], in Adam's step number `time`.
    fn step(
        time: u64,
        state: State<'_>,
        grad: &Tensor,
        weight_out: Option<&mut Tensor>,
    ) -> Result<(), Error> {
        let betas = [HYPER.beta1, HYPER.beta2];
        let decision = Decision::updating(SCALE, time, betas, device());
        super::step(&HYPER, state, grad, weight_out, &decision)
    }

    /// `torch.optim.AdamW` op by op, in the dtype of its arguments.
    fn torch_step(time: u64, w: &mut Tensor, m: &mut Tensor, v: &mut Tensor, grad: &Tensor) {
        let (a, g) = (HYPER, grad * SCALE);
        let _ = w.g_mul_scalar_(1.0 - a.lr * a.weight_decay);
        let _ = m.lerp_(&g, 1.0 - a.beta1);
        let _ = v.g_mul_scalar_(a.beta2);
        *v += &g * &g * (1.0 - a.beta2);
        let correction = |beta: f64| 1.0 - beta.powi(time as i32);
        let denominator = v.sqrt() / correction(a.beta2).sqrt() + a.eps;
        *w -= &*m / denominator * (a.lr / correction(a.beta1));
    }

    #[test]
    fn follows_torch_everywhere() {
        everywhere(follows_torch_in_fp32_and_fp64_for_twenty_steps);
    }

    fn follows_torch_in_fp32_and_fp64_for_twenty_steps() {
        let start = normal("w", &[N], Kind::Float);
        let zero = || zeros(&[N], Kind::Float);
        let (mut w, mut m, mut v) = (start.copy(), zero(), zero());
        let (mut w32, mut m32, mut v32) = (start.copy(), zero(), zero());
        let wide = |x: Tensor| x.to_kind(Kind::Double);
        let (mut w64, mut m64, mut v64) = (wide(start.copy()), wide(zero()), wide(zero()));
        for step_number in 1..=20 {
            let grad = normal(&format!("grad {step_number}"), &[N], Kind::Float);
            let state = State {
                master: &mut w,
                exp_avg: &mut m,
                exp_avg_sq: &mut v,
            };
            step(step_number, state, &grad, None).unwrap();
            torch_step(step_number, &mut w32, &mut m32, &mut v32, &grad);
            torch_step(
                step_number,
                &mut w64,
                &mut m64,
                &mut v64,
                &wide(grad.copy()),
            );
        }
        for (name, own, fp32, fp64) in [
            ("w", &w, &w32, &w64),
            ("m", &m, &m32, &m64),
            ("v", &v, &v32, &v64),
        ] {
            assert_close(name, own, fp32, 1e-7);
            assert_close(name, own, fp64, 1e-6);
        }
        assert!(relative(&w, &start) > 1e-2, "the weights must have moved");
    }

    #[test]
    fn writes_the_rounded_weight_in_the_same_pass() {
        everywhere(writes_the_rounded_weight);
    }

    fn writes_the_rounded_weight() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let mut w = normal("w", &[N], Kind::Float);
            let (mut m, mut v) = (zeros(&[N], Kind::Float), zeros(&[N], Kind::Float));
            let mut out = poison(&[N], kind);
            let state = State {
                master: &mut w,
                exp_avg: &mut m,
                exp_avg_sq: &mut v,
            };
            let grad = normal("g", &[N], Kind::Float);
            step(1, state, &grad, Some(&mut out)).unwrap();
            assert_eq!(bits(&out), bits(&w.to_kind(kind)));
        }
    }

    /// The same step with moments in fp32, and rounded afterwards; and against PyTorch's arithmetic
    /// with moments that are rounded after every step.
    #[test]
    fn moments_in_bf16_are_rounded_when_stored() {
        everywhere(moments_in_bf16_are_those_in_fp32_rounded_when_stored);
    }

    fn moments_in_bf16_are_those_in_fp32_rounded_when_stored() {
        let narrow = |x: &Tensor| x.to_kind(Kind::BFloat16);
        let wide = |x: &Tensor| x.to_kind(Kind::Float);
        let start = normal("w", &[N], Kind::Float);
        let zero = || zeros(&[N], Kind::BFloat16);
        let (mut w, mut m, mut v) = (start.copy(), zero(), zero());
        let (mut w_torch, mut m_torch, mut v_torch) = (start.copy(), zero(), zero());
        for step_number in 1..=20 {
            let grad = normal(&format!("grad {step_number}"), &[N], Kind::Float);
            let (mut w32, mut m32, mut v32) = (w.copy(), wide(&m), wide(&v));
            let state = State {
                master: &mut w32,
                exp_avg: &mut m32,
                exp_avg_sq: &mut v32,
            };
            step(step_number, state, &grad, None).unwrap();
            let state = State {
                master: &mut w,
                exp_avg: &mut m,
                exp_avg_sq: &mut v,
            };
            let mut out = poison(&[N], Kind::BFloat16);
            step(step_number, state, &grad, Some(&mut out)).unwrap();
            assert!(bits(&w) == bits(&w32), "step {step_number}");
            assert!(bits(&m) == bits(&narrow(&m32)), "step {step_number}");
            assert!(bits(&v) == bits(&narrow(&v32)), "step {step_number}");
            assert!(bits(&out) == bits(&narrow(&w)), "step {step_number}");

            let (mut m32, mut v32) = (wide(&m_torch), wide(&v_torch));
            torch_step(step_number, &mut w_torch, &mut m32, &mut v32, &grad);
            (m_torch, v_torch) = (narrow(&m32), narrow(&v32));
        }
        // Where the two differ in the last bit of fp32, one may round up and the other down.
        assert_close("w", &w, &w_torch, 1e-6);
        assert_close("m", &m, &m_torch, 1e-4);
        assert_close("v", &v, &v_torch, 1e-4);
        assert!(relative(&w, &start) > 1e-2, "the weights must have moved");
    }

    #[test]
    fn any_split_number_of_threads_and_level_give_the_same_bits() {
        any_split(Kind::Float);
        any_split(Kind::BFloat16);
    }

    fn any_split(moments: Kind) {
        let whole = run(&[0, N], moments);
        let cut = move || run(&[0, 1, 64, 9000, 9001, N], moments);
        assert_level_independent(move || run(&[0, N], moments));
        assert!(whole == cut());
        // Kernels of GPUs round where the CPU does.
        assert_order_independent(cut);
        on_gpu(|| assert!(whole == run(&[0, N], moments) && whole == cut()));
    }

    fn run(cuts: &[i64], moments: Kind) -> Vec<u32> {
        let w = normal("w", &[N], Kind::Float);
        let (m, v) = (zeros(&[N], moments), zeros(&[N], moments));
        let grad = normal("g", &[N], Kind::Float);
        for time in 1..=3 {
            for pair in cuts.windows(2) {
                let part = |x: &Tensor| x.narrow(0, pair[0], pair[1] - pair[0]);
                let state = State {
                    master: &mut part(&w),
                    exp_avg: &mut part(&m),
                    exp_avg_sq: &mut part(&v),
                };
                step(time, state, &part(&grad), None).unwrap();
            }
        }
        [bits(&w), bits(&m), bits(&v)].concat()
    }

    #[test]
    fn a_step_that_is_skipped_writes_nothing() {
        everywhere(|| {
            let (mut w, mut m, mut v) = (
                normal("w", &[N], Kind::Float),
                normal("m", &[N], Kind::Float),
                normal("v", &[N], Kind::Float),
            );
            let mut out = normal("out", &[N], Kind::BFloat16);
            let all = |tensors: [&Tensor; 4]| tensors.map(bits);
            let before = all([&w, &m, &v, &out]);
            let state = State {
                master: &mut w,
                exp_avg: &mut m,
                exp_avg_sq: &mut v,
            };
            let skip = Decision::new(5, device()).unwrap();
            let grad = poison(&[N], Kind::Float);
            super::step(&HYPER, state, &grad, Some(&mut out), &skip).unwrap();
            assert!(all([&w, &m, &v, &out]) == before);
        });
    }

    #[test]
    fn other_lengths_and_dtypes_are_refused_everywhere() {
        everywhere(other_lengths_and_dtypes_are_refused);
    }

    fn other_lengths_and_dtypes_are_refused() {
        let zero = || zeros(&[4], Kind::Float);
        let (mut w, mut m, mut v) = (zero(), zero(), zero());
        let state = State {
            master: &mut w,
            exp_avg: &mut m,
            exp_avg_sq: &mut v,
        };
        let error = step(1, state, &zeros(&[5], Kind::Float), None).unwrap_err();
        assert!(
            matches!(error, Error::Shape { tensor: "grad", .. }),
            "{error}"
        );
        let state = State {
            master: &mut w,
            exp_avg: &mut zeros(&[4], Kind::BFloat16),
            exp_avg_sq: &mut v,
        };
        let error = step(1, state, &zero(), None).unwrap_err().to_string();
        assert!(error.contains("exp_avg_sq"), "{error}");
    }
}
