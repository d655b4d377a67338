//! The C face of the C++ shim (`shim/shim.h`): what libtorch offers only to C++.
//!
//! Shapes, dtypes and limits stand in the header. Every call answers nothing on success and
//! otherwise a message; a tensor that is handed out is a new handle.

use std::ffi::{CStr, c_char};

use tch::Tensor;
use torch_sys::C_tensor;

use crate::Error;

/// Which of libtorch's kernels computes attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub(crate) enum AttentionKernel {
    /// Flash attention 2: bf16, head size a multiple of 8 up to 256, dense or packed.
    Flash = 0,
    /// cuDNN's: bf16, head size a multiple of 8 up to 128, dense, more than one key; its backward
    /// pass cannot be made deterministic.
    Cudnn = 1,
    /// Memory-efficient ones: fp32 and bf16, any head size, dense or packed.
    Efficient = 2,
}

impl AttentionKernel {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Flash => "flash",
            Self::Cudnn => "cudnn",
            Self::Efficient => "efficient",
        }
    }
}

/// What attention reads, and how.
#[derive(Clone, Copy)]
pub(crate) struct Attention<'a> {
    /// Queries `[batch, seq, heads, d]`, packed `[rows, heads, d]`.
    pub(crate) q: &'a Tensor,
    /// Keys, with a number of heads that divides the queries'.
    pub(crate) k: &'a Tensor,
    /// Values, as the keys.
    pub(crate) v: &'a Tensor,
    /// Where documents begin and the last one ends, int32 on the device, and the longest of them;
    /// `None` for dense tensors.
    pub(crate) starts: Option<(&'a Tensor, usize)>,
    /// Factor of the scores.
    pub(crate) scale: f64,
}

/// The struct of the header.
#[repr(C)]
struct RawAttention {
    q: *const C_tensor,
    k: *const C_tensor,
    v: *const C_tensor,
    starts_q: *const C_tensor,
    starts_k: *const C_tensor,
    longest_q: i64,
    longest_k: i64,
    scale: f64,
    causal: i32,
}

unsafe extern "C" {
    fn oxitron_product(
        out: *mut C_tensor,
        a: *const C_tensor,
        b: *const C_tensor,
        beta: f64,
        alpha: f64,
    ) -> *mut c_char;
    fn oxitron_attention_forward(
        kernel: i32,
        inputs: *const RawAttention,
        out: *mut *mut C_tensor,
        lse: *mut *mut C_tensor,
    ) -> *mut c_char;
    fn oxitron_attention_backward(
        kernel: i32,
        inputs: *const RawAttention,
        out: *const C_tensor,
        lse: *const C_tensor,
        dout: *const C_tensor,
        deterministic: i32,
        dq: *mut *mut C_tensor,
        dk: *mut *mut C_tensor,
        dv: *mut *mut C_tensor,
    ) -> *mut c_char;
}

/// What a call answered: nothing on success, otherwise a message that malloc has allocated.
pub(crate) fn text(message: *mut c_char) -> Option<String> {
    if message.is_null() {
        return None;
    }
    // SAFETY: the shim returns a nul-terminated text that is ours.
    let text = unsafe { CStr::from_ptr(message) };
    let text = text.to_string_lossy().into_owned();
    // SAFETY: the text came from malloc and is not used any more.
    unsafe { libc::free(message.cast()) };
    Some(text)
}

/// The same as a result; `call` names the op, or the C++ function.
pub(crate) fn outcome(call: &'static str, answer: Option<String>) -> Result<(), Error> {
    answer.map_or(Ok(()), |message| Err(Error::Shim { call, message }))
}

/// `out = beta·out + a·b`, where `out` may be fp32 and the factors bf16.
pub(crate) fn product(
    op: &'static str,
    out: &mut Tensor,
    a: &Tensor,
    b: &Tensor,
    beta: f64,
) -> Result<(), Error> {
    // SAFETY: three tensors that live through the call; `out` is borrowed uniquely.
    let message = unsafe { oxitron_product(out.as_mut_ptr(), a.as_ptr(), b.as_ptr(), beta, 1.0) };
    outcome(op, text(message))
}

impl Attention<'_> {
    fn raw(&self) -> RawAttention {
        let none = (std::ptr::null(), 0);
        let starts = self
            .starts
            .map(|(starts, longest)| (starts.as_ptr(), longest as i64));
        let (starts, longest) = starts.unwrap_or(none);
        RawAttention {
            q: self.q.as_ptr(),
            k: self.k.as_ptr(),
            v: self.v.as_ptr(),
            starts_q: starts,
            starts_k: starts,
            longest_q: longest,
            longest_k: longest,
            scale: self.scale,
            causal: 1,
        }
    }

    /// Causal attention for `op`: the output, and the logarithms of the row sums in the kernel's
    /// own layout.
    pub(crate) fn forward(
        &self,
        op: &'static str,
        kernel: AttentionKernel,
    ) -> Result<(Tensor, Tensor), Error> {
        let mut handles = [std::ptr::null_mut(); 2];
        let [out, lse] = &mut handles;
        // SAFETY: the tensors live through the call, and it writes two handles or none.
        let message = unsafe { oxitron_attention_forward(kernel as i32, &self.raw(), out, lse) };
        outcome(op, text(message))?;
        // SAFETY: on success both are new handles.
        let [out, lse] = handles.map(|handle| unsafe { Tensor::from_ptr(handle) });
        Ok((out, lse))
    }

    /// Gradients of the queries, keys and values, from what [`Attention::forward`] of the same
    /// kernel made.
    pub(crate) fn backward(
        &self,
        op: &'static str,
        kernel: AttentionKernel,
        [out, lse, dout]: [&Tensor; 3],
        deterministic: bool,
    ) -> Result<[Tensor; 3], Error> {
        let mut handles = [std::ptr::null_mut(); 3];
        let [dq, dk, dv] = &mut handles;
        // SAFETY: the tensors live through the call, and it writes three handles or none.
        let message = unsafe {
            oxitron_attention_backward(
                kernel as i32,
                &self.raw(),
                out.as_ptr(),
                lse.as_ptr(),
                dout.as_ptr(),
                i32::from(deterministic),
                dq,
                dk,
                dv,
            )
        };
        outcome(op, text(message))?;
        // SAFETY: on success all are new handles.
        Ok(handles.map(|handle| unsafe { Tensor::from_ptr(handle) }))
    }
}
