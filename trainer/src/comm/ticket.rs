//! Tickets: the two ends of one operation's future result.
//!
//! The step thread keeps a [`Ticket`], the communication thread the matching [`Promise`]. The promise
//! of an operation on GPUs is kept as soon as it is issued: what it hands over is the knowledge of
//! where in the lane's stream the operation ends. A ticket
//! may be dropped without waiting: the promise then owns the tensor until the operation is done. A
//! promise that is dropped without a result (the communication thread died) wakes the waiter with
//! an error, so nobody waits for ever.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tch::Tensor;

use super::error::{Error, Result};
use super::event::{Ending, Event};
use super::nccl::{Pending, Times};
use super::waiters::{Label, Waiters};

/// What one operation cost this rank.
#[derive(Debug, Default)]
pub struct Traffic {
    /// Payload bytes that this rank sent to others; on GPUs, those that it sends on around a ring.
    pub bytes_sent: u64,
    /// When it started: it had reached the head of its lane, and what it comes after had ended.
    /// Absent when there was nothing to do, on a lane of one rank, and on GPUs, whose clock is
    /// another one.
    pub begun: Option<Instant>,
    /// Seconds from `begun` to its end. The part of them that a step had to wait for is measured by
    /// the caller of [`Ticket::wait`]. Zero on GPUs, where both are not known yet.
    pub busy_seconds: f64,
    /// On GPUs, what will be known of both once their streams have come so far.
    pub on_gpu: Option<Times>,
}

/// How often a waiter looks whether it has been interrupted.
const LOOK: Duration = Duration::from_millis(100);

/// What a ticket that has not failed gives.
pub(super) enum Given {
    /// The operation has ended.
    Ended(Tensor, Traffic),
    /// It has been issued to a GPU, which is to end it.
    Issued(Pending),
}

type Outcome = Result<Given>;

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
    /// On a GPU the current stream of this thread waits, and the host goes on at once: work that is
    /// issued from here on finds the result. What the operation comes to is then seen later, by
    /// [`Lane::check`](super::Lane::check).
    ///
    /// # Errors
    /// Whatever stopped the operation; it names the lane, the operation and the peer.
    /// [`Error::Interrupted`] when it is not done and nobody shall wait for it.
    pub fn wait(self) -> Result<(Tensor, Traffic)> {
        let mut outcome = self.slot.lock();
        let mut waiting = None;
        loop {
            match outcome.take() {
                None => {}
                Some(Ok(Given::Ended(tensor, traffic))) => return Ok((tensor, traffic)),
                Some(Ok(Given::Issued(pending))) => {
                    drop(outcome);
                    return pending.wait(&self.label, &self.waiters);
                }
                Some(Err(error)) => return Err(error),
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

    /// Whether the operation has ended, so that [`Ticket::wait`] would wait for nothing.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        match &*self.slot.lock() {
            None => false,
            Some(Ok(Given::Issued(pending))) => pending.is_done(),
            Some(_) => true,
        }
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
        self.event.happen(match &outcome {
            Ok(Given::Ended(..)) => Ending::Well,
            Ok(Given::Issued(pending)) => Ending::Issued(pending.ends().to_vec()),
            Err(error) => Ending::Badly(Arc::new(error.clone())),
        });
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
            on_gpu: None,
        };
        let begun = traffic.begun;
        promise.fulfil(Ok(Given::Ended(Tensor::from_slice(&[1f32, 2.0]), traffic)));
        assert!(ticket.is_ready());
        let (tensor, seen) = ticket.wait().unwrap();
        assert_eq!(Vec::<f32>::try_from(&tensor).unwrap(), [1.0, 2.0]);
        assert_eq!(
            (seen.bytes_sent, seen.begun, seen.busy_seconds),
            (8, begun, 0.5)
        );
    }
}
