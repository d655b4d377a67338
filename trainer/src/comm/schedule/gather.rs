//! All-gather: everybody's slice, everywhere.

use super::super::buffer::Buffer;
use super::{Place, Round, Schedule, Scratch, Split};

/// Sends the own slice to every member and receives theirs straight into place.
pub(in super::super) struct AllGather {
    buffer: Buffer,
    place: Place,
    split: Split,
}

impl AllGather {
    /// Gathers `buffer`, whose slice at `place` is filled.
    pub(in super::super) fn new(buffer: Buffer, place: Place) -> Self {
        let split = Split::new(buffer.elements(), place.size, buffer.element().bytes());
        Self {
            buffer,
            place,
            split,
        }
    }
}

impl Schedule for AllGather {
    fn rounds(&self) -> usize {
        self.split.rounds()
    }

    fn start(&mut self, round: usize, _scratch: &mut Scratch, messages: &mut Round) {
        let width = self.buffer.element().bytes();
        for peer in self.place.peers_before() {
            let range = self.split.range(peer, round);
            messages.receive(peer, self.buffer.at(range.start), range.len() * width);
        }
        let own = self.split.range(self.place.index, round);
        for peer in self.place.peers_after() {
            messages.send(peer, self.buffer.at(own.start), own.len() * width);
        }
    }
}
