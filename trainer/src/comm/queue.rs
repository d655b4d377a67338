//! The queue of one lane: one operation runs, the rest wait behind it.
//!
//! An operation starts when it is at the head and every operation that it comes after (on other
//! lanes) has ended well. A queue whose head may not start yet reports that nothing moved, so it
//! waits at the price of any other wait. A failure poisons the queue for good.

use std::collections::VecDeque;
use std::sync::Arc;

use super::active::{Active, Broken, Polled};
use super::error::Error;
use super::event::Gate;
use super::members::Members;
use super::operation::Operation;
use super::schedule::Scratch;
use super::ticket::Promise;
use super::transport::Transport;

/// The first-in-first-out queue of one lane.
pub(super) struct LaneQueue<R> {
    waiting: VecDeque<Operation>,
    active: Option<Active<R>>,
    scratch: Scratch,
    failure: Option<Arc<Error>>,
}

impl<R> Default for LaneQueue<R> {
    fn default() -> Self {
        Self {
            waiting: VecDeque::new(),
            active: None,
            scratch: Scratch::default(),
            failure: None,
        }
    }
}

impl<R> LaneQueue<R> {
    /// Queues `operation`, or ends it at once on a lane that is poisoned.
    pub(super) fn push(&mut self, operation: Operation) {
        match &self.failure {
            None => self.waiting.push_back(operation),
            Some(cause) => operation.poison(cause),
        }
    }

    /// Whether an operation runs or waits.
    pub(super) fn busy(&self) -> bool {
        self.active.is_some() || !self.waiting.is_empty()
    }

    /// Advances the head of the queue; whether anything moved.
    pub(super) fn poll<T: Transport<Request = R>>(&mut self, transport: &mut T) -> bool {
        let mut moved = false;
        loop {
            moved |= self.start_head();
            let Some(active) = &mut self.active else {
                return moved;
            };
            match active.poll(transport, &mut self.scratch) {
                Ok(Polled::Same) => return moved,
                Ok(Polled::Moved) => return true,
                Ok(Polled::Done) => {
                    if let Some(active) = self.active.take() {
                        active.succeed();
                    }
                    moved = true;
                }
                Err(broken) => {
                    self.fail(broken, transport);
                    return true;
                }
            }
        }
    }

    /// Lets the next operation run if none does and it may; whether one did start, or failed.
    fn start_head(&mut self) -> bool {
        if self.active.is_some() {
            return false;
        }
        let gate = match self.waiting.front() {
            None => return false,
            Some(head) => head.gate(),
        };
        if matches!(gate, Gate::Shut | Gate::Behind(_)) {
            return false;
        }
        let Some(head) = self.waiting.pop_front() else {
            return false;
        };
        match gate {
            Gate::Broken(cause) => self.poison(head.miss(cause)),
            _ => self.active = Some(Active::new(head)),
        }
        true
    }

    /// Poisons the lane: the head fails with what happened, the rest because of it.
    fn fail<T: Transport<Request = R>>(&mut self, broken: Broken, transport: &mut T) {
        let Some(head) = self.abandon(transport) else {
            return;
        };
        let cause = Error::Failed {
            lane: head.lane.to_string(),
            operation: head.name,
            peer: broken.peer,
            reason: broken.reason,
        };
        head.promise.fulfil(Err(cause.clone()));
        self.poison(Arc::new(cause));
    }

    /// Ends everything that waits, and whatever will be queued, because of `cause`.
    fn poison(&mut self, cause: Arc<Error>) {
        self.waiting
            .drain(..)
            .for_each(|operation| operation.poison(&cause));
        self.failure = Some(cause);
    }

    /// Ends everything without a reason of its own: the promises speak when they are dropped.
    pub(super) fn clear<T: Transport<Request = R>>(&mut self, transport: &mut T) {
        self.abandon(transport);
        self.waiting.clear();
    }

    /// Gives up the head's messages. Memory that the transport may still touch is leaked.
    fn abandon<T: Transport<Request = R>>(&mut self, transport: &mut T) -> Option<Abandoned> {
        let (operation, released) = self.active.take()?.give_up(transport);
        let Operation {
            name,
            lane,
            tensor,
            phases,
            promise,
            ..
        } = operation;
        if !released {
            std::mem::forget((tensor, phases, std::mem::take(&mut self.scratch)));
        }
        Some(Abandoned {
            name,
            lane,
            promise,
        })
    }
}

/// What is left of an operation whose memory has been given up.
struct Abandoned {
    name: &'static str,
    lane: Arc<Members>,
    promise: Promise,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::collections::VecDeque;

    use tch::Tensor;

    use super::super::event::{Ending, Event};
    use super::super::threads::{self, Request};
    use super::*;

    #[test]
    fn a_head_that_may_not_start_moves_nothing_and_lets_none_pass() {
        let mut transport = threads::world(2).remove(0);
        let mut queue: LaneQueue<Request> = LaneQueue::default();
        let event = Event::default();
        let tickets = [vec![event.clone()], Vec::new()].map(|after| {
            let (promise, ticket) = Promise::new(0, Default::default(), Default::default());
            queue.push(Operation {
                name: "nothing",
                lane: Arc::new(Members {
                    id: 0,
                    ranks: vec![0, 1],
                }),
                tensor: Tensor::new(),
                into: None,
                phases: VecDeque::new(),
                after,
                promise,
            });
            ticket
        });
        for _ in 0..3 {
            // What moves nothing is polled with a growing pause.
            assert!(!queue.poll(&mut transport) && queue.busy());
        }
        assert!(tickets.iter().all(|ticket| !ticket.is_ready()));
        event.happen(Ending::Well);
        assert!(queue.poll(&mut transport) && !queue.busy());
        for ticket in tickets {
            assert!(ticket.wait().unwrap().1.begun.is_some());
        }
    }
}
