//! Bytes that libtorch's CPU tensors occupy, now and at their peak; huge pages for the large ones.
//!
//! libtorch keeps such statistics for CUDA only, so the shim puts a counting allocator in front of
//! its own. The counts belong to the whole process: ranks that are threads of one process share
//! them. Blocks allocated before [`install`] are never counted, and Rust's own heap is not either.

use std::sync::OnceLock;

use libc::c_char;

use crate::{Error, shim};

/// What the counting allocator has seen since it was installed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryStats {
    /// Bytes alive now, as malloc rounded them up.
    pub current_bytes: u64,
    /// Most bytes alive at once since the start or the last [`reset_peak`].
    pub peak_bytes: u64,
    /// Blocks handed out so far.
    pub allocations: u64,
}

unsafe extern "C" {
    fn oxitron_memory_install() -> *mut c_char;
    fn oxitron_memory_read(current: *mut u64, peak: *mut u64, allocations: *mut u64);
    fn oxitron_memory_reset_peak();
}

/// Counts every CPU allocation of libtorch from now on, and asks the system to put large blocks
/// (4 MiB and more) into huge pages. Further calls do nothing.
///
/// Call it before the first tensor is made: libtorch's allocator table is not guarded against a
/// change while another thread allocates.
///
/// # Errors
/// [`Error::Shim`] with libtorch's own text if it refuses the allocator.
pub fn install() -> Result<(), Error> {
    static REFUSED: OnceLock<Option<String>> = OnceLock::new();
    // SAFETY: takes no arguments.
    let refused = REFUSED.get_or_init(|| shim::text(unsafe { oxitron_memory_install() }));
    shim::outcome("c10::SetCPUAllocator", refused.clone())
}

/// The counts; all zero before [`install`].
pub fn stats() -> MemoryStats {
    let mut stats = MemoryStats::default();
    // SAFETY: the three pointers are valid for the duration of the call.
    unsafe {
        oxitron_memory_read(
            &raw mut stats.current_bytes,
            &raw mut stats.peak_bytes,
            &raw mut stats.allocations,
        );
    }
    stats
}

/// Lets the peak start again from what is alive now.
pub fn reset_peak() {
    // SAFETY: touches only the shim's own atomic counters.
    unsafe { oxitron_memory_reset_peak() }
}
