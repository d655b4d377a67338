//! Where a run computes: the processor, or a GPU for each rank.

use oxitron_kernels::cuda::{self, DeviceMemory, Numerics, Piece};
use oxitron_kernels::memory;
use oxitron_kernels::product::Engine;
use oxitron_kernels::simd;

use super::RunError;
use super::memory::Peak;
use super::plan::{dtype_name, kind};
use super::ranks::Ranks;
use crate::comm::Comm;
use crate::config::{self, Config, Dtype};
use crate::metrics::peaks;

/// The device that the configuration names, for a plan: nothing is asked of it. What `auto` finds is
/// known where ranks start.
pub fn planned(config: &Config) -> tch::Device {
    match config.run.device {
        config::Device::Auto | config::Device::Cpu => tch::Device::Cpu,
        config::Device::Cuda => tch::Device::Cuda(0),
    }
}

/// Makes the device of this rank ready, and brings the GPUs of all ranks together: each rank takes
/// the GPU with the number that it has on its host. `auto` takes GPUs where every rank has one.
///
/// # Errors
/// [`RunError::Plan`] for what cannot compute there, with what is missing.
pub(super) fn open(config: &Config, comm: &Comm, ranks: &Ranks) -> Result<tch::Device, RunError> {
    let found = match config.run.device {
        config::Device::Cpu => return Ok(tch::Device::Cpu),
        config::Device::Auto if !cuda::has_driver() => Err("no NVIDIA driver".to_owned()),
        config::Device::Auto | config::Device::Cuda => find(comm),
    };
    if config.run.device == config::Device::Auto && !ranks.all(found.is_ok())? {
        // Without a driver nobody expects anything else.
        if let (Err(reason), true) = (&found, cuda::has_driver()) {
            tracing::info!("device auto: the processor, because of this: {reason}");
        }
        return Ok(tch::Device::Cpu);
    }
    let refused = |reason: String| RunError::Plan(format!("`run.device`: {reason}"));
    let numerics = Numerics {
        deterministic: config.run.deterministic,
        ..Numerics::default()
    };
    let ordinal = comm.local_rank();
    let prepared = found.map_err(refused).and_then(|()| {
        let prepared = cuda::prepare(ordinal, numerics);
        prepared.map_err(|error| refused(error.to_string()))
    });
    let name = ranks.together(prepared)?;
    tracing::info!("computing on {name}");
    if comm.world() > 1 {
        let joined = comm.open_gpu(ordinal);
        ranks.together(joined.map_err(|error| refused(error.to_string())))?;
    }
    Ok(tch::Device::Cuda(ordinal))
}

/// Whether this rank can have a GPU of its own, or what is missing.
fn find(comm: &Comm) -> Result<(), String> {
    for (piece, found) in cuda::pieces() {
        if *piece != Piece::Nccl || comm.world() > 1 {
            found.as_ref().map_err(Clone::clone)?;
        }
    }
    let seen = cuda::devices().map_err(|error| error.to_string())?.len();
    enough(seen, comm.local_world())
}

/// Refuses more ranks on a host than GPUs.
fn enough(seen: usize, local_ranks: usize) -> Result<(), String> {
    if seen >= local_ranks {
        return Ok(());
    }
    Err(format!(
        "this host has {local_ranks} ranks and this process sees {seen} GPUs, of which each rank \
         needs one: start at most as many ranks on a host as it has GPUs, and let every rank see all \
         of them (CUDA_VISIBLE_DEVICES; under Slurm `--gpus-per-node`, not `--gpus-per-task`)"
    ))
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn more_ranks_than_gpus_are_refused_with_both_numbers() {
        enough(8, 8).unwrap();
        enough(8, 1).unwrap();
        let error = enough(2, 3).unwrap_err();
        assert!(
            error.contains("3 ranks") && error.contains("sees 2 GPUs"),
            "{error}"
        );
        assert!(error.contains("CUDA_VISIBLE_DEVICES"), "{error}");
    }
}
