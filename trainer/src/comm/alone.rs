//! A lane of one rank: nothing travels, so operations run on the thread that calls them.
//!
//! Their tickets are ready at once, which spares the communication thread a wake-up for each. Only
//! an operation that must come after one of another lane that is still under way cannot run yet. It
//! goes to the queue of the communication thread like any other, and so does from then on everything
//! on this lane: what is called later may work on the same memory and must not overtake it.
//!
//! On a GPU, what there is to do goes into a stream of the lane's own, behind what it comes after.

use std::collections::VecDeque;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use super::engine::Command;
use super::error::Error;
use super::event::Gate;
use super::nccl::{Copies, Gpu, Pending};
use super::operation::{Operation, submit};
use super::schedule::{Round, Schedule, Scratch, Target};
use super::waiters::Label;

/// What an operation that comes after one on another device is told.
pub(super) const OTHER_DEVICE: &str =
    "it comes after an operation on tensors of another device; wait for that ticket first";

/// What the handles on one lane of one rank share.
#[derive(Debug, Default)]
pub(super) struct Alone {
    state: Mutex<State>,
    /// Made for the first operation on a GPU that has something to do.
    copies: Mutex<Option<Copies>>,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Direct,
    /// Everything goes to the communication thread.
    Queued,
    Failed(Arc<Error>),
}

impl Alone {
    /// Runs `operation` now, or queues it when it cannot run yet. In a world of one there are no
    /// `commands`; nothing of it can be under way then.
    pub(super) fn run(&self, operation: Operation, commands: Option<&Sender<Command>>) {
        // Held while the operation runs: handles on two threads must not run two at once. A panic
        // cannot leave the state torn.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match &*state {
            State::Direct => {}
            State::Queued => return submit(operation, commands),
            State::Failed(cause) => return operation.poison(cause),
        }
        match (operation.gate(), commands) {
            (Gate::Open, _) => run(operation),
            (Gate::Broken(cause), _) => *state = State::Failed(operation.miss(cause)),
            (Gate::Shut, Some(_)) => {
                *state = State::Queued;
                submit(operation, commands);
            }
            // An operation on a GPU, which the lane refuses to chain to.
            (Gate::Behind(_), _) => operation.refuse(OTHER_DEVICE.to_owned()),
            (Gate::Shut, None) => operation.refuse(
                "it comes after an operation of another communicator, which a world of one rank \
                 cannot wait for; wait for that ticket first"
                    .to_owned(),
            ),
        }
    }
}

impl Alone {
    /// Issues `operation`, on tensors of `gpu`, to the lane's stream there; its sum goes to `target`.
    /// What works in place has nothing to do, and ends with what it comes after.
    pub(super) fn run_on_gpu(&self, operation: Operation, target: Target, gpu: Gpu) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let State::Failed(cause) = &*state {
            return operation.poison(cause);
        }
        let behind = match operation.gate() {
            Gate::Open => Vec::new(),
            Gate::Behind(ends) => ends,
            Gate::Shut => return operation.refuse(OTHER_DEVICE.to_owned()),
            Gate::Broken(cause) => {
                *state = State::Failed(operation.miss(cause));
                return;
            }
        };
        let add = match target {
            Target::InPlace => {
                let (promise, tensor, into) = operation.into_parts();
                let pending = Pending::new(gpu, tensor, into, behind, 0);
                return Operation::issued(promise, pending);
            }
            Target::Write(_) => false,
            Target::Add(_) => true,
        };
        let mut copies = self.copies.lock().unwrap_or_else(PoisonError::into_inner);
        let copied = match copies.take() {
            Some(made) if made.gpu() == gpu => Ok(made),
            _ => Copies::new(gpu),
        };
        let copied = copied.and_then(|made| {
            let made = copies.insert(made);
            let label = Label {
                operation: operation.name,
                lane: Arc::clone(&operation.lane),
            };
            let into = operation.into.as_ref().unwrap_or(&operation.tensor);
            let end = made.copy(label, &behind, (&operation.tensor, into), add)?;
            Ok((end, made.queue().clone()))
        });
        match copied {
            Ok((end, queue)) => {
                let (promise, tensor, into) = operation.into_parts();
                let pending = Pending::new(gpu, tensor, into, vec![end], 0);
                Operation::issued(promise, pending.in_queue(&queue));
            }
            Err(reason) => operation.refuse(reason),
        }
    }
}

fn run(mut operation: Operation) {
    // What works in place has nothing to do alone.
    let begun = (!operation.phases.is_empty()).then(Instant::now);
    run_rounds(&mut operation.phases);
    operation.succeed(begun, 0);
}

/// The rounds of schedules that name no messages.
fn run_rounds(phases: &mut VecDeque<Box<dyn Schedule>>) {
    let mut scratch = Scratch::default();
    for phase in phases {
        scratch.reserve(phase.scratch_bytes());
        for round in 0..phase.rounds() {
            let mut messages = Round::default();
            phase.start(round, &mut scratch, &mut messages);
            debug_assert!(messages.transfers.is_empty());
            phase.finish(round, &mut scratch);
        }
    }
}
