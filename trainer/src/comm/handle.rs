//! A rank's handle on its communication thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

use tch::Tensor;

use super::engine::{self, Command};
use super::environment::Environment;
use super::error::{Error, Result};
use super::lane::Lane;
use super::members::Members;
use super::nccl::{Gpus, ID_BYTES, Nccl};
use super::schedule::Place;
use super::threads;
use super::waiters::{Monitor, Waiters};

/// How long a handle that is dropped without [`Comm::finish`] waits for the other ranks before it
/// brings them down.
const DROP_LIMIT: Duration = Duration::from_secs(3);

/// What a rank that aborts a run of processes writes to standard error between its name and the
/// reason, as in `rank 3 ends the run: the disk is full`. A launcher can tell the rank by it, where
/// the MPI library does not say who called `MPI_Abort`.
pub const ABORT_MARK: &str = "ends the run:";

/// Lane numbers are message tags; this is the smallest upper bound that MPI allows a library.
const MAX_LANES: u32 = 32_767;

/// One rank's part in the communication of a run.
///
/// It owns the communication thread. End it with [`Comm::finish`] when all went well and with
/// [`Comm::abort`] when the other ranks must not go on. Dropped without either, it behaves like
/// `finish` with a limit of three seconds, after which it aborts; dropped by a panic, it aborts.
#[derive(Debug)]
pub struct Comm {
    rank: usize,
    world: usize,
    local_rank: usize,
    local_world: usize,
    next_lane: AtomicU32,
    waiters: Waiters,
    /// Absent in a world of one.
    link: Option<Link>,
}

#[derive(Debug)]
struct Link {
    commands: Sender<Command>,
    thread: JoinHandle<()>,
}

impl Comm {
    /// A world of this one process. Operations return at once.
    #[must_use]
    pub fn solo() -> Self {
        Self::new((0, 1), (0, 1), Waiters::default(), None)
    }

    /// A world of `world` ranks in this process, one handle for each, to be moved to its thread.
    ///
    /// # Errors
    /// [`Error::Start`] when `world` is 0 or the system refuses a thread.
    pub fn threads(world: usize) -> Result<Vec<Self>> {
        match world {
            0 => {
                return Err(Error::Start(
                    "a world needs at least one rank, found 0".to_owned(),
                ));
            }
            1 => return Ok(vec![Self::solo()]),
            _ => {}
        }
        let start = |(rank, transport)| {
            let (commands, received) = mpsc::channel();
            let waiters = Waiters::default();
            let counted = waiters.clone();
            let thread = spawn(rank, move || engine::run(transport, &received, counted))?;
            let link = Some(Link { commands, thread });
            Ok(Self::new((rank, world), (rank, world), waiters, link))
        };
        threads::world(world)
            .into_iter()
            .enumerate()
            .map(start)
            .collect()
    }

    /// Joins the run that the environment describes: a world of MPI processes under `mpirun`,
    /// `srun --mpi=pmix` and their like, else a world of one.
    ///
    /// # Errors
    /// [`Error::Start`], with the remedy, when the process was started as one of several but MPI
    /// cannot see the others, or when MPI is needed and this program was built without it.
    pub fn from_environment() -> Result<Self> {
        let environment = Environment::read();
        environment.check_alone()?;
        if !environment.under_mpi {
            return Ok(Self::solo());
        }
        #[cfg(feature = "mpi")]
        return Self::mpi();
        #[cfg(not(feature = "mpi"))]
        match environment.expected_world {
            Some((expected, _)) if expected > 1 => Err(Error::Start(format!(
                "this is one of {expected} MPI processes, but the program was built without the \
                 cargo feature `mpi`; build it with `--features mpi`"
            ))),
            _ => Ok(Self::solo()),
        }
    }

    /// Joins the world of MPI processes that this process was started in. MPI is initialised,
    /// used and finalised on the communication thread only, once per process.
    ///
    /// # Errors
    /// [`Error::Start`] when MPI cannot be initialised with thread support, or when it found
    /// another number of ranks than the launcher started (see [`Environment::check_world`]).
    #[cfg(feature = "mpi")]
    pub fn mpi() -> Result<Self> {
        let environment = Environment::read();
        environment.check_alone()?;
        let (commands, received) = mpsc::channel();
        let (report, started) = mpsc::channel();
        let waiters = Waiters::default();
        let counted = waiters.clone();
        let run = move || {
            let start = super::mpi::Mpi::start().map_err(Error::Start);
            match start.and_then(|(transport, position)| {
                environment.check_world(position.world)?;
                Ok((transport, position))
            }) {
                Ok((transport, position)) => {
                    let _ = report.send(Ok(position));
                    engine::run(transport, &received, counted);
                }
                Err(error) => {
                    let _ = report.send(Err(error));
                }
            }
        };
        let thread = spawn(Environment::read().rank.unwrap_or(0), run)?;
        let ended = |_| Error::Start("the communication thread ended during start-up".to_owned());
        let position = started.recv().map_err(ended)??;
        let (rank, world) = (position.rank, position.world);
        let local = (position.local_rank, position.local_world);
        let link = Some(Link { commands, thread });
        Ok(Self::new((rank, world), local, waiters, link))
    }

    fn new(
        (rank, world): (usize, usize),
        (local_rank, local_world): (usize, usize),
        waiters: Waiters,
        link: Option<Link>,
    ) -> Self {
        Self {
            rank,
            world,
            local_rank,
            local_world,
            next_lane: AtomicU32::new(0),
            waiters,
            link,
        }
    }

    /// This rank, from 0.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The number of ranks.
    #[must_use]
    pub fn world(&self) -> usize {
        self.world
    }

    /// This rank among those of the same host, from 0.
    #[must_use]
    pub fn local_rank(&self) -> usize {
        self.local_rank
    }

    /// The number of ranks on this host.
    #[must_use]
    pub fn local_world(&self) -> usize {
        self.local_world
    }

    /// A look from outside at what this rank waits for.
    #[must_use]
    pub fn monitor(&self) -> Monitor {
        Monitor(self.waiters.clone())
    }

    /// Joins the GPUs of all ranks: number `ordinal` of this process is this rank's, and of no other
    /// rank. Lanes that are made from here on carry tensors of it as well as of the CPU.
    ///
    /// Every rank calls it at the same point, and once: it is a collective of its own, and so is from
    /// then on the making of a lane.
    ///
    /// # Errors
    /// [`Error::Start`], with the remedy, when NCCL is missing or cannot bring the GPUs together.
    pub fn open_gpu(&self, ordinal: usize) -> Result<()> {
        self.join_gpus(Nccl::load(ordinal))
    }

    /// The same with emulated GPUs, whose tensors are those of the CPU on threads whose ops take a
    /// GPU's path.
    #[cfg(test)]
    pub(crate) fn open_emulated_gpu(&self) -> Result<()> {
        self.join_gpus(Nccl::emulated())
    }

    pub(super) fn join_gpus(&self, nccl: Result<Nccl>) -> Result<()> {
        if self.waiters.gpus().is_some() {
            return Err(Error::Start("a rank opens its GPU once".to_owned()));
        }
        let everyone: Vec<usize> = (0..self.world).collect();
        let lane = self.lane(&everyone)?;
        let id = match (&nccl, self.rank) {
            (Ok(nccl), 0) => nccl.unique_id(),
            (Ok(_), _) => Ok([0; ID_BYTES]),
            (Err(error), _) => Err(error.clone()),
        };
        let torch = |error: tch::TchError| Error::Start(error.to_string());
        // A rank that fails must not be waited for by the others.
        let failed = [f64::from(u8::from(id.is_err()))];
        let failed = Tensor::f_from_slice(&failed).map_err(torch)?;
        let (failed, _) = lane.all_reduce(failed).wait()?;
        let failed = failed.f_double_value(&[0]).map_err(torch)?;
        let (nccl, id) = (nccl?, id?);
        if failed > 0.0 {
            let reason = "another rank cannot use NCCL: see its log".to_owned();
            return Err(Error::Start(reason));
        }
        let id = Tensor::f_from_slice(&id).map_err(torch)?;
        let (id, _) = lane.broadcast(id, 0).wait()?;
        let id = Vec::<u8>::try_from(&id).map_err(torch)?;
        let id = id.try_into().unwrap_or([0; ID_BYTES]);
        let place = Place {
            index: self.rank,
            size: self.world,
        };
        self.waiters
            .set_gpus(Gpus::join(nccl, id, place, &self.waiters)?);
        Ok(())
    }

    /// As [`Lane::check`].
    ///
    /// # Errors
    /// As there.
    pub fn check(&self) -> Result<()> {
        self.waiters
            .gpus()
            .map_or(Ok(()), |gpus| gpus.check(&self.waiters))
    }

    /// Creates a lane over `ranks` (in any order; the lane sorts them), of which this rank is one.
    ///
    /// Every rank of the world must create its lanes in the same order: the *n*-th lane of one rank
    /// talks to the *n*-th lane of the others. The groups of the *n*-th lanes may differ between
    /// ranks as long as they do not overlap, as the shard groups of a mesh do. Creating a lane sends
    /// nothing, unless it is to carry tensors of GPUs ([`Comm::open_gpu`]): then it waits for the
    /// other ranks of the world.
    ///
    /// # Errors
    /// [`Error::InvalidLane`] for ranks that are not distinct ranks of this world with this one
    /// among them; [`Error::Start`] when NCCL cannot bring its GPUs together.
    pub fn lane(&self, ranks: &[usize]) -> Result<Lane> {
        let invalid = |reason| Error::InvalidLane {
            ranks: ranks.to_vec(),
            rank: self.rank,
            world: self.world,
            reason,
        };
        let mut sorted = ranks.to_vec();
        sorted.sort_unstable();
        if sorted.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(invalid("a rank appears twice"));
        }
        if sorted.last().is_some_and(|&last| last >= self.world) {
            return Err(invalid("a rank is not of this world (ranks count from 0)"));
        }
        let index = sorted
            .binary_search(&self.rank)
            .map_err(|_| invalid("this rank is not among them"))?;
        let id = self.next_lane.fetch_add(1, Ordering::Relaxed);
        if id >= MAX_LANES {
            return Err(invalid(
                "there are too many lanes; create each once and keep it",
            ));
        }
        let place = Place {
            index,
            size: sorted.len(),
        };
        let commands = self.link.as_ref().map(|link| link.commands.clone());
        let waiters = self.waiters.clone();
        let members = Arc::new(Members { id, ranks: sorted });
        let gpu = match self.waiters.gpus() {
            Some(gpus) => gpus.lane(&members, place, self.world, &self.waiters)?,
            None => None,
        };
        Ok(Lane::new(members, place, self.rank, commands, waiters, gpu))
    }

    /// Runs everything that is queued to its end, waits for all ranks to get here and leaves. A
    /// process of several must not exit with an error before: its launcher would end the others.
    ///
    /// # Errors
    /// [`Error::Closed`] when the communication thread could not leave cleanly. Failed operations
    /// are reported by their tickets, not here.
    pub fn finish(mut self) -> Result<()> {
        let rank = self.rank;
        // Before the transport, by which ranks learn of each other's failures.
        let gpus = self.leave_gpus(None);
        let Some(link) = self.link.take() else {
            return gpus;
        };
        link.leave(None)
            .map_err(|reason| Error::Closed { rank, reason })?;
        gpus
    }

    fn leave_gpus(&self, limit: Option<Duration>) -> Result<()> {
        let gpus = self.waiters.gpus();
        gpus.map_or(Ok(()), |gpus| gpus.finish(limit, &self.waiters))
    }

    fn abort_gpus(&self, reason: &str) {
        if let Some(gpus) = self.waiters.gpus() {
            gpus.abort(reason);
        }
    }

    /// Leaves without meeting the others, because operations are under way that will never end. MPI
    /// is not finalised: the process must end right after, and so must all others of the run.
    pub fn desert(mut self) {
        self.abort_gpus("the rank has left in the middle of a step");
        if let Some(link) = self.link.take() {
            // The thread goes on to poll for the rest of the process's life.
            std::mem::forget(link);
        }
    }

    /// Brings the other ranks down because this one cannot go on: the last resort. Between
    /// processes it prints `reason` to standard error and does not return (`MPI_Abort`); between
    /// threads, the operations of all other ranks that involve this one fail with `reason`. Alone,
    /// it does nothing.
    pub fn abort(&self, reason: &str) {
        if let Some(link) = &self.link {
            link.abort(reason);
        }
        self.abort_gpus(reason);
    }
}

impl Drop for Comm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            if let Some(link) = self.link.take() {
                link.abort("it panicked");
            }
            return self.abort_gpus("it panicked");
        }
        if let Err(error) = self.leave_gpus(Some(DROP_LIMIT)) {
            tracing::error!(rank = self.rank, "left the other GPUs uncleanly: {error}");
        }
        let Some(link) = self.link.take() else { return };
        if let Err(reason) = link.leave(Some(DROP_LIMIT)) {
            tracing::error!(rank = self.rank, reason, "left the other ranks uncleanly");
        }
    }
}

impl Link {
    fn leave(self, limit: Option<Duration>) -> Result<(), String> {
        let (done, left) = mpsc::channel();
        let ended = "the communication thread has ended early".to_owned();
        let sent = self.commands.send(Command::Leave { limit, done }).is_ok();
        let outcome = if sent {
            left.recv().unwrap_or(Err(ended))
        } else {
            Err(ended)
        };
        // After this no thread of ours is inside the MPI library.
        match self.thread.join() {
            Ok(()) => outcome,
            Err(_) => Err("the communication thread panicked".to_owned()),
        }
    }

    fn abort(&self, reason: &str) {
        let (done, aborted): (_, Receiver<()>) = mpsc::channel();
        if self
            .commands
            .send(Command::Abort {
                reason: reason.to_owned(),
                done,
            })
            .is_ok()
        {
            // An error means that the thread is gone, which is all that is wanted here.
            let _ = aborted.recv();
        }
    }
}

fn spawn(rank: usize, run: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name(format!("oxitron-comm-{rank}"))
        .spawn(run)
        .map_err(|error| Error::Start(format!("cannot start the communication thread: {error}")))
}
