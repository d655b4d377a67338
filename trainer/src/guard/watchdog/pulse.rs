//! What the step thread tells the watchdog, cheap enough for every action.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::gate::{Abandoned, Gate, Mark};

/// What a rank is busy with.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub enum Phase {
    /// Before the first step: loading, planning.
    #[default]
    Starting,
    /// Waiting for the batch.
    Data,
    /// Forward pass.
    Forward,
    /// Backward pass.
    Backward,
    /// Optimizer update.
    Update,
    /// The step's control reduction.
    Control,
    /// Validation.
    Validate,
    /// Saving a checkpoint.
    Save,
    /// After the last step: closing files, leaving.
    Finishing,
}

impl Phase {
    const ALL: [Self; 9] = [
        Self::Starting,
        Self::Data,
        Self::Forward,
        Self::Backward,
        Self::Update,
        Self::Control,
        Self::Validate,
        Self::Save,
        Self::Finishing,
    ];

    /// In a sentence: "no progress in …".
    pub fn name(self) -> &'static str {
        match self {
            Self::Starting => "start",
            Self::Data => "data",
            Self::Forward => "forward",
            Self::Backward => "backward",
            Self::Update => "update",
            Self::Control => "control",
            Self::Validate => "validation",
            Self::Save => "save",
            Self::Finishing => "finish",
        }
    }
}

/// Steps whose times are kept until the next heartbeat; of more, the newest.
pub(super) const KEPT_TIMES: usize = 16;

/// Says that the step is not abandoned.
const NOT_ABANDONED: u64 = u64::MAX;

/// A rank's state as its step thread tells it and its watchdog reads it.
///
/// Everything but [`Pulse::submit_control`], [`Pulse::begin`] and [`Pulse::busy_seconds`], called
/// once a step, is a store into an atomic.
#[derive(Debug)]
pub struct Pulse {
    phase: AtomicU8,
    step: AtomicU64,
    /// Calls of `progress` since the step began; ranks walk the same actions, so it compares them.
    action: AtomicU64,
    /// Grows with every sign of progress.
    progress: AtomicU64,
    gate: Mutex<Gate>,
    abandoned: AtomicU64,
    /// Beside `gate`.
    changed: Condvar,
    busy: Mutex<Vec<(u64, f64)>>,
}

impl Default for Pulse {
    fn default() -> Self {
        Self {
            phase: AtomicU8::new(Phase::Starting as u8),
            step: AtomicU64::new(0),
            action: AtomicU64::new(0),
            progress: AtomicU64::new(0),
            gate: Mutex::default(),
            abandoned: AtomicU64::new(NOT_ABANDONED),
            changed: Condvar::new(),
            busy: Mutex::default(),
        }
    }
}

impl Pulse {
    /// Enters a phase.
    pub fn phase(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
        self.progress.fetch_add(1, Ordering::Relaxed);
    }

    /// Begins step `step`.
    pub fn step(&self, step: u64) {
        self.step.store(step, Ordering::Relaxed);
        self.action.store(0, Ordering::Relaxed);
        self.progress.fetch_add(1, Ordering::Relaxed);
    }

    /// Ends an action of the step, a chunk of a save, or whatever else shows that this rank goes
    /// on. Call it alike on all ranks within a step: who has called it least is behind.
    pub fn progress(&self) {
        self.action.fetch_add(1, Ordering::Relaxed);
        self.progress.fetch_add(1, Ordering::Relaxed);
    }

    /// Says how long this rank itself computed in the step just done: its time less what it waited
    /// for other ranks.
    pub fn busy_seconds(&self, seconds: f64) {
        if !(seconds.is_finite() && seconds >= 0.0) {
            return;
        }
        let mut busy = lock(&self.busy);
        if busy.len() == KEPT_TIMES {
            busy.remove(0);
        }
        busy.push((self.step.load(Ordering::Relaxed), seconds));
    }

    /// Says that this rank holds the state after `step`: at the start of a run, new or resumed, and
    /// whenever it goes back to an older state. All ranks call it equally often.
    ///
    /// # Errors
    /// [`Abandoned`] when the run is being stopped where it stands.
    pub fn begin(&self, step: u64) -> Result<(), Abandoned> {
        lock(&self.gate).begin(step)?;
        self.step(step);
        Ok(())
    }

    /// To be called right before the control reduction of `step` is submitted.
    ///
    /// # Errors
    /// [`Abandoned`] when it must not be submitted: the ranks are about to save the state before
    /// this step, or before an earlier one that has not completed anywhere.
    pub fn submit_control(&self, step: u64) -> Result<(), Abandoned> {
        lock(&self.gate).submit(step)
    }

    /// The step whose state is to be saved, once a step has been abandoned. Cheap; look at it
    /// between layers.
    ///
    /// The step after it is the one under way, and can complete nowhere: leave it. A rank that is
    /// still busy with the update *of* this step, because it got the result of the control
    /// reduction late, finishes that update first; see [`Pulse::must_abandon`].
    pub fn abandoned(&self) -> Option<u64> {
        let step = self.abandoned.load(Ordering::SeqCst);
        (step != NOT_ABANDONED).then_some(step)
    }

    /// Whether step `step`, which is under way, is to be left without an update.
    pub fn must_abandon(&self, step: u64) -> bool {
        self.abandoned().is_some_and(|kept| step > kept)
    }

    /// Waits for what [`Pulse::abandoned`] says, after [`Abandoned`] was returned.
    pub fn wait_for_abandon(&self, limit: Duration) -> Option<u64> {
        let until = Instant::now() + limit;
        let mut gate = lock(&self.gate);
        loop {
            if let Some(step) = self.abandoned() {
                return Some(step);
            }
            let left = until.checked_duration_since(Instant::now())?;
            gate = self
                .changed
                .wait_timeout(gate, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Closes the gate and says what it has let through.
    pub(super) fn freeze(&self) -> Mark {
        lock(&self.gate).freeze()
    }

    /// Leaves whatever comes after `mark`. False when this rank has gone back to an older state
    /// that others have not, so that it cannot hold the state of `mark`.
    pub(super) fn abandon(&self, mark: Mark) -> bool {
        let gate = lock(&self.gate);
        self.abandoned.store(mark.step, Ordering::SeqCst);
        self.changed.notify_all();
        gate.submitted().beginnings == mark.beginnings
    }

    /// The state to be sent, without what is waited for.
    pub(super) fn read(&self) -> PulseState {
        let phase = usize::from(self.phase.load(Ordering::Relaxed));
        PulseState {
            phase: Phase::ALL.get(phase).copied().unwrap_or_default(),
            step: self.step.load(Ordering::Relaxed),
            action: self.action.load(Ordering::Relaxed),
            progress: self.progress.load(Ordering::Relaxed),
            busy: std::mem::take(&mut *lock(&self.busy)),
            waits_for: None,
        }
    }
}

/// A rank's state on its way to rank 0.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct PulseState {
    pub(super) phase: Phase,
    pub(super) step: u64,
    pub(super) action: u64,
    pub(super) progress: u64,
    /// Steps and their own seconds since the last report.
    pub(super) busy: Vec<(u64, f64)>,
    /// The collective that the step thread waits for.
    pub(super) waits_for: Option<String>,
}

/// Locks what no panic can leave half done.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn phases_survive_their_number() {
        let pulse = Pulse::default();
        for phase in Phase::ALL {
            pulse.phase(phase);
            assert_eq!(pulse.read().phase, phase);
        }
    }

    #[test]
    fn a_frozen_gate_lets_only_the_old_step_through() {
        let pulse = Pulse::default();
        pulse.begin(10).unwrap();
        pulse.submit_control(11).unwrap();
        assert_eq!(pulse.freeze().step, 11);
        assert_eq!(pulse.submit_control(11), Ok(()));
        assert_eq!(pulse.submit_control(12), Err(Abandoned));
        assert_eq!(pulse.begin(5), Err(Abandoned));
        assert_eq!(pulse.abandoned(), None);
        assert!(pulse.abandon(Mark {
            beginnings: 1,
            step: 10
        }));
        assert_eq!(pulse.abandoned(), Some(10));
        assert!(pulse.must_abandon(11) && !pulse.must_abandon(10));
        assert_eq!(pulse.wait_for_abandon(Duration::ZERO), Some(10));
    }

    #[test]
    fn a_rank_that_went_back_cannot_hold_an_older_mark() {
        let pulse = Pulse::default();
        pulse.begin(0).unwrap();
        pulse.begin(5).unwrap();
        assert!(!pulse.abandon(Mark {
            beginnings: 1,
            step: 9
        }));
    }

    #[test]
    fn times_are_handed_over_once_and_bounded() {
        let pulse = Pulse::default();
        pulse.busy_seconds(f64::NAN);
        for step in 0..40 {
            pulse.step(step);
            pulse.busy_seconds(0.5);
        }
        let busy = pulse.read().busy;
        assert_eq!(busy.len(), KEPT_TIMES);
        assert_eq!(busy.last(), Some(&(39, 0.5)));
        assert!(pulse.read().busy.is_empty());
    }
}
