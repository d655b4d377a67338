//! Who waits for a ticket, and for what: seen by the communication thread, which serves waiters at
//! once, and by a [`Monitor`], which tells others about them and can end their waiting.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::members::Members;
use super::nccl::Gpus;

/// An operation as people know it.
#[derive(Clone, Debug, Default)]
pub(super) struct Label {
    pub(super) operation: &'static str,
    pub(super) lane: Arc<Members>,
}

/// The threads of a rank that wait for tickets at the moment.
#[derive(Clone, Debug, Default)]
pub(super) struct Waiters(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    count: AtomicUsize,
    interrupted: AtomicBool,
    /// What the thread that began to wait last waits for.
    label: Mutex<Option<Label>>,
    /// The rank's communicators between GPUs, where it has some.
    gpus: OnceLock<Gpus>,
}

impl Shared {
    fn label(&self) -> MutexGuard<'_, Option<Label>> {
        // The value is replaced in one assignment, so a panic elsewhere cannot leave it torn.
        self.label.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiters {
    /// Counts a waiter for `label` for as long as the guard lives.
    pub(super) fn enter(&self, label: &Label) -> WaiterGuard<'_> {
        self.0.count.fetch_add(1, Ordering::Relaxed);
        *self.0.label() = Some(label.clone());
        WaiterGuard(&self.0)
    }

    /// Whether there is one.
    pub(super) fn any(&self) -> bool {
        self.0.count.load(Ordering::Relaxed) > 0
    }

    /// The rank's communicators between GPUs.
    pub(super) fn gpus(&self) -> Option<&Gpus> {
        self.0.gpus.get()
    }

    /// Makes `gpus` the rank's communicators. The first ones stay.
    pub(super) fn set_gpus(&self, gpus: Gpus) {
        let _ = self.0.gpus.set(gpus);
    }

    /// Whether nobody shall wait any longer.
    pub(super) fn interrupted(&self) -> bool {
        self.0.interrupted.load(Ordering::Acquire)
    }
}

/// A thread that waits.
pub(super) struct WaiterGuard<'a>(&'a Shared);

impl Drop for WaiterGuard<'_> {
    fn drop(&mut self) {
        if self.0.count.fetch_sub(1, Ordering::Relaxed) == 1 {
            *self.0.label() = None;
        }
    }
}

/// A look from outside at what a rank waits for.
#[derive(Clone, Debug)]
pub struct Monitor(pub(super) Waiters);

impl Monitor {
    /// The collective that the rank waits for now, as in `all-gather on lane 1 (ranks 0, 1)`; on a
    /// GPU, the oldest that has begun and not ended.
    #[must_use]
    pub fn waiting(&self) -> Option<String> {
        let label = self.0.0.label().clone();
        let label = label.or_else(|| self.0.gpus()?.running());
        label.map(|Label { operation, lane }| format!("{operation} on {lane}"))
    }

    /// Ends all waiting of this rank, now and from now on, with
    /// [`Error::Interrupted`](super::Error::Interrupted): what the other ranks would have to do
    /// will not be done. Operations stay with the communication thread; those on GPUs are aborted,
    /// so that whoever waits for a stream goes on, over memory that holds parts of results.
    pub fn interrupt(&self) {
        self.0.0.interrupted.store(true, Ordering::Release);
        if let Some(gpus) = self.0.gpus() {
            gpus.interrupt();
        }
    }
}
