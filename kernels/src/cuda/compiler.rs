//! From a text to code for one architecture, by NVRTC, or from the cache.

use std::ffi::{CStr, CString, c_char, c_int};

use cudarc::nvrtc::sys;

use super::cache;
use super::libraries::{self, Piece};
use super::source::{HEADERS, Source};
use crate::Error;

/// Options of the compiler, one a line.
const OPTIONS: &str = include_str!("options.txt");

/// The compute capability of a device, such as 9.0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Architecture {
    pub(crate) major: u32,
    pub(crate) minor: u32,
}

impl std::fmt::Display for Architecture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "sm_{}{}", self.major, self.minor)
    }
}

/// The code of a file for `architecture`: a cubin that the driver loads as it is.
///
/// # Errors
/// [`Error::Cuda`] where NVRTC is missing or refuses the text.
pub(crate) fn cubin(source: &Source, architecture: Architecture) -> Result<Vec<u8>, Error> {
    libraries::require(Piece::Nvrtc)?;
    let compiler = version()?;
    let wanted = architecture.to_string();
    let headers = HEADERS.iter().map(|(_, text)| *text);
    let texts = [source.text, OPTIONS, wanted.as_str(), compiler.as_str()];
    let hash = cache::hash(texts.into_iter().chain(headers));
    let path = cache::folder()
        .map(|folder| folder.join(format!("{}-{wanted}-{hash:032x}.cubin", source.name)));
    if let Some(kept) = path.as_deref().and_then(cache::read) {
        return Ok(kept);
    }
    let code = Program::new(source)?.compile(&wanted)?;
    if let Some(path) = path {
        let _ = cache::write(&path, &code);
    }
    Ok(code)
}

/// The compiler's version, which is part of what a cached file was made from.
fn version() -> Result<String, Error> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: NVRTC is loaded, and the two numbers outlive the call.
    check("nvrtcVersion", unsafe {
        sys::nvrtcVersion(&mut major, &mut minor)
    })?;
    Ok(format!("{major}.{minor}"))
}

/// A text that NVRTC has taken.
struct Program {
    handle: sys::nvrtcProgram,
    name: &'static str,
    /// NVRTC may read the texts until the program is destroyed: that of the file, and those of the
    /// headers with their names.
    _texts: Vec<CString>,
}

impl Program {
    fn new(source: &Source) -> Result<Self, Error> {
        let name = c_string(source.name)?;
        let text = c_string(source.text)?;
        let headers = HEADERS.map(|(_, text)| c_string(text));
        let names = HEADERS.map(|(name, _)| c_string(name));
        let mut kept: Vec<CString> = headers.into_iter().collect::<Result<_, _>>()?;
        let texts: Vec<*const c_char> = kept.iter().map(|text| text.as_ptr()).collect();
        let names: Vec<CString> = names.into_iter().collect::<Result<_, _>>()?;
        let named: Vec<*const c_char> = names.iter().map(|name| name.as_ptr()).collect();
        let mut handle = std::ptr::null_mut();
        // SAFETY: all texts are nul-terminated, and there are as many names as headers.
        check("nvrtcCreateProgram", unsafe {
            sys::nvrtcCreateProgram(
                &mut handle,
                text.as_ptr(),
                name.as_ptr(),
                HEADERS.len() as c_int,
                texts.as_ptr(),
                named.as_ptr(),
            )
        })?;
        kept.extend(names);
        kept.extend([name, text]);
        Ok(Program {
            handle,
            name: source.name,
            _texts: kept,
        })
    }

    fn compile(&self, architecture: &str) -> Result<Vec<u8>, Error> {
        let architecture = format!("--gpu-architecture={architecture}");
        let options = OPTIONS.lines().filter(|line| !line.is_empty());
        let options: Vec<CString> = options
            .chain([architecture.as_str()])
            .map(c_string)
            .collect::<Result<_, _>>()?;
        let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        // SAFETY: the program lives, and so do the options.
        let outcome = unsafe {
            sys::nvrtcCompileProgram(self.handle, options.len() as c_int, options.as_ptr())
        };
        check("nvrtcCompileProgram", outcome).map_err(|error| Error::Cuda {
            call: "cuda.compile",
            message: format!("{}.cu: {error}\n{}", self.name, self.log()),
        })?;
        let mut size = 0;
        // SAFETY: the program lives and has been compiled.
        check("nvrtcGetCUBINSize", unsafe {
            sys::nvrtcGetCUBINSize(self.handle, &mut size)
        })?;
        let mut code = vec![0u8; size];
        // SAFETY: the buffer has the size that was asked for.
        check("nvrtcGetCUBIN", unsafe {
            sys::nvrtcGetCUBIN(self.handle, code.as_mut_ptr().cast())
        })?;
        Ok(code)
    }

    /// What the compiler had to say.
    fn log(&self) -> String {
        let mut size = 0;
        // SAFETY: the program lives.
        let asked = unsafe { sys::nvrtcGetProgramLogSize(self.handle, &mut size) };
        let mut log = vec![0u8; size];
        // SAFETY: the buffer has the size that was asked for.
        let read = unsafe { sys::nvrtcGetProgramLog(self.handle, log.as_mut_ptr().cast()) };
        if check("", asked).and(check("", read)).is_err() {
            return "(its log cannot be read)".to_owned();
        }
        let text = CStr::from_bytes_until_nul(&log).map(CStr::to_string_lossy);
        text.map(|text| text.trim_end().to_owned())
            .unwrap_or_default()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: created by `new`, destroyed once.
        let _ = unsafe { sys::nvrtcDestroyProgram(&mut self.handle) };
    }
}

fn c_string(text: &str) -> Result<CString, Error> {
    CString::new(text).map_err(|error| Error::Cuda {
        call: "cuda.compile",
        message: error.to_string(),
    })
}

fn check(call: &'static str, result: sys::nvrtcResult) -> Result<(), Error> {
    result.result().map_err(|error| Error::Cuda {
        call,
        message: error.to_string(),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::source::ALL;
    use super::*;

    /// Whether the compiler is here; where the environment names it, it must be.
    fn has_nvrtc() -> bool {
        match libraries::require(Piece::Nvrtc) {
            Ok(()) => true,
            Err(error) => {
                assert!(std::env::var_os("OXITRON_NVRTC").is_none(), "{error}");
                println!("skipped: {error}");
                false
            }
        }
    }

    #[test]
    fn every_file_compiles_for_two_architectures_and_comes_back_from_the_cache() {
        if !has_nvrtc() {
            return;
        }
        for source in ALL {
            for (major, minor) in [(8, 0), (9, 0)] {
                let architecture = Architecture { major, minor };
                let first = cubin(source, architecture).unwrap();
                assert!(first.starts_with(b"\x7fELF"), "{}", source.name);
                assert_eq!(cubin(source, architecture).unwrap(), first);
            }
        }
    }

    #[test]
    fn a_text_that_is_refused_is_named_with_the_compilers_words() {
        if !has_nvrtc() {
            return;
        }
        let broken = Source {
            name: "broken",
            text: "#include \"common.cuh\"\nKERNEL(f)() { undeclared = 1; }\n",
        };
        let architecture = Architecture { major: 9, minor: 0 };
        let error = cubin(&broken, architecture).unwrap_err().to_string();
        assert!(
            error.contains("broken.cu") && error.contains("undeclared"),
            "{error}"
        );
    }
}
