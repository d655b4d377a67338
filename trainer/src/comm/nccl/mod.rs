//! Collectives between GPUs: NCCL behind the same lanes.
//!
//! Each rank has one GPU. A lane over several ranks that was made after the GPUs were opened has a
//! half for tensors of that GPU ([`GpuLane`]): a communicator, split off that of all ranks, and a
//! stream. An operation becomes calls of NCCL (`calls`) when it is called, on the thread that calls,
//! so that all ranks issue in the order of the plan; events order the lane's stream with the one that
//! computes, and no host waits.
//!
//! ```text
//! current stream   compute ─┬─ compute ─────────── compute ──┬─ compute, uses the result
//!                     event │                    ticket.wait │ event
//! lane's stream             └─▶ reduce-scatter ─▶ … ─────────┘
//! ```
//!
//! What is particular:
//!
//! - **Failures are seen later.** A call that succeeds only says that its kernels will run. So every
//!   further call asks whether the communicator is well, and so does whoever waits for the GPU
//!   ([`Lane::check`](super::Lane::check)). A communicator that has failed, or whose step has been
//!   given up ([`Monitor::interrupt`](super::Monitor::interrupt)), is aborted: kernels that wait for
//!   a peer end, and streams go on over memory that holds parts of results.
//! - **Nothing of NCCL is linked.** `library` is a table of functions from the library that came with
//!   PyTorch. In tests the table can be another one (`emulated`): ranks are threads, streams are
//!   queues with a thread each, and misuse that would hang GPUs is an error.

mod calls;
mod communicator;
mod copies;
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod emulated;
mod lane;
mod library;
mod pending;
#[cfg(test)]
mod ranks;
mod stream;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::error::{Error, Result};
use super::members::Members;
use super::schedule::Place;
use super::waiters::{Label, Waiters};
use communicator::Communicator;
pub(super) use copies::Copies;
pub(super) use lane::GpuLane;
pub(super) use library::ID_BYTES;
use library::{Library, Version};
pub(super) use pending::{End, Pending};
pub use pending::{GpuSeconds, Times};
pub(super) use stream::Gpu;

/// How long the ranks may take to leave together.
const FINISH_LIMIT: Duration = Duration::from_secs(60);

/// Where a rank finds NCCL, and the GPU that it is for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Nccl {
    library: &'static Library,
    version: Version,
    gpu: Gpu,
}

impl Nccl {
    /// For GPU number `ordinal` of this process.
    ///
    /// # Errors
    /// [`Error::Start`] with what is missing.
    pub(super) fn load(ordinal: usize) -> Result<Self> {
        Self::of(Library::load().map_err(Error::Start)?, Gpu::Real(ordinal))
    }

    fn of(library: &'static Library, gpu: Gpu) -> Result<Self> {
        Ok(Self {
            library,
            version: library.version().map_err(Error::Start)?,
            gpu,
        })
    }

    /// Emulated, for tensors of the CPU.
    #[cfg(test)]
    pub(super) fn emulated() -> Result<Self> {
        Self::of(emulated::library(), Gpu::Emulated)
    }

    /// By which the ranks of a world find each other.
    ///
    /// # Errors
    /// [`Error::Start`].
    pub(super) fn unique_id(&self) -> Result<[u8; ID_BYTES]> {
        self.library.unique_id().map_err(Error::Start)
    }
}

/// The communicators of one rank.
#[derive(Clone, Debug)]
pub(super) struct Gpus(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    nccl: Nccl,
    /// That all others are split off. Nothing else happens on it.
    world: Communicator,
    /// In the order in which they were made.
    lanes: Mutex<Vec<GpuLane>>,
}

impl Gpus {
    /// Joins all ranks, each with its GPU; they have the same `id`.
    ///
    /// # Errors
    /// [`Error::Start`] with NCCL's words and a remedy.
    pub(super) fn join(
        nccl: Nccl,
        id: [u8; ID_BYTES],
        place: Place,
        waiters: &Waiters,
    ) -> Result<Self> {
        nccl.gpu.bind().map_err(Error::Start)?;
        let world = Communicator::of_world(nccl.library, id, place, waiters)?;
        tracing::debug!(version = %nccl.version, "joined the GPUs of {} ranks", place.size);
        Ok(Self(Arc::new(Shared {
            nccl,
            world,
            lanes: Mutex::default(),
        })))
    }

    /// The GPU half of a lane, which every rank makes at the same point. One rank among several has
    /// nobody to talk to and gets none.
    ///
    /// # Errors
    /// [`Error::Start`] with NCCL's words and a remedy.
    pub(super) fn lane(
        &self,
        members: &Arc<Members>,
        place: Place,
        world: usize,
        waiters: &Waiters,
    ) -> Result<Option<GpuLane>> {
        let Shared { nccl, .. } = &*self.0;
        nccl.gpu.bind().map_err(Error::Start)?;
        let takes_one = place.size > 1 || world == 1;
        let split = self.0.world.split(members, place, takes_one, waiters)?;
        let lane = |communicator| {
            let lane = GpuLane::new(nccl.gpu, nccl.version, communicator, place);
            lane.map_err(Error::Start)
        };
        let lane = split.map(lane).transpose()?;
        self.lanes().extend(lane.iter().cloned());
        Ok(lane)
    }

    fn lanes(&self) -> MutexGuard<'_, Vec<GpuLane>> {
        // Only ever extended.
        self.0.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// # Errors
    /// What a communicator says.
    pub(super) fn check(&self, waiters: &Waiters) -> Result<()> {
        let lanes = self.lanes().clone();
        lanes.iter().try_for_each(|lane| lane.check(waiters))?;
        self.0.world.check(&self.0.world.label("split"), waiters)
    }

    /// An operation that has begun and not ended.
    pub(super) fn running(&self) -> Option<Label> {
        let lanes = self.lanes().clone();
        lanes.iter().find_map(GpuLane::running)
    }

    /// Aborts everything, because the step is given up.
    pub(super) fn interrupt(&self) {
        self.abort_with(communicator::interrupted);
    }

    /// Aborts everything because of `reason`.
    pub(super) fn abort(&self, reason: &str) {
        self.abort_with(|label| Error::Gpu {
            lane: label.lane.to_string(),
            operation: label.operation,
            reason: reason.to_owned(),
        });
    }

    fn abort_with(&self, error: impl Fn(&Label) -> Error + Copy) {
        let lanes = self.lanes().clone();
        for lane in &lanes {
            lane.abort(error);
        }
        let world = &self.0.world;
        world.abort(error(&world.label("split")));
    }

    /// Leaves the other ranks' GPUs once everything that is under way is done, within `limit` or a
    /// minute.
    ///
    /// # Errors
    /// What NCCL says; everything is aborted then.
    pub(super) fn finish(&self, limit: Option<Duration>, waiters: &Waiters) -> Result<()> {
        let deadline = Instant::now() + limit.unwrap_or(FINISH_LIMIT);
        let lanes = self.lanes().clone();
        let communicators = lanes.iter().map(GpuLane::communicator);
        let mut all = communicators.chain([&self.0.world]);
        let finished = all.try_for_each(|one| one.finish(waiters, deadline));
        if finished.is_err() {
            self.abort("it leaves");
        }
        finished
    }
}
