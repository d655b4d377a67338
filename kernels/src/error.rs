//! The one error type of the crate.

use tch::{Device, Kind, TchError};

/// Why an op refused its arguments or failed. Each message names the op and the tensor.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The op exists, but not for this dtype.
    #[error(
        "{op}: `{tensor}` is {dtype:?}, which there is no kernel for; use float32 or bfloat16 tensors"
    )]
    Unsupported {
        /// The op that was called.
        op: &'static str,
        /// The argument at fault.
        tensor: &'static str,
        /// Its dtype.
        dtype: Kind,
    },
    /// The arguments of a call lie on more than one device.
    #[error("{op}: `{tensor}` must be on {expected:?}, found {found:?}; move it there first")]
    Device {
        /// The op that was called.
        op: &'static str,
        /// The argument at fault.
        tensor: &'static str,
        /// Where the op runs.
        expected: Device,
        /// Where the tensor lies.
        found: Device,
    },
    /// A tensor has the wrong shape.
    #[error("{op}: `{tensor}` must have shape {expected:?}, found {found:?}")]
    Shape {
        /// The op that was called.
        op: &'static str,
        /// The argument at fault.
        tensor: &'static str,
        /// The shape that the other arguments ask for; -1 stands for any size.
        expected: Vec<i64>,
        /// The shape it has.
        found: Vec<i64>,
    },
    /// A tensor's dtype is not the one that the op or the other arguments ask for.
    #[error("{op}: `{tensor}` must be {expected:?}, found {found:?}; cast it first")]
    Dtype {
        /// The op that was called.
        op: &'static str,
        /// The argument at fault.
        tensor: &'static str,
        /// The dtype asked for.
        expected: Kind,
        /// The dtype it has.
        found: Kind,
    },
    /// A tensor's memory is not laid out as the kernel reads it.
    #[error(
        "{op}: `{tensor}` with shape {shape:?} and strides {strides:?} must be {expected}; \
         copy it with `contiguous()` or pass the buffer it is a view of"
    )]
    Layout {
        /// The op that was called.
        op: &'static str,
        /// The argument at fault.
        tensor: &'static str,
        /// The layout asked for, in words.
        expected: &'static str,
        /// Its shape.
        shape: Vec<i64>,
        /// Its strides, in elements.
        strides: Vec<i64>,
    },
    /// An output shares memory with another argument.
    #[error("{op}: `{first}` and `{second}` share memory, but one of them is written")]
    Overlap {
        /// The op that was called.
        op: &'static str,
        /// One of the two arguments.
        first: &'static str,
        /// The other.
        second: &'static str,
    },
    /// An element of an index tensor points outside.
    #[error("{op}: `{tensor}`[{at}] is {value}, but must be at least 0 and below {limit}")]
    Index {
        /// The op that was called.
        op: &'static str,
        /// The index tensor.
        tensor: &'static str,
        /// Flat position of the first bad element.
        at: usize,
        /// Its value.
        value: i64,
        /// The first value too large.
        limit: i64,
    },
    /// A plain argument (not a tensor) makes no sense.
    #[error("{op}: {message}")]
    Argument {
        /// The op that was called.
        op: &'static str,
        /// What was expected and what was found.
        message: String,
    },
    /// A call into libtorch failed.
    #[error("{op}: libtorch: {source}")]
    Torch {
        /// The op that was called.
        op: &'static str,
        /// libtorch's own message.
        #[source]
        source: TchError,
    },
    /// A kernel could not be built or launched on a GPU, or the GPU cannot be used.
    #[error("{call}: {message}")]
    Cuda {
        /// What was asked for.
        call: &'static str,
        /// What went wrong, and the remedy where one is known.
        message: String,
    },
    /// A call through the C++ shim failed.
    #[error("{call} failed: {message}")]
    Shim {
        /// The C++ function.
        call: &'static str,
        /// Its exception's text.
        message: String,
    },
}

/// Names the op in an error of libtorch.
pub(crate) fn torch(op: &'static str) -> impl Fn(TchError) -> Error + Copy {
    move |source| Error::Torch { op, source }
}
