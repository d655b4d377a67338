//! All-to-all and single messages.

use super::super::buffer::Buffer;
use super::{CHUNK_BYTES, Place, Round, Schedule, Scratch, Split, WINDOW, Way};

/// Swaps slice *j* of this member with slice *i* of member *j*, in place: what arrives waits in the
/// scratch memory until what lay there has been sent.
pub(in super::super) struct AllToAll {
    buffer: Buffer,
    place: Place,
    split: Split,
}

impl AllToAll {
    /// Exchanges the slices of `buffer`.
    pub(in super::super) fn new(buffer: Buffer, place: Place) -> Self {
        let split = Split::new(buffer.elements(), place.size, buffer.element().bytes());
        Self {
            buffer,
            place,
            split,
        }
    }

    fn chunk_bytes(&self) -> usize {
        self.split.chunk * self.buffer.element().bytes()
    }

    /// Where the chunk of `peer` in `round` waits in the scratch memory.
    fn offset(&self, round: usize, peer: usize) -> usize {
        let chunks = (round % WINDOW) * (self.place.size - 1) + self.place.position(peer);
        chunks * self.chunk_bytes()
    }
}

impl Schedule for AllToAll {
    fn rounds(&self) -> usize {
        self.split.rounds()
    }

    fn scratch_bytes(&self) -> usize {
        WINDOW * (self.place.size - 1) * self.chunk_bytes()
    }

    fn start(&mut self, round: usize, scratch: &mut Scratch, messages: &mut Round) {
        let width = self.buffer.element().bytes();
        for peer in self.place.peers_before() {
            let bytes = self.split.range(peer, round).len() * width;
            messages.receive(peer, scratch.at(self.offset(round, peer)), bytes);
        }
        for peer in self.place.peers_after() {
            let range = self.split.range(peer, round);
            messages.send(peer, self.buffer.at(range.start), range.len() * width);
        }
    }

    fn finish(&mut self, round: usize, scratch: &mut Scratch) {
        let width = self.buffer.element().bytes();
        for peer in self.place.peers_before() {
            let range = self.split.range(peer, round);
            let arrived = scratch.at(self.offset(round, peer));
            let target = self.buffer.at(range.start);
            // SAFETY: both ends are `range.len()` elements long and lie in different allocations
            // (the tensor's and the scratch memory); the round is finished, so no transfer uses
            // either of them.
            unsafe { std::ptr::copy_nonoverlapping(arrived, target, range.len() * width) };
        }
    }
}

/// One buffer from one member to another.
pub(in super::super) struct PointToPoint {
    buffer: Buffer,
    peer: usize,
    way: Way,
}

impl PointToPoint {
    /// Sends `buffer` to, or receives it from, the member `peer`.
    pub(in super::super) fn new(buffer: Buffer, peer: usize, way: Way) -> Self {
        Self { buffer, peer, way }
    }
}

impl Schedule for PointToPoint {
    fn rounds(&self) -> usize {
        self.buffer.bytes().div_ceil(CHUNK_BYTES)
    }

    fn start(&mut self, round: usize, _scratch: &mut Scratch, messages: &mut Round) {
        let start = round * CHUNK_BYTES;
        let bytes = (self.buffer.bytes() - start).min(CHUNK_BYTES);
        let address = self.buffer.at(start / self.buffer.element().bytes());
        messages.add(self.way, self.peer, address, bytes);
    }
}
