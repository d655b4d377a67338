//! One communicator of NCCL: made, called, and given up.
//!
//! It is non-blocking: a call returns at once, perhaps in progress, and is asked after until it is
//! done. So no thread is ever stuck inside NCCL, the lock is held for moments, and another thread can
//! abort the communicator at any time: the kernels that wait for a peer then end, and whoever waits
//! for their stream goes on.

use std::ffi::c_int;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cudarc::nccl::sys::{ncclComm, ncclComm_t, ncclUniqueId};

use super::super::backoff::{Backoff, Pause};
use super::super::error::{Error, Result};
use super::super::members::Members;
use super::super::schedule::Place;
use super::super::waiters::{Label, Waiters};
use super::library::{Code, ID_BYTES, IN_PROGRESS, Library, SUCCESS, settings};

/// How long ranks may take to make a communicator together.
const START_LIMIT: Duration = Duration::from_secs(180);

/// The colour of a rank that takes part in a split and goes into none of its communicators.
const NO_COLOUR: c_int = -1;

/// A communicator, and what became of it.
#[derive(Debug)]
pub(in super::super) struct Communicator {
    library: &'static Library,
    lane: Arc<Members>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Null once it is given up.
    handle: ncclComm_t,
    /// Why it was.
    failure: Option<Error>,
}

// SAFETY: NCCL takes its handles from any thread, one at a time; this one is used under a lock.
unsafe impl Send for State {}

/// Where NCCL puts a communicator, perhaps later and from a thread of its own. It stays where it is
/// until NCCL has done so, for good if need be.
struct Slot(Box<AtomicPtr<ncclComm>>);

impl Slot {
    fn new() -> Self {
        Self(Box::new(AtomicPtr::new(null_mut())))
    }

    fn filled(&self) -> ncclComm_t {
        self.0.load(Ordering::Acquire)
    }

    /// Leaves it to NCCL.
    fn abandon(self) {
        std::mem::forget(self.0);
    }
}

impl Communicator {
    /// The communicator of all ranks, which make it together: they have the same `id`.
    ///
    /// # Errors
    /// [`Error::Start`] with NCCL's words.
    pub(super) fn of_world(
        library: &'static Library,
        id: [u8; ID_BYTES],
        place: Place,
        waiters: &Waiters,
    ) -> Result<Self> {
        let slot = Slot::new();
        let id = ncclUniqueId {
            internal: id.map(|byte| byte as std::ffi::c_char),
        };
        let mut settings = settings();
        // SAFETY: the slot stays until it is filled, the settings through the call, which copies
        // them; this thread is bound to the rank's GPU.
        let code = unsafe {
            (library.init)(
                slot.0.as_ptr(),
                place.size as c_int,
                id,
                place.index as c_int,
                &mut settings,
            )
        };
        let everyone = Arc::new(Members {
            id: 0,
            ranks: (0..place.size).collect(),
        });
        Self::finished(library, everyone, slot, code, waiters)
    }

    /// Takes part in splitting this communicator, as every rank of it must at the same point:
    /// members of the same lane get a communicator of their own, those of lanes without get none.
    ///
    /// # Errors
    /// [`Error::Start`] with NCCL's words.
    pub(super) fn split(
        &self,
        lane: &Arc<Members>,
        place: Place,
        takes_one: bool,
        waiters: &Waiters,
    ) -> Result<Option<Self>> {
        let slot = Slot::new();
        let mut settings = settings();
        let colour = match takes_one {
            true => lane.ranks.first().map_or(NO_COLOUR, |&rank| rank as c_int),
            false => NO_COLOUR,
        };
        let label = Label {
            operation: "split",
            lane: Arc::clone(lane),
        };
        let deadline = Instant::now() + START_LIMIT;
        // The communicator that is split is busy until its ranks have met.
        let split = self.call(&label, waiters, Some(deadline), |library, handle| {
            // SAFETY: as in `of_world`; the handle is alive.
            unsafe {
                (library.split)(
                    handle,
                    colour,
                    place.index as c_int,
                    slot.0.as_ptr(),
                    &mut settings,
                )
            }
        });
        if let Err(error) = split {
            slot.abandon();
            return Err(error);
        }
        if colour == NO_COLOUR {
            return Ok(None);
        }
        let lane = Arc::clone(lane);
        Self::finished(self.library, lane, slot, SUCCESS, waiters).map(Some)
    }

    /// Waits until the communicator that `code` has begun to make is ready.
    fn finished(
        library: &'static Library,
        lane: Arc<Members>,
        slot: Slot,
        code: Code,
        waiters: &Waiters,
    ) -> Result<Self> {
        let deadline = Instant::now() + START_LIMIT;
        let mut backoff = Backoff::default();
        let outcome = loop {
            if !matches!(code, SUCCESS | IN_PROGRESS) {
                break library.outcome(code, slot.filled());
            }
            let handle = slot.filled();
            let mut state = IN_PROGRESS;
            if !handle.is_null() {
                // SAFETY: NCCL has made the handle; the number outlives the call.
                let asked = unsafe { (library.async_error)(handle, &mut state) };
                if asked != SUCCESS {
                    break library.outcome(asked, handle);
                }
            }
            match state {
                SUCCESS => break Ok(()),
                IN_PROGRESS if waiters.interrupted() => break Err("it is given up".to_owned()),
                IN_PROGRESS if Instant::now() > deadline => {
                    break Err(format!(
                        "not all ranks have come to it within {} seconds",
                        START_LIMIT.as_secs()
                    ));
                }
                IN_PROGRESS => pause(&mut backoff),
                failed => break library.outcome(failed, handle),
            }
        };
        let handle = slot.filled();
        match outcome {
            Ok(()) => Ok(Self {
                library,
                lane,
                state: Mutex::new(State {
                    handle,
                    failure: None,
                }),
            }),
            Err(reason) => {
                if handle.is_null() {
                    slot.abandon();
                } else {
                    // SAFETY: the handle is NCCL's, and nobody uses it after this.
                    unsafe { (library.abort)(handle) };
                }
                Err(Error::Start(format!(
                    "no communicator between the GPUs of {lane}: {reason}; NCCL_DEBUG=WARN shows what \
                     NCCL does, NCCL_SOCKET_IFNAME which network it takes"
                )))
            }
        }
    }

    /// An operation of its lane, for messages.
    pub(super) fn label(&self, operation: &'static str) -> Label {
        Label {
            operation,
            lane: Arc::clone(&self.lane),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Handle and failure are replaced in one assignment each.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls NCCL for the operation of `label`, and waits until the call (not what it has put into a
    /// stream) is done, at most until `deadline`.
    ///
    /// # Errors
    /// [`Error::Gpu`] with NCCL's words, after which the communicator is aborted;
    /// [`Error::Interrupted`]; [`Error::Poisoned`] where it is given up already.
    pub(super) fn call(
        &self,
        label: &Label,
        waiters: &Waiters,
        deadline: Option<Instant>,
        call: impl FnOnce(&Library, ncclComm_t) -> Code,
    ) -> Result<()> {
        let mut code = {
            let state = self.lock();
            if state.handle.is_null() {
                return Err(refusal(&state, label, waiters));
            }
            call(self.library, state.handle)
        };
        let mut backoff = Backoff::default();
        loop {
            match code {
                SUCCESS => return Ok(()),
                IN_PROGRESS => {}
                failed => return Err(self.fail(label, failed)),
            }
            if waiters.interrupted() {
                let error = interrupted(label);
                self.abort(error.clone());
                return Err(error);
            }
            if deadline.is_some_and(|deadline| Instant::now() > deadline) {
                let error = broken(
                    label,
                    "the other ranks did not come to it in time".to_owned(),
                );
                self.abort(error.clone());
                return Err(error);
            }
            pause(&mut backoff);
            code = self.ask(label, waiters)?;
        }
    }

    /// NCCL's word on the communicator.
    fn ask(&self, label: &Label, waiters: &Waiters) -> Result<Code> {
        let state = self.lock();
        if state.handle.is_null() {
            return Err(refusal(&state, label, waiters));
        }
        let mut said = SUCCESS;
        // SAFETY: the handle is alive under the lock; the number outlives the call.
        let asked = unsafe { (self.library.async_error)(state.handle, &mut said) };
        Ok(if asked == SUCCESS { said } else { asked })
    }

    /// Whether all is well with it, as far as is known now. `label` is what is asked for, and is
    /// named in the error.
    ///
    /// # Errors
    /// As of [`Communicator::call`].
    pub(super) fn check(&self, label: &Label, waiters: &Waiters) -> Result<()> {
        match self.ask(label, waiters)? {
            SUCCESS | IN_PROGRESS => Ok(()),
            failed => Err(self.fail(label, failed)),
        }
    }

    #[cfg(test)]
    pub(super) fn handle(&self) -> ncclComm_t {
        self.lock().handle
    }

    /// What it was given up for.
    pub(super) fn failure(&self) -> Option<Error> {
        self.lock().failure.clone()
    }

    fn fail(&self, label: &Label, code: Code) -> Error {
        let reason = {
            let state = self.lock();
            self.library.outcome(code, state.handle)
        };
        let error = broken(label, reason.err().unwrap_or_default());
        self.abort(error.clone());
        error
    }

    /// Gives it up because of `failure`: what it has under way ends, with whatever is in memory.
    pub(super) fn abort(&self, failure: Error) {
        let mut state = self.lock();
        state.failure.get_or_insert(failure);
        let handle = std::mem::replace(&mut state.handle, null_mut());
        if !handle.is_null() {
            // SAFETY: nobody has the handle any more. What NCCL answers changes nothing.
            unsafe { (self.library.abort)(handle) };
        }
    }

    /// Ends it together with its other ranks, after everything that it has under way.
    ///
    /// # Errors
    /// What kept it from doing so before `deadline`; it is aborted then.
    pub(super) fn finish(&self, waiters: &Waiters, deadline: Instant) -> Result<()> {
        let label = self.label("leave");
        if self.lock().handle.is_null() {
            return Ok(());
        }
        self.call(&label, waiters, Some(deadline), |library, handle| {
            // SAFETY: the handle is alive.
            unsafe { (library.finalize)(handle) }
        })?;
        let handle = std::mem::replace(&mut self.lock().handle, null_mut());
        if handle.is_null() {
            return Ok(());
        }
        // SAFETY: finalized, and nobody has the handle any more.
        let code = unsafe { (self.library.destroy)(handle) };
        match code {
            SUCCESS | IN_PROGRESS => Ok(()),
            failed => Err(broken(
                &label,
                self.library
                    .outcome(failed, null_mut())
                    .err()
                    .unwrap_or_default(),
            )),
        }
    }
}

fn broken(label: &Label, reason: String) -> Error {
    Error::Gpu {
        lane: label.lane.to_string(),
        operation: label.operation,
        reason,
    }
}

pub(super) fn interrupted(label: &Label) -> Error {
    Error::Interrupted {
        lane: label.lane.to_string(),
        operation: label.operation,
    }
}

/// What an operation is told after the communicator has been given up.
fn refusal(state: &State, label: &Label, waiters: &Waiters) -> Error {
    match &state.failure {
        _ if waiters.interrupted() => interrupted(label),
        Some(cause) => Error::Poisoned {
            lane: label.lane.to_string(),
            operation: label.operation,
            cause: Arc::new(cause.clone()),
        },
        None => broken(label, "the rank has left the others".to_owned()),
    }
}

fn pause(backoff: &mut Backoff) {
    match backoff.next(true) {
        Pause::Spin => std::hint::spin_loop(),
        Pause::Yield => std::thread::yield_now(),
        Pause::Sleep(pause) => std::thread::sleep(pause),
    }
}
