//! Symbols of the libraries that are loaded: functions that some builds of libtorch export and others do
//! not, and where a library lies.

use std::ffi::{CStr, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::OnceLock;

use libc::{c_int, c_void};

/// CBLAS constants: row-major order, and whether an operand is read transposed.
const ROW_MAJOR: c_int = 101;
const NO_TRANSPOSE: c_int = 111;
const TRANSPOSE: c_int = 112;

/// MKL's bf16 product with fp32 accumulation, in the 32-bit integer interface (LP64) that PyTorch
/// links: `C = alpha * op(A) * op(B) + beta * C`.
type GemmBf16 = unsafe extern "C" fn(
    c_int,
    c_int,
    c_int,
    c_int,
    c_int,
    c_int,
    f32,
    *const u16,
    c_int,
    *const u16,
    c_int,
    f32,
    *mut f32,
    c_int,
);

/// Looks a symbol up among everything the process has loaded.
fn find(name: &CStr) -> Option<*mut c_void> {
    // SAFETY: the name is nul-terminated and RTLD_DEFAULT needs no handle.
    let address = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    (!address.is_null()).then_some(address)
}

/// The file that a symbol was loaded from.
pub(crate) fn file_of(name: &CStr) -> Option<PathBuf> {
    let address = find(name)?;
    // SAFETY: all-zero is a valid value of this plain struct.
    let mut info: libc::Dl_info = unsafe { std::mem::zeroed() };
    // SAFETY: the address is that of a loaded symbol, and `info` outlives the call.
    let known = unsafe { libc::dladdr(address, &mut info) } != 0;
    if !known || info.dli_fname.is_null() {
        return None;
    }
    // SAFETY: the loader's own nul-terminated copy of the path, which lives as long as the library.
    let path = unsafe { CStr::from_ptr(info.dli_fname) };
    Some(PathBuf::from(OsStr::from_bytes(path.to_bytes())))
}

/// `cblas_gemm_bf16bf16f32`, where libtorch was built with MKL.
fn gemm_bf16() -> Option<GemmBf16> {
    static FOUND: OnceLock<Option<GemmBf16>> = OnceLock::new();
    *FOUND.get_or_init(|| {
        find(c"cblas_gemm_bf16bf16f32").map(|address| {
            // SAFETY: the symbol of this name has this signature in every MKL since 2020.
            unsafe { std::mem::transmute::<*mut c_void, GemmBf16>(address) }
        })
    })
}

/// Whether [`accumulate_transposed_bf16`] can run in this process.
pub fn has_gemm_bf16() -> bool {
    gemm_bf16().is_some()
}

/// `c += aᵀ·b` with bf16 factors and an fp32 sum, by MKL: `a` is `[k, m]`, `b` is `[k, n]` and `c`
/// is `[m, n]`, all row-major without gaps. Returns false, having done nothing, when this build of
/// libtorch has no such function or a size does not fit its 32-bit integers.
pub fn accumulate_transposed_bf16(
    a: &[half::bf16],
    b: &[half::bf16],
    c: &mut [f32],
    [k, m, n]: [usize; 3],
) -> bool {
    let Some(gemm) = gemm_bf16() else {
        return false;
    };
    let (Ok(k32), Ok(m32), Ok(n32)) = (c_int::try_from(k), c_int::try_from(m), c_int::try_from(n))
    else {
        return false;
    };
    if a.len() != k * m || b.len() != k * n || c.len() != m * n || k * m * n == 0 {
        return false;
    }
    // SAFETY: the lengths were just checked against the sizes; bf16 is a transparent u16.
    unsafe {
        gemm(
            ROW_MAJOR,
            TRANSPOSE,
            NO_TRANSPOSE,
            m32,
            n32,
            k32,
            1.0,
            a.as_ptr().cast(),
            m32,
            b.as_ptr().cast(),
            n32,
            1.0,
            c.as_mut_ptr(),
            n32,
        );
    }
    true
}
