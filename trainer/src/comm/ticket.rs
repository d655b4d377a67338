//! Tickets: the two ends of one operation's future result.
//!
//! The step thread keeps a [`Ticket`], the communication thread the matching [`Promise`]. A ticket
//! may be dropped without waiting: the promise then owns the tensor until the operation is done. A
//! promise that is dropped without a result (the communication thread died) wakes the waiter with
//! an error, so nobody waits for ever.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tch::Tensor;

use super::error::{Error, Result};
use super::event::Event;
use super::waiters::{Label, Waiters};

/// What one operation cost this rank.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Traffic {
    /// Payload bytes that this rank sent to others.
    pub bytes_sent: u64,
    /// When it started: it had reached the head of its lane, and what it comes after had ended.
    /// Absent when there was nothing to do, on a lane of one rank.
    pub begun: Option<Instant>,
    /// Seconds from `begun` to its end. The part of them that a step had to wait for is measured by
    /// the caller of [`Ticket::wait`].
    pub busy_seconds: f64,
}

/// How often a waiter looks whether it has been interrupted.
const LOOK: Duration = Duration::from_millis(100);

type Outcome = Result<(Tensor, Traffic)>;

struct Slot {
    outcome: Mutex<Option<Outcome>>,
    done: Condvar,
}

impl Slot {
    fn lock(&self) -> MutexGuard<'_, Option<Outcome>> {
        // The value is replaced in one assignment, so a panic elsewhere cannot leave it torn.
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The claim to a tensor that an operation on a lane is working on.
#[must_use = "wait for the ticket to get the tensor back and to learn whether the operation failed"]
pub struct Ticket {
    slot: Arc<Slot>,
    event: Event,
    label: Label,
    waiters: Waiters,
}

impl Ticket {
    /// Blocks until the operation is done and gives the tensor back.
    ///
    /// # Errors
    /// Whatever stopped the operation; it names the lane, the operation and the peer.
    /// [`Error::Interrupted`] when it is not done and nobody shall wait for it.
    pub fn wait(self) -> Result<(Tensor, Traffic)> {
        let mut outcome = self.slot.lock();
        let mut waiting = None;
        loop {
            if let Some(outcome) = outcome.take() {
                return outcome;
            }
            if self.waiters.interrupted() {
                return Err(Error::Interrupted {
                    lane: self.label.lane.to_string(),
                    operation: self.label.operation,
                });
            }
            waiting.get_or_insert_with(|| self.waiters.enter(&self.label));
            let woken = self.slot.done.wait_timeout(outcome, LOOK);
            outcome = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Whether [`Ticket::wait`] would return at once.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.slot.lock().is_some()
    }

    /// The end of the operation, for those that come after it.
    pub(super) fn event(&self) -> Event {
        self.event.clone()
    }
}

impl std::fmt::Debug for Ticket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ticket")
            .field("ready", &self.is_ready())
            .finish()
    }
}

/// The end of a ticket that the communication thread holds.
pub(super) struct Promise {
    slot: Arc<Slot>,
    event: Event,
    rank: usize,
}

impl Promise {
    /// A promise and its ticket, for an operation of `rank`; whoever waits for the ticket counts
    /// among `waiters`.
    pub(super) fn new(rank: usize, label: Label, waiters: Waiters) -> (Self, Ticket) {
        let slot = Arc::new(Slot {
            outcome: Mutex::new(None),
            done: Condvar::new(),
        });
        let event = Event::default();
        (
            Self {
                slot: Arc::clone(&slot),
                event: event.clone(),
                rank,
            },
            Ticket {
                slot,
                event,
                label,
                waiters,
            },
        )
    }

    /// Hands the outcome to whoever holds the ticket.
    pub(super) fn fulfil(self, outcome: Outcome) {
        self.end(outcome);
    }

    /// The event comes first: whoever has the outcome may count on it.
    fn end(&self, outcome: Outcome) {
        let failure = outcome.as_ref().err().map(|error| Arc::new(error.clone()));
        self.event.happen(failure);
        *self.slot.lock() = Some(outcome);
        self.slot.done.notify_all();
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        // `fulfil` drops too; its outcome (perhaps taken by the waiter already) must stand.
        if !self.event.has_happened() {
            let reason = "it stopped before the operation was done".to_owned();
            self.end(Err(Error::Closed {
                rank: self.rank,
                reason,
            }));
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_lost_promise_wakes_the_waiter_with_an_error() {
        let (promise, ticket) = Promise::new(3, Label::default(), Waiters::default());
        assert!(!ticket.is_ready());
        let waiter = std::thread::spawn(move || ticket.wait());
        drop(promise);
        let error = waiter.join().unwrap().unwrap_err().to_string();
        assert!(error.contains("rank 3"), "{error}");
    }

    #[test]
    fn a_waiter_is_seen_and_can_be_interrupted() {
        let waiters = Waiters::default();
        let monitor = super::super::Monitor(waiters.clone());
        let (promise, ticket) = Promise::new(3, Label::default(), waiters.clone());
        assert_eq!(monitor.waiting(), None);
        let waiter = std::thread::spawn(move || ticket.wait());
        while monitor.waiting().is_none() {
            std::thread::yield_now();
        }
        assert!(waiters.any());
        monitor.interrupt();
        let error = waiter.join().unwrap().unwrap_err();
        assert!(matches!(error, Error::Interrupted { .. }), "{error}");
        assert_eq!(monitor.waiting(), None);
        drop(promise);
    }

    #[test]
    fn a_fulfilled_promise_hands_over_the_tensor_once() {
        let (promise, ticket) = Promise::new(0, Label::default(), Waiters::default());
        let traffic = Traffic {
            bytes_sent: 8,
            begun: Some(Instant::now()),
            busy_seconds: 0.5,
        };
        promise.fulfil(Ok((Tensor::from_slice(&[1f32, 2.0]), traffic)));
        assert!(ticket.is_ready());
        let (tensor, seen) = ticket.wait().unwrap();
        assert_eq!(Vec::<f32>::try_from(&tensor).unwrap(), [1.0, 2.0]);
        assert_eq!(seen, traffic);
    }
}
