//! Kernels for NVIDIA GPUs: from a `.cu` file to a launch.
//!
//! An op's file decides by where its tensors lie: `of` answers `None` for tensors on the CPU, and
//! a `Gpu` otherwise, on which the op launches kernels. Nothing of CUDA is linked: the driver,
//! the compiler (NVRTC) and libtorch's CUDA half are loaded when a device is first asked for
//! (`libraries`), so one binary serves machines with and without a GPU.
//!
//! * `source` holds the texts. They need no header of CUDA.
//! * `compiler` turns a text into code for one architecture and keeps that in a cache on disk.
//! * `grid` is the arithmetic of launch shapes, `arguments` what a kernel is called with.
//! * [`Stream`], [`Event`], [`DeviceMemory`], [`Numerics`] and [`HostWaits`] reach what libtorch
//!   has for GPUs and tch does not; [`upload`] and [`Download`] copy without waiting.
//! * [`Relay`] works on host memory a portion at a time, with copies beside the kernels;
//!   [`PageLock`] makes that memory fit for them.
//! * `device` launches, on libtorch's current stream: kernels and libtorch's own work run in the
//!   order in which they were issued, and no launch waits for one before it.
//! * `emulator` runs the same texts on the CPU, for tests: compiled as C++, each thread of a
//!   block a fiber. Under `emulated`, ops take CPU tensors down the very path that a GPU takes,
//!   argument lists, launch shapes and all.

mod arguments;
mod cache;
mod compiler;
mod device;
#[cfg(any(test, feature = "emulator"))]
mod emulator;
mod grid;
mod host;
mod libraries;
mod memory;
mod settings;
pub(crate) mod source;
mod stream;
mod transfer;

use tch::Tensor;

use crate::Error;
use crate::sys::operands::check_dtype;

pub(crate) use arguments::{Argument, Plain, Pointer, Pointers, aligned, arguments, float};
pub(crate) use device::Device;
pub use device::{DeviceInfo, devices};
#[cfg(any(test, feature = "emulator"))]
pub use emulator::{emulated, with_schedule};
pub(crate) use grid::{GROUP, Grid, whole_warps};
pub use host::{Download, upload};
pub use libraries::{Piece, has_driver, libtorch, pieces};
pub use memory::DeviceMemory;
pub(crate) use settings::is_deterministic;
pub use settings::{HostWaits, Numerics};
pub(crate) use source::Kernel;
pub use stream::{Event, Stream};
pub use transfer::{PageLock, Relay, Way};

/// Where kernels run.
#[derive(Clone, Debug)]
pub(crate) enum Gpu {
    /// On a device of this machine.
    Real(&'static Device),
    /// In the emulator, on CPU tensors.
    #[cfg(any(test, feature = "emulator"))]
    Emulated,
}

impl Gpu {
    /// The device of the tensors that its kernels work on.
    pub(crate) fn device(&self) -> tch::Device {
        match self {
            Gpu::Real(device) => tch::Device::Cuda(device.ordinal()),
            #[cfg(any(test, feature = "emulator"))]
            Gpu::Emulated => tch::Device::Cpu,
        }
    }

    /// Runs a kernel after everything that was issued before. An empty grid does nothing.
    ///
    /// The caller answers for the arguments: as many as the kernel takes, of the same types, and
    /// pointers to as many elements as the sizes among them say.
    ///
    /// # Safety
    /// As said.
    pub(crate) unsafe fn launch(
        &self,
        kernel: Kernel,
        grid: Grid,
        arguments: &[Argument],
    ) -> Result<(), Error> {
        if grid.is_empty() {
            return Ok(());
        }
        match self {
            // SAFETY: the caller's promise.
            Gpu::Real(device) => unsafe { device.launch(kernel, grid, arguments) },
            #[cfg(any(test, feature = "emulator"))]
            // SAFETY: the caller's promise.
            Gpu::Emulated => unsafe { emulator::launch(kernel, grid, arguments) },
        }
    }
}

/// The GPU that a tensor lies on, or `None` for one on the CPU.
///
/// # Errors
/// [`Error::Argument`] for an undefined tensor, [`Error::Cuda`] for one on a device that cannot be
/// used.
pub(crate) fn of(
    op: &'static str,
    name: &'static str,
    tensor: &Tensor,
) -> Result<Option<Gpu>, Error> {
    check_dtype(op, name, tensor)?;
    match tensor.device() {
        #[cfg(any(test, feature = "emulator"))]
        tch::Device::Cpu if emulator::is_on() => Ok(Some(Gpu::Emulated)),
        tch::Device::Cpu => Ok(None),
        tch::Device::Cuda(ordinal) => Ok(Some(Gpu::Real(Device::get(ordinal)?))),
        device => Err(Error::Cuda {
            call: op,
            message: format!("no kernels run on {device:?}"),
        }),
    }
}

/// Makes GPU number `ordinal` ready for ops: loads what it needs, compiles the kernels, and settles
/// numerics. Returns what it is.
///
/// # Errors
/// [`Error::Cuda`] with what is missing, and the remedy.
pub fn prepare(ordinal: usize, numerics: Numerics) -> Result<String, Error> {
    let device = Device::get(ordinal)?;
    numerics.set()?;
    Ok(device.to_string())
}

/// Makes GPU number `ordinal` the one that this thread's calls into other libraries of CUDA are for.
///
/// # Errors
/// [`Error::Cuda`] with what is missing.
pub fn bind(ordinal: usize) -> Result<(), Error> {
    Device::get(ordinal)?.bind()
}

/// Whether ops on tensors of `device` run the kernels of a GPU.
pub fn is_gpu(device: tch::Device) -> bool {
    match device {
        #[cfg(any(test, feature = "emulator"))]
        tch::Device::Cpu => emulator::is_on(),
        #[cfg(not(any(test, feature = "emulator")))]
        tch::Device::Cpu => false,
        _ => true,
    }
}
