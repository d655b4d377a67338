//! The communication thread: runs the operations of all lanes over one transport.
//!
//! Each lane has a queue. Its head runs, the rest wait; lanes take turns, so that one that waits for
//! a slow peer does not hold the others up. With nothing to do the thread sleeps on its command
//! channel. With something to do it polls, more and more slowly (see [`Backoff`]): it shares the
//! machine with the threads that compute and must not burn a core.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::time::{Duration, Instant};

use tch::Tensor;

use super::error::Error;
use super::lane::Members;
use super::schedule::{Round, Schedule, Scratch, WINDOW, Way};
use super::ticket::{Promise, Traffic};
use super::transport::Transport;

/// An operation on its way to the communication thread.
pub(super) struct Operation {
    pub(super) name: &'static str,
    pub(super) lane: Arc<Members>,
    /// Keeps the memory alive that the schedules point into.
    pub(super) tensor: Tensor,
    /// Run one after the other.
    pub(super) phases: VecDeque<Box<dyn Schedule>>,
    pub(super) promise: Promise,
}

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
pub(super) fn run<T: Transport>(transport: T, commands: &Receiver<Command>) {
    Engine {
        transport,
        lanes: BTreeMap::new(),
        backoff: Backoff::default(),
    }
    .run(commands);
}

struct Engine<T: Transport> {
    transport: T,
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
        loop {
            if let Some(command) = self.next_command(commands, leaving.is_some()) {
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
            let pause = match self.backoff.next() {
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
        match &lane.failure {
            None => lane.waiting.push_back(operation),
            Some(cause) => poison(operation, cause),
        }
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
            lane.abandon(&mut self.transport);
            lane.waiting.clear();
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
            match self.backoff.next() {
                Pause::Spin => std::hint::spin_loop(),
                Pause::Yield => std::thread::yield_now(),
                Pause::Sleep(pause) => std::thread::sleep(pause),
            }
        }
        Ok(())
    }
}

fn poison(operation: Operation, cause: &Arc<Error>) {
    let Operation {
        name,
        lane,
        promise,
        tensor,
        ..
    } = operation;
    drop(tensor);
    let lane = lane.to_string();
    promise.fulfil(Err(Error::Poisoned {
        lane,
        operation: name,
        cause: Arc::clone(cause),
    }));
}

/// The first-in-first-out queue of one lane.
struct LaneQueue<R> {
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
    fn busy(&self) -> bool {
        self.active.is_some() || !self.waiting.is_empty()
    }

    /// Advances the head of the queue; whether anything moved.
    fn poll<T: Transport<Request = R>>(&mut self, transport: &mut T) -> bool {
        let mut moved = false;
        loop {
            if self.active.is_none() {
                self.active = self.waiting.pop_front().map(Active::new);
            }
            let Some(active) = &mut self.active else {
                return moved;
            };
            match active.poll(transport, &mut self.scratch) {
                Ok(Polled::Same) => return moved,
                Ok(Polled::Moved) => return true,
                Ok(Polled::Done) => {
                    if let Some(active) = self.active.take() {
                        active.fulfil();
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
        self.failure = Some(Arc::new(cause.clone()));
        head.promise.fulfil(Err(cause));
        if let Some(cause) = &self.failure {
            self.waiting
                .drain(..)
                .for_each(|operation| poison(operation, cause));
        }
    }

    /// Gives up the head's messages. Memory that the transport may still touch is leaked.
    fn abandon<T: Transport<Request = R>>(&mut self, transport: &mut T) -> Option<Abandoned> {
        let Active {
            operation, flights, ..
        } = self.active.take()?;
        let requests = flights.into_iter().flat_map(|flight| flight.requests);
        // Every request must be given up, so no short-circuit here.
        let released = requests.fold(true, |released, (request, _)| {
            transport.cancel(request) && released
        });
        let Operation {
            name,
            lane,
            tensor,
            phases,
            promise,
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

/// A message that failed.
struct Broken {
    peer: usize,
    reason: String,
}

enum Polled {
    Same,
    Moved,
    Done,
}

/// The operation at the head of a lane.
struct Active<R> {
    operation: Operation,
    /// The rounds under way, oldest first.
    flights: VecDeque<Flight<R>>,
    /// The next round of the first phase to start.
    next: usize,
    begun: Instant,
    bytes_sent: u64,
}

struct Flight<R> {
    round: usize,
    /// Messages that are not done, each with its peer.
    requests: Vec<(R, usize)>,
}

impl<R> Active<R> {
    fn new(operation: Operation) -> Self {
        let begun = Instant::now();
        Self {
            operation,
            flights: VecDeque::new(),
            next: 0,
            begun,
            bytes_sent: 0,
        }
    }

    fn poll<T: Transport<Request = R>>(
        &mut self,
        transport: &mut T,
        scratch: &mut Scratch,
    ) -> Result<Polled, Broken> {
        self.fill(transport, scratch)?;
        let mut moved = self.test(transport)?;
        if let Some(phase) = self.operation.phases.front_mut() {
            while self
                .flights
                .front()
                .is_some_and(|flight| flight.requests.is_empty())
                && let Some(flight) = self.flights.pop_front()
            {
                phase.finish(flight.round, scratch);
                moved = true;
            }
            if self.next == phase.rounds() && self.flights.is_empty() {
                self.operation.phases.pop_front();
                self.next = 0;
            }
        }
        if self.operation.phases.is_empty() {
            return Ok(Polled::Done);
        }
        if moved {
            // Start what the finished rounds made room for before other lanes get their turn.
            self.fill(transport, scratch)?;
        }
        Ok(if moved { Polled::Moved } else { Polled::Same })
    }

    /// Starts rounds of the first phase while the window has room.
    fn fill<T: Transport<Request = R>>(
        &mut self,
        transport: &mut T,
        scratch: &mut Scratch,
    ) -> Result<(), Broken> {
        let Some(phase) = self.operation.phases.front_mut() else {
            return Ok(());
        };
        if self.next == 0 {
            scratch.reserve(phase.scratch_bytes());
        }
        let rounds = phase.rounds();
        while self.next < rounds && self.flights.len() < WINDOW {
            let Some(phase) = self.operation.phases.front_mut() else {
                return Ok(());
            };
            let mut messages = Round::default();
            phase.start(self.next, scratch, &mut messages);
            // The flight is listed before its messages start, so that a failure half-way gives up
            // those that did.
            self.flights.push_back(Flight {
                round: self.next,
                requests: Vec::new(),
            });
            self.next += 1;
            self.start(messages, transport)?;
        }
        Ok(())
    }

    /// Starts the messages of the youngest flight.
    fn start<T: Transport<Request = R>>(
        &mut self,
        messages: Round,
        transport: &mut T,
    ) -> Result<(), Broken> {
        let Some(flight) = self.flights.back_mut() else {
            return Ok(());
        };
        let tag = self.operation.lane.id;
        for transfer in messages.transfers {
            let peer = self.operation.lane.ranks[transfer.peer];
            let (address, bytes) = (transfer.address, transfer.bytes);
            // SAFETY: the address lies in the operation's tensor or in the lane's scratch memory.
            // Both are kept, and neither is moved, until the request is done or given up
            // (`LaneQueue::abandon`); the schedule leaves the range alone meanwhile.
            let request = unsafe {
                match transfer.way {
                    Way::Send => transport.start_send(peer, tag, address.cast_const(), bytes),
                    Way::Receive => transport.start_recv(peer, tag, address, bytes),
                }
            };
            flight
                .requests
                .push((request.map_err(|reason| Broken { peer, reason })?, peer));
            if transfer.way == Way::Send {
                self.bytes_sent += bytes as u64;
            }
        }
        Ok(())
    }

    /// Tests every message; whether any is done.
    fn test<T: Transport<Request = R>>(&mut self, transport: &mut T) -> Result<bool, Broken> {
        let mut moved = false;
        for flight in &mut self.flights {
            let mut at = 0;
            while let Some((request, peer)) = flight.requests.get_mut(at) {
                let peer = *peer;
                match transport.test(request) {
                    Ok(false) => at += 1,
                    Ok(true) => {
                        flight.requests.swap_remove(at);
                        moved = true;
                    }
                    Err(reason) => {
                        // This request is over, in whatever way; the others are given up.
                        flight.requests.swap_remove(at);
                        return Err(Broken { peer, reason });
                    }
                }
            }
        }
        Ok(moved)
    }

    fn fulfil(self) {
        let busy_seconds = self.begun.elapsed().as_secs_f64();
        let Operation {
            tensor, promise, ..
        } = self.operation;
        promise.fulfil(Ok((
            tensor,
            Traffic {
                bytes_sent: self.bytes_sent,
                busy_seconds,
            },
        )));
    }
}

/// How long to pause between polls: not at all right after something moved, then giving way to
/// other threads, then asleep, a tenth of the time waited so far but at most [`Backoff::LONGEST`].
#[derive(Default)]
struct Backoff {
    since: Option<Instant>,
}

enum Pause {
    Spin,
    Yield,
    Sleep(Duration),
}

impl Backoff {
    const SPIN: Duration = Duration::from_micros(20);
    const YIELD: Duration = Duration::from_micros(200);
    const SHORTEST: Duration = Duration::from_micros(20);
    const LONGEST: Duration = Duration::from_micros(200);

    fn reset(&mut self) {
        self.since = None;
    }

    fn next(&mut self) -> Pause {
        let waited = self.since.get_or_insert_with(Instant::now).elapsed();
        if waited < Self::SPIN {
            Pause::Spin
        } else if waited < Self::YIELD {
            Pause::Yield
        } else {
            Pause::Sleep((waited / 10).clamp(Self::SHORTEST, Self::LONGEST))
        }
    }
}
