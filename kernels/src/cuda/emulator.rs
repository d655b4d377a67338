//! Kernels on the CPU: the same texts, compiled as C++ by the system's compiler and loaded.
//!
//! `emulator.h` stands in for CUDA. It finds faults that a GPU would answer with a hang or with
//! wrong numbers (see there); what it cannot tell is speed, and what the real compiler makes of the
//! text.

use std::cell::Cell;
use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use libloading::Library;

use super::source::{HEADERS, Source};
use super::{Argument, Grid, Kernel, cache};
use crate::Error;

/// The header that stands in for CUDA.
const EMULATOR: &str = include_str!("emulator.h");

/// What the compiler is asked for. No contraction of products and sums: a GPU's compiler contracts
/// where it likes, and what must not be contracted says so.
const OPTIONS: [&str; 6] = [
    "-O1",
    "-std=c++17",
    "-fPIC",
    "-shared",
    "-ffp-contract=off",
    "-w",
];

thread_local! {
    static ON: Cell<bool> = const { Cell::new(false) };
    static SCHEDULE: Cell<u64> = const { Cell::new(0) };
}

/// Runs `f` with ops on CPU tensors going down the path of a GPU.
pub fn emulated<R>(f: impl FnOnce() -> R) -> R {
    with(&ON, true, f)
}

/// Runs `f` with the threads of a block taken in another order: 0 as they are numbered, 1 the other
/// way round, anything else at random from this seed. Results that depend on it come from a race.
pub fn with_schedule<R>(schedule: u64, f: impl FnOnce() -> R) -> R {
    with(&SCHEDULE, schedule, f)
}

fn with<T: Copy, R>(
    cell: &'static std::thread::LocalKey<Cell<T>>,
    value: T,
    f: impl FnOnce() -> R,
) -> R {
    /// Puts the value back even when `f` panics.
    struct Restore<T: Copy + 'static>(&'static std::thread::LocalKey<Cell<T>>, T);
    impl<T: Copy> Drop for Restore<T> {
        fn drop(&mut self) {
            self.0.set(self.1);
        }
    }
    let _restore = Restore(cell, cell.replace(value));
    f()
}

/// Whether this thread's ops take the path of a GPU.
pub(super) fn is_on() -> bool {
    ON.get()
}

/// `emulator::Launch` of the header.
#[repr(C)]
struct Launch {
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    schedule: u64,
    argument_count: u32,
    argument_bytes: *const u32,
}

type Entry = unsafe extern "C" fn(*const Launch, *const *mut c_void) -> *const c_char;

/// Runs a kernel here and now.
///
/// # Safety
/// Pointers among the arguments are good for the sizes among them.
pub(super) unsafe fn launch(
    kernel: Kernel,
    grid: Grid,
    arguments: &[Argument],
) -> Result<(), Error> {
    let symbol = kernel.symbol();
    let failed = |message: String| Error::Cuda {
        call: kernel.function,
        message: format!("emulated `{symbol}`: {message}"),
    };
    let library = library(kernel.source).map_err(failed)?;
    let name = format!("oxitron_emulate_{symbol}");
    // SAFETY: the header's macro gives every exported kernel an entry of this type.
    let entry = unsafe { library.get::<Entry>(name.as_bytes()) };
    let entry = entry.map_err(|error| failed(error.to_string()))?;
    let at: Vec<*mut c_void> = arguments.iter().map(|argument| argument.at).collect();
    let bytes: Vec<u32> = arguments.iter().map(|argument| argument.bytes).collect();
    let launch = Launch {
        grid: grid.blocks,
        block: [grid.threads[0], grid.threads[1], 1],
        shared_bytes: grid.shared_bytes,
        schedule: SCHEDULE.get(),
        argument_count: arguments.len() as u32,
        argument_bytes: bytes.as_ptr(),
    };
    // SAFETY: number and sizes of the arguments are compared with the kernel's parameters; the
    // pointers are the caller's promise.
    let message = unsafe { entry(&launch, at.as_ptr()) };
    if message.is_null() {
        return Ok(());
    }
    // SAFETY: a message is a C string that lives until this thread's next launch.
    let message = unsafe { CStr::from_ptr(message) };
    Err(failed(message.to_string_lossy().into_owned()))
}

/// The library of one file, compiled where that has not been done yet.
fn library(source: &'static Source) -> Result<&'static Library, String> {
    static LOADED: Mutex<Option<HashMap<&str, &'static Library>>> = Mutex::new(None);
    let mut loaded = LOADED.lock().map_err(|error| error.to_string())?;
    let loaded = loaded.get_or_insert_default();
    if let Some(library) = loaded.get(source.name) {
        return Ok(library);
    }
    let path = compile(source)?;
    // SAFETY: the library is the one just compiled from our text; it has no initialisers but those
    // of the C++ library.
    let library = unsafe { Library::new(&path) };
    let library = library.map_err(|error| format!("{}: {error}", path.display()))?;
    // Entries are used for as long as the process lives.
    let library: &'static Library = Box::leak(Box::new(library));
    loaded.insert(source.name, library);
    Ok(library)
}

/// Compiles one file, unless the very same text has been compiled before.
fn compile(source: &Source) -> Result<PathBuf, String> {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let headers = HEADERS.iter().map(|(_, text)| *text);
    let texts = [EMULATOR, source.text, compiler.as_str()].into_iter();
    let hash = cache::hash(texts.chain(headers).chain(OPTIONS));
    let folder = cache::folder()
        .ok_or("no home folder to keep compiled kernels in; set XDG_CACHE_HOME")?
        .join("emulated");
    let finished = folder.join(format!("{}-{hash:032x}.so", source.name));
    if finished.exists() {
        return Ok(finished);
    }
    let work = folder.join(format!(
        "{}-{hash:032x}.{}",
        source.name,
        std::process::id()
    ));
    let io = |error: std::io::Error| format!("{}: {error}", work.display());
    std::fs::create_dir_all(&work).map_err(io)?;
    let outcome = run_compiler(&compiler, source, &work);
    let moved =
        outcome.and_then(|()| std::fs::rename(work.join("library.so"), &finished).map_err(io));
    let _ = std::fs::remove_dir_all(&work);
    moved.map(|()| finished)
}

fn run_compiler(compiler: &str, source: &Source, work: &Path) -> Result<(), String> {
    let named = format!("{}.cu", source.name);
    let files = [("emulator.h", EMULATOR), (named.as_str(), source.text)];
    for (name, text) in files.iter().chain(&HEADERS) {
        let path = work.join(name);
        std::fs::write(&path, text).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    let output = Command::new(compiler)
        .args(OPTIONS)
        .args(["-include", "emulator.h", "-x", "c++", named.as_str()])
        .args(["-o", "library.so"])
        .current_dir(work)
        .output()
        .map_err(|error| format!("{compiler}: {error}; install a C++ compiler or set CXX"))?;
    if output.status.success() {
        return Ok(());
    }
    let log = String::from_utf8_lossy(&output.stderr);
    Err(format!("{compiler} refuses {named}:\n{log}"))
}
