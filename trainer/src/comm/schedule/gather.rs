//! All-gather: everybody's slice, everywhere.

use super::super::buffer::Buffer;
use super::bf16::{round_into, widen_into};
use super::{Place, Round, Schedule, Scratch, Split, WINDOW};

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

/// The same for f32 values that travel as bf16. The own slice is rounded too, so that all members
/// end with the same bits.
pub(in super::super) struct AllGatherAsBf16 {
    buffer: Buffer,
    place: Place,
    split: Split,
}

const WIRE_BYTES: usize = size_of::<u16>();

impl AllGatherAsBf16 {
    /// Gathers `buffer`, f32, whose slice at `place` is filled.
    pub(in super::super) fn new(buffer: Buffer, place: Place) -> Self {
        let split = Split::new(buffer.elements(), place.size, buffer.element().bytes());
        Self {
            buffer,
            place,
            split,
        }
    }

    /// Where the chunk of `member` in `round` lies in the scratch memory.
    fn offset(&self, round: usize, member: usize) -> usize {
        ((round % WINDOW) * self.place.size + member) * self.split.chunk * WIRE_BYTES
    }
}

impl Schedule for AllGatherAsBf16 {
    fn rounds(&self) -> usize {
        self.split.rounds()
    }

    fn scratch_bytes(&self) -> usize {
        WINDOW * self.place.size * self.split.chunk * WIRE_BYTES
    }

    fn start(&mut self, round: usize, scratch: &mut Scratch, messages: &mut Round) {
        for peer in self.place.peers_before() {
            let range = self.split.range(peer, round);
            let address = scratch.at(self.offset(round, peer));
            messages.receive(peer, address, range.len() * WIRE_BYTES);
        }
        let own = self.split.range(self.place.index, round);
        let rounded = scratch.at(self.offset(round, self.place.index));
        // SAFETY: source and target are `own.len()` elements of the tensor and of the scratch
        // memory, which are different allocations aligned for their types; the window rule says
        // that no transfer uses this part of the scratch memory.
        unsafe {
            let values = self.buffer.at(own.start).cast::<f32>();
            round_into(values, rounded.cast::<u16>(), own.len());
        }
        for peer in self.place.peers_after() {
            messages.send(peer, rounded, own.len() * WIRE_BYTES);
        }
    }

    fn finish(&mut self, round: usize, scratch: &mut Scratch) {
        for member in 0..self.place.size {
            let range = self.split.range(member, round);
            let arrived = scratch.at(self.offset(round, member)).cast_const();
            let values = self.buffer.at(range.start).cast::<f32>();
            // SAFETY: as in `start`; the round is finished, so all of its chunks are there and no
            // transfer uses them any more.
            unsafe { widen_into(arrived.cast::<u16>(), values, range.len()) };
        }
    }
}
