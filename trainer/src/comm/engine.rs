//! The communication thread: runs the operations of all lanes over one transport.
//!
//! Each lane has a queue ([`LaneQueue`]). Its head runs, the rest wait; lanes take turns, so that one
//! that waits for a slow peer, or for an operation of another lane, does not hold the others up. With
//! nothing to do the thread sleeps on its command channel. With something to do it polls, more and
//! more slowly (see [`Backoff`]): it shares the machine with the threads that compute and must not
//! burn a core.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::time::{Duration, Instant};

use super::backoff::{Backoff, Pause};
use super::operation::Operation;
use super::queue::LaneQueue;
use super::transport::Transport;
use super::waiters::Waiters;

/// What the communication thread can be told.
pub(super) enum Command {
    Submit(Operation),
    /// Finish everything that is queued, meet the other ranks and leave. After `limit` without
    /// success the run is aborted.
    Leave {
        limit: Option<Duration>,
        done: Sender<Result<(), String>>,
    },
    /// Bring the other ranks down; queued operations fail.
    Abort {
        reason: String,
        done: Sender<()>,
    },
}

/// Runs until told to leave or to abort, or until every sender of commands is gone.
pub(super) fn run<T: Transport>(transport: T, commands: &Receiver<Command>, waiters: Waiters) {
    Engine {
        transport,
        waiters,
        lanes: BTreeMap::new(),
        backoff: Backoff::default(),
    }
    .run(commands);
}

struct Engine<T: Transport> {
    transport: T,
    waiters: Waiters,
    lanes: BTreeMap<u32, LaneQueue<T::Request>>,
    backoff: Backoff,
}

struct Leaving {
    deadline: Option<Instant>,
    done: Sender<Result<(), String>>,
}

impl<T: Transport> Engine<T> {
    fn run(mut self, commands: &Receiver<Command>) {
        let mut leaving: Option<Leaving> = None;
        // Whether something has come in that no lane has looked at yet.
        let mut fresh = false;
        loop {
            let next = if fresh {
                commands.try_recv().ok()
            } else {
                self.next_command(commands, leaving.is_some())
            };
            if let Some(command) = next {
                fresh = true;
                match command {
                    Command::Submit(operation) => self.submit(operation),
                    Command::Leave { limit, done } => {
                        leaving = Some(Leaving {
                            deadline: limit.map(|l| Instant::now() + l),
                            done,
                        });
                    }
                    Command::Abort { reason, done } => {
                        self.transport.abort(&reason);
                        self.fail_all();
                        let _ = done.send(());
                        return;
                    }
                }
                // Take everything that is queued before looking at the network again.
                continue;
            }
            fresh = false;
            if self.poll_lanes() {
                self.backoff.reset();
            }
            if let Some(Leaving { deadline, done }) = &leaving {
                if !self.busy() {
                    let outcome = self.leave(*deadline);
                    let transport = self.transport;
                    drop(transport);
                    let _ = done.send(outcome);
                    return;
                }
                if deadline.is_some_and(|deadline| Instant::now() > deadline) {
                    let reason = "its operations did not finish in time when it left".to_owned();
                    self.transport.abort(&reason);
                    self.fail_all();
                    let _ = done.send(Err(reason));
                    return;
                }
            }
        }
    }

    fn busy(&self) -> bool {
        self.lanes.values().any(LaneQueue::busy)
    }

    /// The next command, waiting for it as long as the state of the lanes allows.
    fn next_command(&mut self, commands: &Receiver<Command>, leaving: bool) -> Option<Command> {
        if self.busy() || leaving {
            let pause = match self.backoff.next(self.waiters.any() || leaving) {
                Pause::Spin => {
                    std::hint::spin_loop();
                    return commands.try_recv().ok();
                }
                Pause::Yield => match commands.try_recv() {
                    Err(TryRecvError::Empty) => {
                        std::thread::yield_now();
                        return None;
                    }
                    other => return other.ok(),
                },
                Pause::Sleep(pause) => pause,
            };
            return commands.recv_timeout(pause).ok();
        }
        self.backoff.reset();
        let received = match self.transport.idle() {
            Some(pause) => commands.recv_timeout(pause),
            None => commands.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match received {
            Ok(command) => Some(command),
            Err(RecvTimeoutError::Timeout) => None,
            // Nobody can wait for anything any more. `Comm` says `Leave` when it is dropped, so
            // this is a handle that was lost in a panic.
            Err(RecvTimeoutError::Disconnected) => {
                let (done, _) = std::sync::mpsc::channel();
                let reason = "its communicator was lost without being finished".to_owned();
                Some(Command::Abort { reason, done })
            }
        }
    }

    fn submit(&mut self, operation: Operation) {
        let lane = self.lanes.entry(operation.lane.id).or_default();
        lane.push(operation);
        self.backoff.reset();
    }

    /// Advances every lane; whether anything moved.
    fn poll_lanes(&mut self) -> bool {
        let mut moved = false;
        for lane in self.lanes.values_mut() {
            moved |= lane.poll(&mut self.transport);
        }
        moved
    }

    /// Ends every queued operation with an error: their promises say so when they are dropped.
    fn fail_all(&mut self) {
        for lane in self.lanes.values_mut() {
            lane.clear(&mut self.transport);
        }
    }

    fn leave(&mut self, deadline: Option<Instant>) -> Result<(), String> {
        self.transport.start_leave()?;
        self.backoff.reset();
        while !self.transport.test_leave()? {
            if deadline.is_some_and(|deadline| Instant::now() > deadline) {
                let reason = "the other ranks did not leave in time".to_owned();
                self.transport.abort(&reason);
                return Err(reason);
            }
            match self.backoff.next(true) {
                Pause::Spin => std::hint::spin_loop(),
                Pause::Yield => std::thread::yield_now(),
                Pause::Sleep(pause) => std::thread::sleep(pause),
            }
        }
        Ok(())
    }
}
