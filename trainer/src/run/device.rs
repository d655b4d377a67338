//! Where a run computes: the processor, or a GPU for each rank.

use oxitron_kernels::cuda::{self, DeviceMemory, Numerics};
use oxitron_kernels::memory;
use oxitron_kernels::product::Engine;
use oxitron_kernels::simd;

use super::RunError;
use super::memory::Peak;
use super::plan::{dtype_name, kind};
use crate::comm::Comm;
use crate::config::{self, Config, Dtype};
use crate::metrics::peaks;

/// The device that the configuration names, for a plan: nothing is asked of it.
pub fn planned(config: &Config) -> tch::Device {
    match config.run.device {
        config::Device::Auto | config::Device::Cpu => tch::Device::Cpu,
        config::Device::Cuda => tch::Device::Cuda(0),
    }
}

/// Makes the device of this rank ready: the GPU with the number that the rank has on its node.
///
/// # Errors
/// [`RunError::Plan`] for what cannot compute there, with what is missing.
pub(super) fn open(config: &Config, comm: &Comm) -> Result<tch::Device, RunError> {
    if config.run.device != config::Device::Cuda {
        return Ok(tch::Device::Cpu);
    }
    if comm.world() > 1 {
        return Err(RunError::Plan(format!(
            "`run.device` is \"cuda\" with {} ranks, but gradients do not travel between GPUs yet: \
             start one rank, or compute on the processor",
            comm.world()
        )));
    }
    let numerics = Numerics {
        deterministic: config.run.deterministic,
        ..Numerics::default()
    };
    let prepare = || cuda::prepare(comm.local_rank(), numerics);
    let name = prepare().map_err(|error| RunError::Plan(format!("`run.device`: {error}")))?;
    tracing::info!("computing on {name}");
    Ok(tch::Device::Cuda(comm.local_rank()))
}

/// What computes, in a few words.
pub(super) fn described(device: tch::Device, dtype: Dtype) -> String {
    let name = dtype_name(dtype);
    match device {
        tch::Device::Cuda(ordinal) => format!("{name}, GPU {ordinal}"),
        _ => format!(
            "{name}, {}, products {}",
            simd::level().name(),
            Engine::of(kind(dtype)).name()
        ),
    }
}

/// Most bytes of tensors on the device at once, as its allocator counts them.
pub(super) fn peak_bytes(device: tch::Device) -> u64 {
    peak(device).allocated
}

/// The same, with what the allocator has taken for them; both count from [`reset_peak`].
pub(super) fn peak(device: tch::Device) -> Peak {
    match device {
        tch::Device::Cuda(ordinal) => {
            let memory = DeviceMemory::read(ordinal).unwrap_or_default();
            Peak {
                allocated: memory.allocated_peak,
                reserved: Some(memory.reserved_peak),
            }
        }
        _ => Peak {
            allocated: memory::stats().peak_bytes,
            reserved: None,
        },
    }
}

/// Lets the peak begin again from what is held now.
pub(super) fn reset_peak(device: tch::Device) -> Result<(), RunError> {
    match device {
        tch::Device::Cuda(ordinal) => DeviceMemory::reset_peak(ordinal)?,
        _ => memory::reset_peak(),
    }
    Ok(())
}

/// Most bf16 operations per second of a rank's device: as stated, or known by the name of the GPU.
/// Nobody states that of a processor, and the share of an unknown peak is not a figure.
pub(super) fn peak_flops(config: &Config, device: tch::Device, dtype: Dtype) -> Option<f64> {
    const TERA: f64 = 1e12;
    if let Some(stated) = config.run.peak_tflops {
        return Some(stated * TERA);
    }
    let (tch::Device::Cuda(ordinal), Dtype::Bf16) = (device, dtype) else {
        return None;
    };
    let name = cuda::devices().ok()?.into_iter().nth(ordinal)?.name;
    let known = peaks::bf16_tflops(&name);
    if known.is_none() {
        tracing::info!(
            "what a {name} does at most is not known, so `mfu` and `hfu` are left out; state it as \
             `run.peak_tflops`"
        );
    }
    Some(known? * TERA)
}
