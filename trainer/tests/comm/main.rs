//! One conformance suite for every way of talking between ranks.
//!
//! The suite ([`suite`]) runs on worlds of threads of this process and on worlds of MPI processes:
//! for the latter this program starts itself under `mpirun`. On a machine with a GPU it also runs on
//! NCCL with one rank; with several ranks on emulated GPUs it is part of the library's tests. It is its own test harness, since a
//! process that initialises MPI must have nothing else in it; it understands as much of the usual
//! arguments as `cargo test` and `cargo nextest` need.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod chains;
mod huge;
mod schedules;
mod suite;
mod values;
mod walk;
mod watch;

use std::process::ExitCode;
#[cfg(feature = "mpi")]
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use oxitron_trainer::comm::Comm;

use watch::watch;

/// A deadlock is a failure, not a hung build.
const TIME_LIMIT: Duration = Duration::from_secs(120);

/// Random schedules on threads, for each mesh. On processes there are an eighth of them.
const SCHEDULES: u64 = 96;

/// Another number of them, to look for a rare fault.
const SCHEDULES_VARIABLE: &str = "OXITRON_TEST_COMM_SCHEDULES";

/// Schedules that share their lanes. New ones now and then, because a lane remembers.
const SHARED_LANES: u64 = 8;

/// World and shard group sizes of the random schedules.
const MESHES: [(usize, usize); 3] = [(2, 1), (2, 2), (4, 2)];

/// Tells this program that it is a rank of an MPI case.
#[cfg(feature = "mpi")]
const RANK_MARK: &str = "OXITRON_TEST_COMM_RANK";

struct Case {
    name: String,
    run: Box<dyn Fn()>,
}

fn case(name: impl Into<String>, run: impl Fn() + 'static) -> Case {
    Case {
        name: name.into(),
        run: Box::new(run),
    }
}

fn cases() -> Vec<Case> {
    let mut cases = vec![case("solo", || suite::run(Comm::solo()))];
    for world in 1..=5 {
        cases.push(case(format!("threads::world_of_{world}"), move || {
            on_threads(world)
        }));
    }
    cases.push(case(
        "threads::a_rank_that_aborts_fails_its_peers",
        suite::peers_of_an_abort_fail,
    ));
    cases.push(case(
        "threads::other_lengths_poison_the_lane",
        suite::other_lengths_fail,
    ));
    cases.push(case("threads::more_than_2^31_elements", huge::all_gather));
    cases.push(case("nccl::world_of_1", on_nccl));
    for (world, shard) in MESHES {
        let name = format!("threads::random_schedules_of_{world}_in_groups_of_{shard}");
        cases.push(case(name, move || schedules_on_threads(world, shard)));
    }
    #[cfg(feature = "mpi")]
    for (world, shard) in MESHES {
        let name = format!("mpi::random_schedules_of_{world}_in_groups_of_{shard}");
        cases.push(case(name, move || on_mpi(world, &shard.to_string())));
    }
    #[cfg(feature = "mpi")]
    for world in 1..=4 {
        cases.push(case(format!("mpi::world_of_{world}"), move || {
            on_mpi(world, "suite")
        }));
    }
    #[cfg(feature = "mpi")]
    cases.push(case(
        "mpi::an_abort_ends_all_processes",
        an_abort_ends_all_processes,
    ));
    cases
}

fn on_threads(world: usize) {
    suite::each_rank(Comm::threads(world).unwrap(), suite::run);
}

/// NCCL with one rank, on the first GPU.
fn on_nccl() {
    match oxitron_kernels::cuda::prepare(0, Default::default()) {
        Err(missing) => println!("skipped: {missing}"),
        Ok(name) => {
            println!("on {name}");
            values::work_on(tch::Device::Cuda(0));
            let comm = Comm::solo();
            comm.open_gpu(0).unwrap();
            suite::run(comm);
            values::work_on(tch::Device::Cpu);
        }
    }
}

fn schedule_count() -> u64 {
    let count = std::env::var(SCHEDULES_VARIABLE);
    count.map_or(SCHEDULES, |count| count.parse().unwrap())
}

fn schedules_on_threads(world: usize, shard: usize) {
    for first in (0..schedule_count()).step_by(SHARED_LANES as usize) {
        suite::each_rank(Comm::threads(world).unwrap(), move |comm| {
            schedules::run(&comm, shard, first..first + SHARED_LANES);
            comm.finish().unwrap();
        });
    }
}

/// An eighth of the schedules, and other ones than on threads.
#[cfg(feature = "mpi")]
fn schedules_on_mpi(comm: Comm, shard: usize) {
    let begin = 1 << 32;
    for first in (begin..begin + schedule_count() / 8).step_by(SHARED_LANES as usize) {
        schedules::run(&comm, shard, first..first + SHARED_LANES);
    }
    comm.finish().unwrap();
}

/// This program under `mpirun`, as ranks that run the suite, or fail (`part = "abort"`), or run the
/// random schedules on shard groups of as many ranks as `part` says.
#[cfg(feature = "mpi")]
fn mpirun(world: usize, part: &str) -> Command {
    let program = std::env::current_exe().unwrap();
    let mut mpirun = Command::new("mpirun");
    mpirun.args([
        "--bind-to",
        "none",
        "--oversubscribe",
        "-n",
        &world.to_string(),
    ]);
    mpirun
        .arg(program)
        .env(RANK_MARK, part)
        .env("OMP_NUM_THREADS", "1")
        .stdin(Stdio::null());
    for name in ["OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] {
        mpirun.env(name, "1");
    }
    mpirun
}

#[cfg(feature = "mpi")]
fn on_mpi(world: usize, part: &str) {
    let status = mpirun(world, part).status();
    let status = status.expect("mpirun must be installed: apt install openmpi-bin");
    assert!(status.success(), "mpirun -n {world} ended with {status}");
}

/// One rank aborts while the others wait for it: all end soon, and its reason is there to read.
#[cfg(feature = "mpi")]
fn an_abort_ends_all_processes() {
    let begun = Instant::now();
    let output = mpirun(3, "abort")
        .output()
        .expect("mpirun must be installed");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{said}");
    assert!(
        begun.elapsed() < Duration::from_secs(10),
        "took {:?}",
        begun.elapsed()
    );
    assert!(
        said.contains("rank 1 ends the run: the disk is full"),
        "{said}"
    );
}

fn main() -> ExitCode {
    #[cfg(feature = "mpi")]
    if let Ok(part) = std::env::var(RANK_MARK) {
        let _watched = watch(TIME_LIMIT, format!("a rank of {part}"));
        let comm = Comm::mpi().unwrap();
        match (part.as_str(), part.parse()) {
            ("abort", _) => suite::one_rank_aborts(comm),
            (_, Ok(shard)) => schedules_on_mpi(comm, shard),
            _ => suite::run(comm),
        }
        return ExitCode::SUCCESS;
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let flag = |name: &str| arguments.iter().any(|argument| argument == name);
    let words: Vec<&String> = arguments.iter().filter(|a| !a.starts_with('-')).collect();
    let chosen = |name: &str| match flag("--exact") {
        true => words.iter().any(|word| *word == name),
        false => words.is_empty() || words.iter().any(|word| name.contains(word.as_str())),
    };
    if flag("--list") {
        if !flag("--ignored") {
            cases()
                .iter()
                .for_each(|case| println!("{}: test", case.name));
        }
        return ExitCode::SUCCESS;
    }
    if flag("--ignored") {
        return ExitCode::SUCCESS;
    }
    if !cfg!(feature = "mpi") {
        println!("skipped: the cases on MPI processes, because the feature `mpi` is off");
    }
    for case in cases().into_iter().filter(|case| chosen(&case.name)) {
        let _watched = watch(TIME_LIMIT, case.name.clone());
        let begun = Instant::now();
        // A failed assertion of a rank on a thread reaches this thread as a panic and ends the
        // program with an error; so there is no count of failures to keep.
        (case.run)();
        println!(
            "test {} ... ok ({:.2} s)",
            case.name,
            begun.elapsed().as_secs_f64()
        );
    }
    ExitCode::SUCCESS
}
