//! What this machine offers to a run: processor, libraries, GPUs.
//!
//! Everything is asked for as a run would ask, so what is found here is what a run finds.

use std::path::PathBuf;

use oxitron_kernels::{cuda, probe, simd};

use crate::comm;
use crate::metrics::{peaks, units::bytes};

/// One thing that a run may need.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fact {
    /// What it is.
    pub name: String,
    /// What was found, or what is missing and the remedy.
    pub found: Result<String, String>,
}

/// What was found out about a machine.
#[derive(Clone, Debug)]
pub struct Machine {
    /// What every run needs.
    pub general: Vec<Fact>,
    /// What a run on GPUs needs.
    pub gpu: Vec<Fact>,
}

impl Machine {
    /// Looks around. Loads the libraries that a run on a GPU would load, where they are there.
    pub fn examine() -> Self {
        let instructions = simd::requested().map(|_| simd::level().name().to_owned());
        let amx = if probe::has_amx_bf16() {
            "with"
        } else {
            "without"
        };
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let mut general = vec![
            fact(
                "processor",
                instructions.map(|level| {
                    format!("{cores} cores for this process, {level} kernels, {amx} AMX")
                }),
            ),
            fact(
                "libtorch",
                cuda::libtorch().map(shown).ok_or_else(|| {
                    "the folder that libtorch was loaded from is unknown".to_owned()
                }),
            ),
            fact("MPI", Ok(comm::mpi_library())),
        ];
        if let Some(total) = memory() {
            general.insert(1, fact("memory", Ok(bytes(total))));
        }
        let pieces = cuda::pieces().iter();
        let mut gpu: Vec<Fact> = pieces
            .map(|(piece, found)| fact(piece.purpose(), found.clone().map(shown)))
            .collect();
        match cuda::devices() {
            Ok(devices) => gpu.extend(devices.into_iter().enumerate().map(|(ordinal, device)| {
                let cuda::DeviceInfo {
                    name,
                    architecture,
                    memory,
                } = device;
                let peak = peaks::bf16_tflops(&name).map_or_else(
                    || "peak in bf16 unknown".to_owned(),
                    |peak| format!("{peak} TFLOP/s in bf16 at most"),
                );
                let found = format!("{name}, {architecture}, {}, {peak}", bytes(memory));
                fact(&format!("GPU {ordinal}"), Ok(found))
            })),
            // That there is no driver has been said.
            Err(error) if cuda::has_driver() => {
                gpu.push(fact("GPU", Err(error.to_string())));
            }
            Err(_) => {}
        }
        Machine { general, gpu }
    }

    /// What keeps a run from computing on GPUs, the first thing that does.
    pub fn why_no_gpu(&self) -> Option<&str> {
        self.gpu
            .iter()
            .find_map(|fact| fact.found.as_ref().err().map(String::as_str))
    }
}

fn fact(name: &str, found: Result<String, String>) -> Fact {
    Fact {
        name: name.to_owned(),
        found,
    }
}

fn shown(path: PathBuf) -> String {
    path.display().to_string()
}

/// Bytes of memory, where the system says so.
fn memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kibibytes: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kibibytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_says_what_it_has_and_what_it_lacks() {
        let machine = Machine::examine();
        let names: Vec<&str> = machine
            .general
            .iter()
            .map(|fact| fact.name.as_str())
            .collect();
        assert_eq!(names, ["processor", "memory", "libtorch", "MPI"]);
        assert!(machine.general.iter().all(|fact| fact.found.is_ok()));
        let gpu: Vec<&str> = machine.gpu.iter().map(|fact| fact.name.as_str()).collect();
        assert!(
            gpu.starts_with(&["NVIDIA driver", "libtorch for CUDA"]),
            "{gpu:?}"
        );
        let missing = machine.gpu.iter().any(|fact| fact.found.is_err());
        assert_eq!(machine.why_no_gpu().is_some(), missing);
    }
}
