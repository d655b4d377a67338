//! Memory of a GPU as libtorch's caching allocator sees it.

use std::ffi::c_char;

use crate::Error;
use crate::shim::{outcome, text};

unsafe extern "C" {
    fn oxitron_device_memory_read(device: i32, memory: *mut DeviceMemory) -> *mut c_char;
    fn oxitron_device_memory_reset_peak(device: i32) -> *mut c_char;
    fn oxitron_device_memory_release() -> *mut c_char;
    fn oxitron_device_memory_total(device: i32, left: *mut u64, total: *mut u64) -> *mut c_char;
}

/// What the allocator did on one GPU. Peaks count from the last [`DeviceMemory::reset_peak`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct DeviceMemory {
    /// Bytes of tensors alive, as the allocator rounded them up.
    pub allocated: u64,
    /// Most of them at once.
    pub allocated_peak: u64,
    /// Bytes taken from the driver, in use or kept for later.
    pub reserved: u64,
    /// Most of them at once.
    pub reserved_peak: u64,
    /// Blocks handed out so far.
    pub allocations: u64,
    /// Calls to the driver for memory so far: a steady loop makes none.
    pub driver_allocations: u64,
    /// Times that the cache had to be emptied to satisfy a request.
    pub retries: u64,
    /// Times that even this failed.
    pub failures: u64,
}

impl DeviceMemory {
    /// The figures of GPU number `device`.
    ///
    /// # Errors
    /// [`Error::Shim`] where there is no such GPU.
    pub fn read(device: usize) -> Result<Self, Error> {
        let mut memory = DeviceMemory::default();
        // SAFETY: the struct is that of the shim and outlives the call.
        let message = unsafe { oxitron_device_memory_read(device as i32, &mut memory) };
        outcome("getDeviceStats", text(message)).map(|()| memory)
    }

    /// Lets both peaks start again from what is held now.
    ///
    /// # Errors
    /// [`Error::Shim`] where there is no such GPU.
    pub fn reset_peak(device: usize) -> Result<(), Error> {
        // SAFETY: takes a plain number.
        let message = unsafe { oxitron_device_memory_reset_peak(device as i32) };
        outcome("resetPeakStats", text(message))
    }

    /// Gives what no tensor uses back to the driver, on every GPU; waits for their work.
    ///
    /// # Errors
    /// [`Error::Shim`] without libtorch's CUDA half.
    pub fn release() -> Result<(), Error> {
        // SAFETY: takes no arguments.
        outcome(
            "emptyCache",
            text(unsafe { oxitron_device_memory_release() }),
        )
    }

    /// Bytes that the driver has left for all processes together, and bytes that the GPU has.
    ///
    /// # Errors
    /// [`Error::Shim`] where there is no such GPU.
    pub fn left_and_total(device: usize) -> Result<(u64, u64), Error> {
        let (mut left, mut total) = (0, 0);
        // SAFETY: both numbers outlive the call.
        let message = unsafe { oxitron_device_memory_total(device as i32, &mut left, &mut total) };
        outcome("getMemoryInfo", text(message)).map(|()| (left, total))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::cuda::devices;
    use tch::{Device, Kind, Tensor};

    #[test]
    fn a_tensor_is_counted_or_there_is_no_gpu() {
        if !devices().is_ok_and(|devices| !devices.is_empty()) {
            let error = DeviceMemory::read(0).unwrap_err();
            println!("skipped: this machine has no GPU: {error}");
            return;
        }
        let before = DeviceMemory::read(0).unwrap();
        let x = Tensor::zeros([1 << 20], (Kind::Float, Device::Cuda(0)));
        let after = DeviceMemory::read(0).unwrap();
        assert_eq!(after.allocated - before.allocated, 4 << 20);
        drop(x);
        DeviceMemory::reset_peak(0).unwrap();
        let now = DeviceMemory::read(0).unwrap();
        assert_eq!(now.allocated_peak, now.allocated);
        DeviceMemory::release().unwrap();
        let (left, total) = DeviceMemory::left_and_total(0).unwrap();
        assert!(left <= total);
    }
}
