//! What a GPU needs beside this program, loaded when a device is first asked for.
//!
//! Four pieces, none of them linked: the driver (`libcuda.so.1`, which comes with the kernel
//! module), libtorch's CUDA half, the compiler NVRTC, and NCCL. All but the driver belong to one
//! installation of PyTorch: they are looked for beside the libtorch that this process runs on, then
//! among what the system's loader knows.
//!
//! libtorch decides once, at the first question about CUDA, whether there is any. So its CUDA half
//! is loaded before the first such question, or CUDA stays invisible for good.
//!
//! cudarc, whose functions call the driver and NVRTC, panics where a library is missing. It finds
//! those that are loaded already, by name; so each is loaded here first, and nothing of cudarc is
//! called before [`require`] has said that it is there.

use std::ffi::CStr;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use crate::Error;
use crate::sys::symbol;

/// Names a folder that holds NVRTC, to be looked into first.
const NVRTC_FOLDER: &str = "OXITRON_NVRTC";

/// A shared library that GPUs need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece {
    /// The driver.
    Driver,
    /// libtorch's CUDA half.
    Torch,
    /// The compiler of kernels.
    Nvrtc,
    /// Collectives between GPUs.
    Nccl,
}

impl Piece {
    /// In the order in which they are loaded and reported.
    pub const ALL: [Piece; 4] = [Piece::Driver, Piece::Torch, Piece::Nvrtc, Piece::Nccl];

    /// File name of the library.
    pub fn file(self) -> &'static str {
        match self {
            Piece::Driver => "libcuda.so.1",
            Piece::Torch => "libtorch_cuda.so",
            Piece::Nvrtc => "libnvrtc.so.13",
            Piece::Nccl => "libnccl.so.2",
        }
    }

    /// What it is for, in a word or two.
    pub fn purpose(self) -> &'static str {
        match self {
            Piece::Driver => "NVIDIA driver",
            Piece::Torch => "libtorch for CUDA",
            Piece::Nvrtc => "kernel compiler (NVRTC)",
            Piece::Nccl => "collectives (NCCL)",
        }
    }

    fn remedy(self) -> &'static str {
        match self {
            Piece::Driver => "install the NVIDIA driver (in a container: start it with the GPUs)",
            Piece::Torch => {
                "build and run with the libtorch of a CUDA build of PyTorch 2.11.0 (`make setup \
                 CUDA=1`)"
            }
            Piece::Nvrtc => {
                "install the Python package nvidia-cuda-nvrtc 13.0 beside PyTorch, or name a folder \
                 that holds the library in OXITRON_NVRTC"
            }
            Piece::Nccl => "install the Python package nvidia-nccl-cu13 beside PyTorch",
        }
    }

    /// Where it may lie, the surest place first.
    fn candidates(self, torch: Option<&Path>) -> Vec<PathBuf> {
        let mut places: Vec<PathBuf> = Vec::new();
        if let (Piece::Nvrtc, Some(folder)) = (self, std::env::var_os(NVRTC_FOLDER)) {
            places.push(PathBuf::from(folder).join(self.file()));
        }
        if let (true, Some(lib)) = (self != Piece::Driver, torch) {
            // `site-packages/torch/lib`, with the packages of NVIDIA beside `torch`.
            let packages = lib.parent().and_then(Path::parent);
            let beside = packages.map(|packages| packages.join("nvidia"));
            places.push(lib.join(self.file()));
            for folder in ["cu13", "cuda_nvrtc", "nccl"] {
                places.extend(
                    beside
                        .iter()
                        .map(|it| it.join(folder).join("lib").join(self.file())),
                );
            }
        }
        places.retain(|place| place.exists());
        // By its bare name: the loader's own search. libtorch's half must be that of this libtorch.
        if self != Piece::Torch {
            places.push(PathBuf::from(self.file()));
        }
        places
    }

    fn load(self, torch: Option<&Path>) -> Result<PathBuf, String> {
        let candidates = self.candidates(torch);
        let mut refused = match (self, torch) {
            (Piece::Torch, Some(lib)) if candidates.is_empty() => {
                format!("the libtorch in {} is built for CPUs alone", lib.display())
            }
            _ => String::new(),
        };
        for candidate in candidates {
            if self == Piece::Nvrtc {
                open_builtins(&candidate);
            }
            match open(&candidate) {
                Ok(()) => return Ok(candidate),
                Err(error) => refused = error,
            }
        }
        Err(format!(
            "{} is missing: {refused}; {}",
            self.purpose(),
            self.remedy()
        ))
    }
}

/// Loads a library for good: functions of it are held all over the process.
fn open(path: &Path) -> Result<(), String> {
    // SAFETY: the initialisers are those of libraries that the user has installed to be run.
    let opened = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) };
    // The loader's own words are what the error comes from.
    let words = |error: libloading::Error| match std::error::Error::source(&error) {
        Some(source) => source.to_string(),
        None => error.to_string(),
    };
    opened.map(std::mem::forget).map_err(words)
}

/// NVRTC asks for its own library of built-in functions by its bare name, which the loader knows
/// only once it is loaded, unless the folder is among those it searches.
fn open_builtins(nvrtc: &Path) {
    let beside = nvrtc.parent().map(std::fs::read_dir);
    for file in beside.into_iter().flatten().flatten().flatten() {
        let name = file.file_name();
        if name.to_string_lossy().starts_with("libnvrtc-builtins.so") {
            // Where this fails, NVRTC says so when it compiles.
            let _ = open(&file.path());
        }
    }
}

/// The folder of the libtorch that this process runs on.
pub fn libtorch() -> Option<PathBuf> {
    const OF_LIBTORCH: &CStr = c"aoti_torch_device_type_cpu";
    Some(symbol::file_of(OF_LIBTORCH)?.parent()?.to_owned())
}

/// Where each piece was found, or why it cannot be used, in the order of [`Piece::ALL`]. Loads what
/// is there; asked again, it answers the same.
pub fn pieces() -> &'static [(Piece, Result<PathBuf, String>)] {
    static FOUND: OnceLock<Vec<(Piece, Result<PathBuf, String>)>> = OnceLock::new();
    FOUND.get_or_init(|| {
        let torch = libtorch();
        let load = |piece: Piece| (piece, piece.load(torch.as_deref()));
        Piece::ALL.into_iter().map(load).collect()
    })
}

/// Whether there is a driver at all. Nothing else is loaded to find out.
pub fn has_driver() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| Piece::Driver.load(None).is_ok())
}

/// Refuses to go on without `piece`.
///
/// # Errors
/// [`Error::Cuda`] with what is missing and the remedy.
pub(crate) fn require(piece: Piece) -> Result<(), Error> {
    let found = pieces().iter().find(|(one, _)| *one == piece);
    match found.map(|(_, found)| found) {
        Some(Err(missing)) => Err(Error::Cuda {
            call: "cuda",
            message: missing.clone(),
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn libtorch_is_found_where_it_was_loaded_from() {
        let folder = libtorch().unwrap();
        assert!(
            folder.join("libtorch_cpu.so").exists(),
            "{}",
            folder.display()
        );
    }

    #[test]
    fn what_is_missing_is_said_with_a_remedy() {
        for (piece, found) in pieces() {
            match found {
                Ok(path) => println!("{}: {}", piece.purpose(), path.display()),
                Err(message) => {
                    assert!(message.starts_with(piece.purpose()), "{message}");
                    assert!(message.contains(" is missing: ") && message.contains("; "));
                    let error = require(*piece).unwrap_err().to_string();
                    assert!(error.contains(message.as_str()), "{error}");
                }
            }
        }
    }
}
