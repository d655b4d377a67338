//! Reduce-scatter and all-gather of a 64 MiB f32 buffer on MPI ranks, beside Open MPI's own.
//!
//! `cargo bench -p oxitron-trainer --bench comm` (one profile: add `--profile release`) starts
//! itself under `mpirun` on 2 and 4 ranks, once per implementation, because MPI can be initialised
//! only once per process. Prints milliseconds (median of the slowest rank's) and one line of JSON.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[cfg(not(feature = "mpi"))]
fn main() {
    println!("skipped: needs the cargo feature `mpi`");
}

#[cfg(feature = "mpi")]
fn main() {
    measure::main();
}

#[cfg(feature = "mpi")]
mod measure {
    use std::process::Command;
    use std::time::Instant;

    use mpi::ffi;
    use mpi::topology::Communicator as _;
    use mpi::traits::AsRaw as _;
    use oxitron_trainer::comm::{Comm, Wire};
    use tch::{Device, Kind, Tensor};

    const BYTES: usize = 64 << 20;
    const REPEATS: usize = 15;
    const MARK: &str = "OXITRON_BENCH_COMM";

    pub fn main() {
        match std::env::var(MARK).as_deref() {
            Ok("own") => return own(),
            Ok("open-mpi") => return open_mpi(),
            _ => {}
        }
        println!("64 MiB of f32, milliseconds    reduce-scatter   (bf16)   all-gather");
        let mut record = Vec::new();
        for ranks in [2, 4] {
            for implementation in ["own", "open-mpi"] {
                let found = run(ranks, implementation);
                let label = format!("{ranks} ranks, {implementation}");
                println!(
                    "{label:<30} {:>14} {:>8} {:>12}",
                    found[0], found[1], found[2]
                );
                record.push(format!(
                    "{{\"ranks\":{ranks},\"implementation\":\"{implementation}\",\
                     \"reduce_scatter_ms\":{},\"reduce_scatter_bf16_ms\":{},\"all_gather_ms\":{}}}",
                    json(&found[0]),
                    json(&found[1]),
                    json(&found[2])
                ));
            }
        }
        println!("[{}]", record.join(","));
    }

    fn json(value: &str) -> &str {
        if value == "-" { "null" } else { value }
    }

    fn run(ranks: usize, implementation: &str) -> Vec<String> {
        let output = Command::new("mpirun")
            .args([
                "--bind-to",
                "none",
                "--oversubscribe",
                "-n",
                &ranks.to_string(),
            ])
            .arg(std::env::current_exe().unwrap())
            .env(MARK, implementation)
            .env("OMP_NUM_THREADS", "1")
            .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
            .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
            .output()
            .expect("mpirun must be installed");
        let text = String::from_utf8_lossy(&output.stdout);
        let line = text.lines().find_map(|line| line.strip_prefix("result "));
        let line = line.unwrap_or_else(|| panic!("{}", String::from_utf8_lossy(&output.stderr)));
        line.split_whitespace().map(str::to_owned).collect()
    }

    fn median(mut milliseconds: Vec<f64>) -> String {
        milliseconds.sort_by(f64::total_cmp);
        format!("{:.1}", milliseconds[milliseconds.len() / 2])
    }

    fn own() {
        let comm = Comm::mpi().unwrap();
        let everybody: Vec<usize> = (0..comm.world()).collect();
        let lane = comm.lane(&everybody).unwrap();
        let mut buffer = Tensor::ones([BYTES as i64 / 4], (Kind::Float, Device::Cpu));
        let mut results = Vec::new();
        for operation in 0..3 {
            let mut times = Vec::new();
            for _ in 0..REPEATS {
                let _ = lane.all_reduce(Tensor::from_slice(&[0f32])).wait().unwrap();
                let begun = Instant::now();
                let ticket = match operation {
                    0 => lane.reduce_scatter(buffer, Wire::F32),
                    1 => lane.reduce_scatter(buffer, Wire::Bf16),
                    _ => lane.all_gather(buffer),
                };
                buffer = ticket.wait().unwrap().0;
                times.push(begun.elapsed().as_secs_f64() * 1e3);
            }
            results.push(median(times));
        }
        if comm.rank() == 0 {
            println!("result {}", results.join(" "));
        }
        comm.finish().unwrap();
    }

    fn open_mpi() {
        let universe = mpi::initialize().unwrap();
        let world = universe.world();
        let size = world.size() as usize;
        let mut buffer = vec![1f32; BYTES / 4];
        let mut slice = vec![0f32; BYTES / 4 / size];
        let count = slice.len() as i32;
        let mut results = Vec::new();
        for operation in 0..2 {
            let mut times = Vec::new();
            for _ in 0..REPEATS {
                // SAFETY: both buffers live on, and their lengths are those of the calls.
                unsafe {
                    ffi::MPI_Barrier(world.as_raw());
                    let begun = Instant::now();
                    let (float, raw) = (ffi::RSMPI_FLOAT, world.as_raw());
                    let (whole, part) = (buffer.as_mut_ptr().cast(), slice.as_mut_ptr().cast());
                    if operation == 0 {
                        let sum = ffi::RSMPI_SUM;
                        ffi::MPI_Reduce_scatter_block(whole, part, count, float, sum, raw);
                    } else {
                        ffi::MPI_Allgather(part, count, float, whole, count, float, raw);
                    }
                    times.push(begun.elapsed().as_secs_f64() * 1e3);
                }
            }
            results.push(median(times));
        }
        if world.rank() == 0 {
            println!("result {} - {}", results[0], results[1]);
        }
    }
}
