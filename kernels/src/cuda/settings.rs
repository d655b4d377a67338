//! Settings of libtorch's CUDA half that a run makes once, and what it counts.

use std::ffi::c_char;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::Error;
use crate::shim::{outcome, text};

unsafe extern "C" {
    fn oxitron_numerics_set(deterministic: i32, tf32: i32, reduced: i32) -> *mut c_char;
    fn oxitron_host_waits_watch(on: i32) -> *mut c_char;
    fn oxitron_host_waits_count() -> u64;
}

/// How cuBLAS is told to use a workspace of fixed size; libtorch refuses deterministic products
/// without it, and reads it once.
const CUBLAS_WORKSPACE: &str = "CUBLAS_WORKSPACE_CONFIG";

/// Values that give the same bits each time, by cuBLAS' documentation.
const FIXED: [&str; 2] = [":4096:8", ":16:8"];

static DETERMINISTIC: AtomicBool = AtomicBool::new(false);

/// Which roundings and algorithms ops on GPUs may choose. Settings of the process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Numerics {
    /// Only what gives the same bits each time. Our own kernels always do; some of libtorch's do
    /// not.
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
    /// [`Error::Cuda`] where the environment does not let cuBLAS be deterministic; [`Error::Shim`].
    pub fn set(self) -> Result<(), Error> {
        if self.deterministic {
            check_workspace(std::env::var(CUBLAS_WORKSPACE).ok().as_deref())?;
        }
        let [deterministic, tf32, reduced] =
            [self.deterministic, self.tf32, self.reduced_sums].map(i32::from);
        // SAFETY: takes plain numbers.
        let message = unsafe { oxitron_numerics_set(deterministic, tf32, reduced) };
        outcome("globalContext", text(message))?;
        DETERMINISTIC.store(self.deterministic, Ordering::Relaxed);
        Ok(())
    }
}

fn check_workspace(value: Option<&str>) -> Result<(), Error> {
    if value.is_some_and(|value| FIXED.contains(&value)) {
        return Ok(());
    }
    Err(Error::Cuda {
        call: "cuda.numerics",
        message: format!(
            "products are deterministic only where the environment variable {CUBLAS_WORKSPACE} is \
             {} or {}, found {}; set it before the run starts",
            FIXED[0],
            FIXED[1],
            value.unwrap_or("nothing")
        ),
    })
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
    /// The count is this thread's own.
    _here: PhantomData<*const ()>,
}

impl HostWaits {
    /// Starts to count. Other threads print a warning for each wait of theirs meanwhile.
    ///
    /// # Errors
    /// [`Error::Shim`] without libtorch's CUDA half.
    pub fn watch() -> Result<Self, Error> {
        // SAFETY: takes a plain number.
        let message = unsafe { oxitron_host_waits_watch(1) };
        outcome("warning_state", text(message))?;
        // SAFETY: takes no arguments.
        let before = unsafe { oxitron_host_waits_count() };
        Ok(HostWaits {
            before,
            _here: PhantomData,
        })
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
        Numerics::default().set().unwrap();
        assert!(!is_deterministic());
    }

    #[test]
    fn deterministic_products_need_a_fixed_workspace() {
        assert!(check_workspace(Some(":4096:8")).is_ok());
        for bad in [None, Some(":0:0"), Some("")] {
            let error = check_workspace(bad).unwrap_err().to_string();
            assert!(
                error.contains("CUBLAS_WORKSPACE_CONFIG is :4096:8"),
                "{error}"
            );
        }
    }
}
