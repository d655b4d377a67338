//! Settings of libtorch's CUDA half that a run makes once, and what it counts.

use std::ffi::c_char;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::Error;
use crate::shim::{outcome, text};

unsafe extern "C" {
    fn oxitron_numerics_set(deterministic: i32, tf32: i32, reduced: i32) -> *mut c_char;
    fn oxitron_host_waits_watch(on: i32) -> *mut c_char;
    fn oxitron_host_waits_count() -> u64;
}

static DETERMINISTIC: AtomicBool = AtomicBool::new(false);

/// Which roundings and algorithms ops on GPUs may choose. Settings of the process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Numerics {
    /// Only what gives the same bits each time. Our own kernels always do; some of libtorch's do not.
    pub deterministic: bool,
    /// Products of fp32 may round their factors to TF32.
    pub tf32: bool,
    /// Products of bf16 may add partial sums up in bf16.
    pub reduced_sums: bool,
}

impl Numerics {
    /// Makes these the settings.
    ///
    /// # Errors
    /// [`Error::Shim`].
    pub fn set(self) -> Result<(), Error> {
        let [deterministic, tf32, reduced] =
            [self.deterministic, self.tf32, self.reduced_sums].map(i32::from);
        // SAFETY: takes plain numbers.
        let message = unsafe { oxitron_numerics_set(deterministic, tf32, reduced) };
        outcome("globalContext", text(message))?;
        DETERMINISTIC.store(self.deterministic, Ordering::Relaxed);
        Ok(())
    }
}

/// Whether only what gives the same bits each time may be chosen.
pub(crate) fn is_deterministic() -> bool {
    DETERMINISTIC.load(Ordering::Relaxed)
}

/// Counts the times that libtorch blocks this thread until a GPU is done, while it lives: reading a
/// scalar, copying to plain memory, waiting for a stream. A steady step has none.
#[derive(Debug)]
pub struct HostWaits {
    before: u64,
}

impl HostWaits {
    /// Starts to count. Other threads print a warning for each wait of theirs meanwhile.
    ///
    /// # Errors
    /// [`Error::Shim`] without libtorch's CUDA half.
    pub fn watch() -> Result<Self, Error> {
        // SAFETY: takes a plain number.
        outcome(
            "warning_state",
            text(unsafe { oxitron_host_waits_watch(1) }),
        )?;
        // SAFETY: takes no arguments.
        let before = unsafe { oxitron_host_waits_count() };
        Ok(HostWaits { before })
    }

    /// The count so far.
    pub fn count(&self) -> u64 {
        // SAFETY: takes no arguments.
        unsafe { oxitron_host_waits_count() - self.before }
    }
}

impl Drop for HostWaits {
    fn drop(&mut self) {
        // SAFETY: takes a plain number. What it cannot switch off was never on.
        let _ = text(unsafe { oxitron_host_waits_watch(0) });
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::cuda::devices;
    use tch::{Device, Kind, Tensor};

    #[test]
    fn reading_a_scalar_is_a_wait_and_adding_is_none() {
        if !devices().is_ok_and(|devices| !devices.is_empty()) {
            println!("skipped: this machine has no GPU");
            return;
        }
        let x = Tensor::ones([100], (Kind::Float, Device::Cuda(0)));
        let waits = HostWaits::watch().unwrap();
        let sum = (&x + &x).sum(Kind::Float);
        assert_eq!(waits.count(), 0);
        assert_eq!(sum.double_value(&[]), 200.0);
        assert_eq!(waits.count(), 1);
    }

    #[test]
    fn settings_are_taken_without_a_gpu_too() {
        let strict = Numerics {
            deterministic: true,
            ..Numerics::default()
        };
        strict.set().unwrap();
        assert!(is_deterministic());
        Numerics::default().set().unwrap();
        assert!(!is_deterministic());
    }
}
