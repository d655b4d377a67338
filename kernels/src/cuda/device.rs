//! A GPU as this process uses it: its context, its kernels, and launches on libtorch's stream.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::{Mutex, OnceLock};

use cudarc::driver::{result, sys};

use super::compiler::{self, Architecture};
use super::libraries::{self, Piece};
use super::{Argument, Grid, Kernel, Numerics, Stream, source};
use crate::Error;

/// CUDA 13.0, as the driver counts versions.
const OLDEST_DRIVER: i32 = 13_000;

/// The oldest architecture with instructions for bf16.
const OLDEST_ARCHITECTURE: u32 = 8;

/// A GPU, used as long as the process lives.
pub(crate) struct Device {
    ordinal: usize,
    /// The primary context, which libtorch uses too.
    context: Context,
    architecture: Architecture,
    name: String,
    /// One for each file of kernels.
    modules: HashMap<&'static str, Module>,
    functions: Mutex<HashMap<Kernel, Function>>,
}

/// What a GPU is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// As the driver calls it.
    pub name: String,
    /// Compute capability, as `sm_90`.
    pub architecture: String,
    /// Bytes of memory.
    pub memory: u64,
}

/// The GPUs that this process sees, in the driver's order.
///
/// # Errors
/// [`Error::Cuda`] without a driver, or where it refuses.
pub fn devices() -> Result<Vec<DeviceInfo>, Error> {
    let count = start_driver()?;
    let info = |ordinal| {
        let device = result::device::get(ordinal).map_err(driver("cuDeviceGet"))?;
        // SAFETY: `device` is one that the driver has just named.
        let memory = unsafe { result::device::total_mem(device) };
        Ok(DeviceInfo {
            name: result::device::get_name(device).map_err(driver("cuDeviceGetName"))?,
            architecture: architecture(device)?.to_string(),
            memory: memory.map_err(driver("cuDeviceTotalMem"))? as u64,
        })
    };
    (0..count).map(info).collect()
}

/// Starts the driver: the number of GPUs that this process sees.
fn start_driver() -> Result<i32, Error> {
    libraries::require(Piece::Driver)?;
    // Asked first: an older driver lacks functions that are called later.
    let mut version = 0;
    // SAFETY: the driver is loaded, and the number outlives the call.
    let asked = unsafe { sys::cuDriverGetVersion(&mut version) };
    if asked != sys::CUresult::CUDA_SUCCESS || version < OLDEST_DRIVER {
        let (major, minor) = (version / 1000, version % 1000 / 10);
        return Err(missing(format!(
            "the driver knows CUDA up to {major}.{minor}; install one for CUDA 13.0 or newer (580 \
             or newer)"
        )));
    }
    let none = |error: result::DriverError| {
        missing(format!(
            "the driver finds none ({error:?}); start the container or job with GPUs"
        ))
    };
    result::init().map_err(none)?;
    let count = result::device::get_count().map_err(none)?;
    if count == 0 {
        return Err(missing(
            "the driver finds none; start the container or job with GPUs".to_owned(),
        ));
    }
    Ok(count)
}

fn missing(message: String) -> Error {
    failed("cuda", format!("GPU is missing: {message}"))
}

fn architecture(device: sys::CUdevice) -> Result<Architecture, Error> {
    use sys::CUdevice_attribute_enum as Attribute;
    let attribute = |which| {
        // SAFETY: the driver has named the device.
        let found = unsafe { result::device::get_attribute(device, which) };
        found
            .map(|number| number as u32)
            .map_err(driver("cuDeviceGetAttribute"))
    };
    Ok(Architecture {
        major: attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        minor: attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    })
}

#[derive(Clone, Copy)]
struct Context(sys::CUcontext);

#[derive(Clone, Copy)]
struct Module(sys::CUmodule);

#[derive(Clone, Copy)]
struct Function {
    handle: sys::CUfunction,
    /// Dynamic shared memory that it may have.
    shared_bytes: u32,
}

// SAFETY: the driver takes its handles from any thread.
unsafe impl Send for Context {}
// SAFETY: as above; a handle is never written through.
unsafe impl Sync for Context {}
// SAFETY: as above.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}
// SAFETY: as above.
unsafe impl Send for Function {}

impl Context {
    /// Makes it the thread's own, as every thread needs it.
    fn bind(self) -> Result<(), Error> {
        // SAFETY: the context is retained for good.
        unsafe { result::ctx::set_current(self.0) }.map_err(driver("cuCtxSetCurrent"))
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "GPU {}: {}, {}",
            self.ordinal, self.name, self.architecture
        )
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

impl Device {
    /// The GPU number `ordinal` of this process, opened where that has not been done yet.
    ///
    /// # Errors
    /// [`Error::Cuda`] with what is missing.
    pub(crate) fn get(ordinal: usize) -> Result<&'static Device, Error> {
        static OPENED: OnceLock<Mutex<HashMap<usize, &'static Device>>> = OnceLock::new();
        let opened = OPENED.get_or_init(Mutex::default);
        let mut opened = opened.lock().map_err(poisoned)?;
        if let Some(device) = opened.get(&ordinal) {
            return Ok(device);
        }
        let device: &'static Device = Box::leak(Box::new(Device::open(ordinal)?));
        opened.insert(ordinal, device);
        Ok(device)
    }

    fn open(ordinal: usize) -> Result<Device, Error> {
        for piece in [Piece::Driver, Piece::Torch, Piece::Nvrtc] {
            libraries::require(piece)?;
        }
        let count = start_driver()?;
        if ordinal >= usize::try_from(count).unwrap_or(0) {
            return Err(Error::Cuda {
                call: "cuda.device",
                message: format!(
                    "there is no GPU number {ordinal}: this process sees {count} (see \
                     CUDA_VISIBLE_DEVICES)"
                ),
            });
        }
        let device = result::device::get(ordinal as i32).map_err(driver("cuDeviceGet"))?;
        // SAFETY: the driver has named the device; the context is kept for as long as the process
        // lives.
        let context = unsafe { result::primary_ctx::retain(device) };
        let context = Context(context.map_err(driver("cuDevicePrimaryCtxRetain"))?);
        context.bind()?;
        let architecture = architecture(device)?;
        if architecture.major < OLDEST_ARCHITECTURE {
            return Err(missing(format!(
                "GPU {ordinal} is {architecture}, without instructions for bf16; use one of sm_80 or \
                 newer"
            )));
        }
        Numerics::default().set()?;
        // All of them now: what cannot be compiled is found before a run begins.
        let modules = source::ALL.iter().map(|source| {
            let code = compiler::cubin(source, architecture)?;
            // SAFETY: a cubin that the compiler made, whole as its checksum says.
            let module = unsafe { result::module::load_data(code.as_ptr().cast()) };
            Ok((
                source.name,
                Module(module.map_err(driver("cuModuleLoadData"))?),
            ))
        });
        Ok(Device {
            ordinal,
            context,
            architecture,
            name: result::device::get_name(device).map_err(driver("cuDeviceGetName"))?,
            modules: modules.collect::<Result<_, Error>>()?,
            functions: Mutex::default(),
        })
    }

    /// Makes it the current one of this thread.
    pub(super) fn bind(&self) -> Result<(), Error> {
        self.context.bind()
    }

    /// Its number, as libtorch counts too.
    pub(crate) fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// Locks the pages of host memory, for copies that run by themselves.
    ///
    /// # Safety
    /// The memory is there until [`Device::unlock_pages`].
    pub(super) unsafe fn lock_pages(&self, at: *mut c_void, bytes: usize) -> Result<(), Error> {
        const CALL: &str = "cuMemHostRegister";
        self.context.bind()?;
        // SAFETY: the caller's promise.
        let locked = unsafe { sys::cuMemHostRegister_v2(at, bytes, 0) };
        locked.result().map_err(driver(CALL))
    }

    /// Undoes [`Device::lock_pages`].
    ///
    /// # Safety
    /// The memory begins where it was locked, and no copy to or from it is under way.
    pub(super) unsafe fn unlock_pages(&self, at: *mut c_void) -> Result<(), Error> {
        self.context.bind()?;
        // SAFETY: the caller's promise.
        let unlocked = unsafe { sys::cuMemHostUnregister(at) };
        unlocked.result().map_err(driver("cuMemHostUnregister"))
    }

    /// Whether it is of compute capability 9.0 or above.
    pub(crate) fn is_hopper_or_newer(&self) -> bool {
        self.architecture.major >= 9
    }

    /// Puts a kernel into libtorch's current stream of this thread.
    ///
    /// # Safety
    /// The arguments are those that the kernel takes, and pointers among them are good for the
    /// sizes among them, on this device, until the stream has come so far.
    pub(super) unsafe fn launch(
        &self,
        kernel: Kernel,
        grid: Grid,
        arguments: &[Argument],
    ) -> Result<(), Error> {
        self.context.bind()?;
        let function = self.function(kernel, grid.shared_bytes, arguments)?;
        let stream = Stream::current(self.ordinal)?;
        let [x, y, z] = grid.blocks;
        let [width, height] = grid.threads;
        let mut at: [*mut c_void; MOST_ARGUMENTS] = [std::ptr::null_mut(); MOST_ARGUMENTS];
        let Some(at) = at.get_mut(..arguments.len()) else {
            let message = format!("a kernel takes up to {MOST_ARGUMENTS} arguments");
            return Err(failed(kernel.function, message));
        };
        for (at, argument) in at.iter_mut().zip(arguments) {
            *at = argument.at;
        }
        // SAFETY: the function is loaded for good; the rest is the caller's promise. The driver
        // copies the arguments before it returns.
        let launched = unsafe {
            result::launch_kernel(
                function,
                (x, y, z),
                (width, height, 1),
                grid.shared_bytes,
                stream.handle().cast(),
                at,
            )
        };
        launched.map_err(|error| failed(kernel.function, format!("cannot be launched: {error}")))
    }

    /// A kernel with so much dynamic shared memory, looked up where that is still to do.
    fn function(
        &self,
        kernel: Kernel,
        shared_bytes: u32,
        arguments: &[Argument],
    ) -> Result<sys::CUfunction, Error> {
        let mut functions = self.functions.lock().map_err(poisoned)?;
        let known = functions.get(&kernel).copied();
        let mut function = match known {
            Some(function) => function,
            None => {
                let module = self.modules.get(kernel.source.name).copied();
                let module = module.ok_or_else(|| {
                    failed(
                        kernel.function,
                        format!("{}.cu is not declared", kernel.source.name),
                    )
                })?;
                let symbol = CString::new(kernel.symbol())
                    .map_err(|error| failed(kernel.function, error.to_string()))?;
                // SAFETY: the module is loaded for good.
                let handle = unsafe { result::module::get_function(module.0, symbol) };
                let handle = handle.map_err(driver("cuModuleGetFunction"))?;
                check_parameters(kernel, handle, arguments)?;
                Function {
                    handle,
                    shared_bytes: 0,
                }
            }
        };
        if shared_bytes > function.shared_bytes {
            use sys::CUfunction_attribute_enum as Attribute;
            let attribute = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is loaded for good.
            unsafe {
                result::function::set_function_attribute(
                    function.handle,
                    attribute,
                    shared_bytes as i32,
                )
            }
            .map_err(driver("cuFuncSetAttribute"))?;
            function.shared_bytes = shared_bytes;
        } else if known.is_some() {
            return Ok(function.handle);
        }
        functions.insert(kernel, function);
        Ok(function.handle)
    }
}

/// Compares number and sizes of the arguments with what the kernel was compiled to take.
fn check_parameters(
    kernel: Kernel,
    handle: sys::CUfunction,
    arguments: &[Argument],
) -> Result<(), Error> {
    let parameter = |index| {
        let (mut offset, mut size) = (0, 0);
        // SAFETY: the function is loaded for good, and the two numbers outlive the call.
        let asked = unsafe { sys::cuFuncGetParamInfo(handle, index, &mut offset, &mut size) };
        (asked == sys::CUresult::CUDA_SUCCESS).then_some(size)
    };
    let expected = (0..).map_while(parameter);
    let found = arguments.iter().map(|argument| argument.bytes as usize);
    if expected.eq(found) {
        return Ok(());
    }
    let message = format!(
        "`{}` is called with other parameters than it has",
        kernel.symbol()
    );
    Err(failed(kernel.function, message))
}

/// Most arguments of a kernel.
const MOST_ARGUMENTS: usize = 24;

fn driver(call: &'static str) -> impl Fn(result::DriverError) -> Error {
    move |error| failed(call, error.to_string())
}

fn poisoned<T>(error: std::sync::PoisonError<T>) -> Error {
    failed("cuda.device", error.to_string())
}

fn failed(call: &'static str, message: String) -> Error {
    Error::Cuda { call, message }
}
