//! Sizes of the caches, from which kernels choose their blocks.

/// Bytes of the caches that one core has for itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caches {
    /// Nearest data cache.
    pub l1: usize,
    /// The next one.
    pub l2: usize,
}

impl Caches {
    /// What the system tells, or 32 KiB and 1 MiB (AMD's Zen 4) where it does not.
    pub fn of_this_machine() -> Caches {
        use std::sync::OnceLock;
        static CACHES: OnceLock<Caches> = OnceLock::new();
        *CACHES.get_or_init(system_says)
    }
}

/// Without the system's word: AMD's Zen 4.
const ZEN4: Caches = Caches {
    l1: 32 << 10,
    l2: 1 << 20,
};

#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn system_says() -> Caches {
    let ask = |what: libc::c_int, default: usize| {
        // SAFETY: reads a constant of the system.
        let bytes = unsafe { libc::sysconf(what) };
        // Virtual machines may answer 0.
        usize::try_from(bytes)
            .ok()
            .filter(|&bytes| bytes >= 8 << 10)
            .unwrap_or(default)
    };
    Caches {
        l1: ask(libc::_SC_LEVEL1_DCACHE_SIZE, ZEN4.l1),
        l2: ask(libc::_SC_LEVEL2_CACHE_SIZE, ZEN4.l2),
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn system_says() -> Caches {
    ZEN4
}
