//! The operation at the head of a lane: its rounds in flight and their messages.

use std::collections::VecDeque;
use std::time::Instant;

use super::operation::Operation;
use super::schedule::{Round, Scratch, WINDOW, Way};
use super::transport::Transport;

/// A message that failed.
pub(super) struct Broken {
    pub(super) peer: usize,
    pub(super) reason: String,
}

/// What a poll found.
pub(super) enum Polled {
    /// No message is done that was not before.
    Same,
    Moved,
    /// The operation is.
    Done,
}

/// An operation that has started.
pub(super) struct Active<R> {
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
    /// Starts the clock of `operation`; its first messages start with the first poll.
    pub(super) fn new(operation: Operation) -> Self {
        let begun = Instant::now();
        Self {
            operation,
            flights: VecDeque::new(),
            next: 0,
            begun,
            bytes_sent: 0,
        }
    }

    /// Starts what may start and takes note of what is done.
    ///
    /// # Errors
    /// The first message that failed; the operation must then be given up.
    pub(super) fn poll<T: Transport<Request = R>>(
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
            // (`Active::give_up`); the schedule leaves the range alone meanwhile.
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

    /// Hands the tensor back.
    pub(super) fn succeed(self) {
        self.operation.succeed(Some(self.begun), self.bytes_sent);
    }

    /// Gives up every message under way. Returns the operation, and whether the transport will
    /// leave its memory and the lane's scratch memory alone from now on.
    pub(super) fn give_up<T: Transport<Request = R>>(self, transport: &mut T) -> (Operation, bool) {
        let requests = self.flights.into_iter().flat_map(|flight| flight.requests);
        // Every request must be given up, so no short-circuit here.
        let released = requests.fold(true, |released, (request, _)| {
            transport.cancel(request) && released
        });
        (self.operation, released)
    }
}
