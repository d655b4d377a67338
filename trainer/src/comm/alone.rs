//! A lane of one rank: nothing travels, so operations run on the thread that calls them.
//!
//! Their tickets are ready at once, which spares the communication thread a wake-up for each. Only
//! an operation that must come after one of another lane that is still under way cannot run yet. It
//! goes to the queue of the communication thread like any other, and so does from then on everything
//! on this lane: what is called later may work on the same memory and must not overtake it.

use std::collections::VecDeque;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use super::engine::Command;
use super::error::Error;
use super::event::Gate;
use super::operation::{Operation, submit};
use super::schedule::{Round, Schedule, Scratch};

/// What the handles on one lane of one rank share.
#[derive(Debug, Default)]
pub(super) struct Alone {
    state: Mutex<State>,
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
            (Gate::Shut, None) => operation.refuse(
                "it comes after an operation of another communicator, which a world of one rank \
                 cannot wait for; wait for that ticket first"
                    .to_owned(),
            ),
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
