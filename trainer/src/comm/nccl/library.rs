//! NCCL as a table of functions, from the library that belongs to this libtorch.
//!
//! cudarc has the types, but its loader looks for a `libnccl.so` without the version that the file
//! of PyTorch's package has, and panics where there is none. So the library that
//! [`cuda::pieces`](oxitron_kernels::cuda::pieces) has found is asked for each function here. Results
//! are plain numbers: one that this program does not know must not become a value of an `enum`.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::fmt;
use std::sync::OnceLock;

use cudarc::nccl::sys::{ncclComm_t, ncclConfig_t, ncclDataType_t, ncclRedOp_t, ncclUniqueId};
use libloading::os::unix::{Library as Shared, RTLD_LOCAL, RTLD_NOW};
use oxitron_kernels::cuda::{Piece, pieces};

/// The oldest version whose settings of a communicator are those of `ncclConfig_t` here; the one of
/// PyTorch 2.11.0.
const OLDEST: Version = Version(22_800);

/// Marks settings that were filled in by this layout of them.
const MAGIC: u32 = 0xcafe_beef;

/// An `ncclResult_t`.
pub(super) type Code = c_int;

pub(super) const SUCCESS: Code = 0;
pub(super) const IN_PROGRESS: Code = 7;

/// A `cudaStream_t`.
pub(super) type RawStream = *mut c_void;

/// A version as NCCL counts them: 22809 is 2.28.9.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in super::super) struct Version(pub(super) c_int);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Version(code) = self;
        write!(f, "{}.{}.{}", code / 10_000, code / 100 % 100, code % 100)
    }
}

/// Declares the table and how it is filled from a library.
macro_rules! functions {
    ($($field:ident: $symbol:literal, ($($argument:ty),*) -> $result:ty;)*) => {
        /// The functions that are called.
        #[derive(Clone, Copy)]
        pub(super) struct Library {
            $(pub(super) $field: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl Library {
            fn of(shared: &Shared) -> Result<Self, String> {
                Ok(Self {
                    // SAFETY: the types are those of `nccl.h` of the oldest version that is taken,
                    // and NCCL keeps them within a major version.
                    $($field: unsafe { symbol(shared, $symbol)? },)*
                })
            }
        }
    };
}

functions! {
    get_version: "ncclGetVersion", (*mut c_int) -> Code;
    get_unique_id: "ncclGetUniqueId", (*mut ncclUniqueId) -> Code;
    init: "ncclCommInitRankConfig",
        (*mut ncclComm_t, c_int, ncclUniqueId, c_int, *mut ncclConfig_t) -> Code;
    split: "ncclCommSplit", (ncclComm_t, c_int, c_int, *mut ncclComm_t, *mut ncclConfig_t) -> Code;
    finalize: "ncclCommFinalize", (ncclComm_t) -> Code;
    destroy: "ncclCommDestroy", (ncclComm_t) -> Code;
    abort: "ncclCommAbort", (ncclComm_t) -> Code;
    async_error: "ncclCommGetAsyncError", (ncclComm_t, *mut Code) -> Code;
    error_string: "ncclGetErrorString", (Code) -> *const c_char;
    last_error: "ncclGetLastError", (ncclComm_t) -> *const c_char;
    all_reduce: "ncclAllReduce",
        (*const c_void, *mut c_void, usize, ncclDataType_t, ncclRedOp_t, ncclComm_t, RawStream) -> Code;
    reduce_scatter: "ncclReduceScatter",
        (*const c_void, *mut c_void, usize, ncclDataType_t, ncclRedOp_t, ncclComm_t, RawStream) -> Code;
    all_gather: "ncclAllGather",
        (*const c_void, *mut c_void, usize, ncclDataType_t, ncclComm_t, RawStream) -> Code;
    broadcast: "ncclBroadcast",
        (*const c_void, *mut c_void, usize, ncclDataType_t, c_int, ncclComm_t, RawStream) -> Code;
    send: "ncclSend", (*const c_void, usize, ncclDataType_t, c_int, ncclComm_t, RawStream) -> Code;
    recv: "ncclRecv", (*mut c_void, usize, ncclDataType_t, c_int, ncclComm_t, RawStream) -> Code;
    group_start: "ncclGroupStart", () -> Code;
    group_end: "ncclGroupEnd", () -> Code;
}

/// # Safety
/// `F` is the type of that function.
unsafe fn symbol<F: Copy>(shared: &Shared, name: &str) -> Result<F, String> {
    // SAFETY: the caller's promise.
    let found = unsafe { shared.get::<F>(name.as_bytes()) };
    found
        .map(|function| *function)
        .map_err(|error| format!("NCCL lacks {name}: {error}; {REMEDY}"))
}

const REMEDY: &str = "install the Python package nvidia-nccl-cu13 beside PyTorch";

impl Library {
    /// The NCCL of this installation, loaded for good.
    ///
    /// # Errors
    /// What is missing, with the remedy.
    pub(super) fn load() -> Result<&'static Library, String> {
        static LOADED: OnceLock<Result<Library, String>> = OnceLock::new();
        LOADED.get_or_init(open).as_ref().map_err(Clone::clone)
    }

    pub(super) fn version(&self) -> Result<Version, String> {
        let mut version = 0;
        // SAFETY: the number outlives the call.
        let code = unsafe { (self.get_version)(&mut version) };
        self.outcome(code, std::ptr::null_mut())?;
        Ok(Version(version))
    }

    /// What all ranks of a world must know to find each other.
    pub(super) fn unique_id(&self) -> Result<[u8; ID_BYTES], String> {
        let mut id = ncclUniqueId {
            internal: [0; ID_BYTES],
        };
        // SAFETY: the identifier outlives the call.
        let code = unsafe { (self.get_unique_id)(&mut id) };
        self.outcome(code, std::ptr::null_mut())?;
        Ok(id.internal.map(|byte| byte as u8))
    }

    /// Turns a result into NCCL's words for it. `communicator` may be null.
    pub(super) fn outcome(&self, code: Code, communicator: ncclComm_t) -> Result<(), String> {
        if code == SUCCESS {
            return Ok(());
        }
        // SAFETY: NCCL gives strings that stay, or null, for any number and communicator.
        let [what, last] = unsafe {
            [(self.error_string)(code), (self.last_error)(communicator)].map(|text| {
                match text.is_null() {
                    true => String::new(),
                    false => CStr::from_ptr(text).to_string_lossy().trim().to_owned(),
                }
            })
        };
        Err(match last.is_empty() {
            true => format!("NCCL: {what} (error {code})"),
            false => format!("NCCL: {what} (error {code}): {last}"),
        })
    }
}

impl fmt::Debug for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Library").finish_non_exhaustive()
    }
}

/// Bytes of what [`Library::unique_id`] gives.
pub(in super::super) const ID_BYTES: usize = 128;

fn open() -> Result<Library, String> {
    let found = pieces().iter().find(|(piece, _)| *piece == Piece::Nccl);
    let path = match found {
        Some((_, Ok(path))) => path,
        Some((_, Err(missing))) => return Err(missing.clone()),
        None => return Err(format!("NCCL is missing; {REMEDY}")),
    };
    // SAFETY: the library is loaded already; this only gives another handle on it.
    let shared = unsafe { Shared::open(Some(path), RTLD_NOW | RTLD_LOCAL) };
    let shared = shared.map_err(|error| format!("{}: {error}; {REMEDY}", path.display()))?;
    let library = Library::of(&shared)?;
    // Its functions are held all over the process.
    std::mem::forget(shared);
    let version = library.version()?;
    if version < OLDEST {
        return Err(format!(
            "{} is NCCL {version}, needed is {OLDEST} or newer; {REMEDY}",
            path.display()
        ));
    }
    Ok(library)
}

/// Settings of a communicator whose calls do not block: `NCCL_CONFIG_INITIALIZER` but for that.
pub(super) fn settings() -> ncclConfig_t {
    /// `NCCL_CONFIG_UNDEF_INT`.
    const UNDEFINED: c_int = c_int::MIN;
    ncclConfig_t {
        size: size_of::<ncclConfig_t>(),
        magic: MAGIC,
        // Of the layout, not of the library: a newer one takes an older layout.
        version: 22_809,
        blocking: 0,
        cgaClusterSize: UNDEFINED,
        minCTAs: UNDEFINED,
        maxCTAs: UNDEFINED,
        netName: std::ptr::null(),
        splitShare: UNDEFINED,
        trafficClass: UNDEFINED,
        commName: std::ptr::null(),
        collnetEnable: UNDEFINED,
        CTAPolicy: UNDEFINED,
        shrinkShare: UNDEFINED,
        nvlsCTAs: UNDEFINED,
        nChannelsPerNetPeer: UNDEFINED,
        nvlinkCentricSched: UNDEFINED,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn the_settings_are_those_of_the_header() {
        // The header's `sizeof(ncclConfig_t)` of 2.28.9, and where its fields lie.
        assert_eq!(size_of::<ncclConfig_t>(), 80);
        assert_eq!(std::mem::offset_of!(ncclConfig_t, blocking), 16);
        assert_eq!(std::mem::offset_of!(ncclConfig_t, netName), 32);
        assert_eq!(std::mem::offset_of!(ncclConfig_t, nvlinkCentricSched), 76);
        let settings = settings();
        assert_eq!((settings.size, settings.blocking), (80, 0));
        assert_eq!(settings.splitShare, i32::MIN);
    }

    #[test]
    fn the_library_of_this_machine_speaks_or_is_missing_with_a_remedy() {
        match Library::load() {
            Err(reason) => {
                println!("skipped: {reason}");
                assert!(reason.contains("; "), "{reason}");
            }
            Ok(library) => {
                let version = library.version().unwrap();
                println!("NCCL {version}");
                assert!(version >= OLDEST);
                let words = library.outcome(5, std::ptr::null_mut()).unwrap_err();
                assert!(words.contains("invalid usage"), "{words}");
            }
        }
    }

    #[test]
    fn versions_read_as_nvidia_writes_them() {
        assert_eq!(Version(22_809).to_string(), "2.28.9");
        assert_eq!(OLDEST.to_string(), "2.28.0");
    }
}
