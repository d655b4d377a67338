//! Collectives as schedules: lists of rounds that the communication thread runs.
//!
//! A schedule cuts an operation into rounds of at most one chunk per peer and direction. Up to
//! [`WINDOW`] rounds are in flight; they start in order and finish in order, which is all that the
//! matching of messages needs: between two ranks the *n*-th send meets the *n*-th receive. No
//! message is larger than [`CHUNK_BYTES`], so 32-bit message counts are never an issue.
//!
//! A schedule talks to no transport. It only names transfers ([`Round`]), which keeps every
//! algorithm here pure bookkeeping over addresses:
//!
//! - [`ReduceScatter`]: everybody sends each member its slice directly and adds what arrives *in
//!   rank order*, so the sum has the same bits whoever owns the slice and however messages race.
//!   The sum replaces the own contribution or goes to another buffer;
//! - [`AllGather`]: everybody sends its slice to everybody, straight into place;
//! - all-reduce is the one followed by the other;
//! - [`Broadcast`]: a binomial tree, pipelined by chunks;
//! - [`AllToAll`] and [`PointToPoint`].
//!
//! Direct exchange moves the least possible bytes per rank, `(n-1)/n` of the buffer, in one hop.

mod bf16;
mod broadcast;
mod exchange;
mod gather;
mod reduce;

use std::ops::Range;

pub(super) use broadcast::Broadcast;
pub(super) use exchange::{AllToAll, PointToPoint};
pub(super) use gather::{AllGather, AllGatherAsBf16};
pub(super) use reduce::{Form, ReduceScatter, Target};

/// Rounds of one operation that may be in flight together.
pub(super) const WINDOW: usize = 4;

/// The most bytes one message carries. Small enough that a chunk is still in the cache when it is
/// summed, large enough that the cost per message does not show.
pub(super) const CHUNK_BYTES: usize = 1 << 20;

/// The least bytes that chunks shrink to when many peers share the scratch budget.
const SMALL_CHUNK_BYTES: usize = 64 << 10;

/// What the receive chunks of all peers and all rounds in flight may take together, as far as
/// [`SMALL_CHUNK_BYTES`] allows: above 128 members it takes more, a gigabyte at 4096.
const SCRATCH_BYTES: usize = 32 << 20;

/// A rank's place in a lane.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    /// Index in the lane's sorted ranks.
    pub(super) index: usize,
    /// Number of ranks in the lane.
    pub(super) size: usize,
}

impl Place {
    /// The other members, beginning after this one, so that not all ranks turn to rank 0 first.
    fn peers_after(self) -> impl Iterator<Item = usize> {
        (1..self.size).map(move |step| (self.index + step) % self.size)
    }

    /// The other members, beginning before this one: whose sends arrive first.
    fn peers_before(self) -> impl Iterator<Item = usize> {
        (1..self.size).map(move |step| (self.index + self.size - step) % self.size)
    }

    /// The position of `peer` in an array that has no entry for this rank.
    fn position(self, peer: usize) -> usize {
        if peer < self.index { peer } else { peer - 1 }
    }
}

/// How a flat buffer is cut: one slice per member, each into chunks. The last slices may be short
/// or empty when the length is not a multiple of the size.
#[derive(Debug, Clone, Copy)]
pub(super) struct Split {
    elements: usize,
    slice: usize,
    chunk: usize,
}

impl Split {
    /// Cuts `elements` elements into equal slices for `size` members, and slices into chunks whose
    /// length depends on nothing but these arguments: all members cut alike.
    pub(super) fn new(elements: usize, size: usize, element_bytes: usize) -> Self {
        let share = SCRATCH_BYTES / (WINDOW * size.max(2).saturating_sub(1));
        let bytes = share.clamp(SMALL_CHUNK_BYTES, CHUNK_BYTES);
        let slice = elements.div_ceil(size);
        // A multiple of 64 elements keeps every chunk of the scratch memory aligned; a small
        // operation asks for little of it.
        let most = slice.next_multiple_of(64).max(64);
        let chunk = (bytes / element_bytes / 64 * 64).clamp(64, most);
        Self {
            elements,
            slice,
            chunk,
        }
    }

    /// The elements of chunk `round` of the slice of `member`; empty past the slice's end.
    fn range(&self, member: usize, round: usize) -> Range<usize> {
        let end = ((member + 1) * self.slice).min(self.elements);
        let start = (member * self.slice + round * self.chunk).min(end);
        start..(start + self.chunk).min(end)
    }

    fn rounds(&self) -> usize {
        self.slice.div_ceil(self.chunk)
    }
}

/// Which way a transfer goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    Send,
    Receive,
}

/// One message of a round.
#[derive(Debug)]
pub(super) struct Transfer {
    pub(super) way: Way,
    /// Lane index of the other end.
    pub(super) peer: usize,
    pub(super) address: *mut u8,
    pub(super) bytes: usize,
}

/// The messages of a round, filled by [`Schedule::start`].
#[derive(Debug, Default)]
pub(super) struct Round {
    pub(super) transfers: Vec<Transfer>,
}

impl Round {
    fn send(&mut self, peer: usize, address: *mut u8, bytes: usize) {
        self.add(Way::Send, peer, address, bytes);
    }

    fn receive(&mut self, peer: usize, address: *mut u8, bytes: usize) {
        self.add(Way::Receive, peer, address, bytes);
    }

    fn add(&mut self, way: Way, peer: usize, address: *mut u8, bytes: usize) {
        // Both ends compute the same length, so both leave an empty message out.
        if bytes > 0 {
            self.transfers.push(Transfer {
                way,
                peer,
                address,
                bytes,
            });
        }
    }
}

/// Memory of a lane for chunks on their way, kept from one operation to the next.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    // 64-bit words, so that every element type is aligned.
    words: Vec<u64>,
}

impl Scratch {
    /// Grows to at least `bytes`; addresses given out before become invalid.
    pub(super) fn reserve(&mut self, bytes: usize) {
        let words = bytes.div_ceil(size_of::<u64>());
        if self.words.len() < words {
            self.words.resize(words, 0);
        }
    }

    /// The address `offset` bytes in.
    fn at(&mut self, offset: usize) -> *mut u8 {
        debug_assert!(offset <= self.words.len() * size_of::<u64>());
        self.words.as_mut_ptr().cast::<u8>().wrapping_add(offset)
    }
}

/// An operation cut into rounds.
///
/// The runner calls `start` for rounds 0, 1, 2… with at most [`WINDOW`] of them unfinished, and
/// `finish` in the same order, each once all messages of its round are done. Addresses handed out
/// by `start` must stay valid until then.
pub(super) trait Schedule: Send {
    /// Number of rounds on this rank; ranks may differ.
    fn rounds(&self) -> usize;

    /// Bytes of scratch memory the rounds in flight need.
    fn scratch_bytes(&self) -> usize {
        0
    }

    /// Names the messages of `round`.
    fn start(&mut self, round: usize, scratch: &mut Scratch, messages: &mut Round);

    /// Uses what `round` brought.
    fn finish(&mut self, round: usize, scratch: &mut Scratch) {
        let _ = (round, scratch);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chunks_of_all_slices_cover_a_buffer_once() {
        for (elements, size) in [
            (0, 2),
            (1, 3),
            (7, 3),
            (1_000_003, 4),
            (1 << 22, 2),
            (600_000, 5),
        ] {
            let split = Split::new(elements, size, 4);
            let mut next = 0;
            for member in 0..size {
                for round in 0..split.rounds() {
                    let range = split.range(member, round);
                    if !range.is_empty() {
                        assert_eq!(range.start, next, "{elements} over {size}");
                        next = range.end;
                    }
                }
                assert!(split.range(member, split.rounds()).is_empty());
            }
            assert_eq!(next, elements);
        }
    }

    #[test]
    fn the_chunks_of_more_elements_than_32_bits_count_cover_them_once() {
        for (elements, size, bytes) in [
            ((1 << 31) + 1, 2, 1),
            ((1 << 32) - 1, 3, 2),
            ((1 << 33) + 7, 4, 4),
            ((1 << 40) + 5, 64, 4),
        ] {
            let split = Split::new(elements, size, bytes);
            assert!(split.chunk * bytes <= CHUNK_BYTES);
            let mut next = 0;
            for member in 0..size {
                assert_eq!(split.range(member, 0).start, next);
                // Every chunk of a long slice would take long: the first, some, and the last.
                let rounds = split.rounds();
                for round in (0..rounds).step_by(997).chain(rounds - 2..rounds) {
                    let (range, start) = (split.range(member, round), round * split.chunk);
                    assert_eq!(range.start, next + start.min(range.end - next));
                    assert!(range.len() <= split.chunk);
                    let before = split.range(member, round.saturating_sub(1));
                    assert!(round == 0 || before.end == range.start);
                }
                next = split.range(member, rounds - 1).end;
                assert!(split.range(member, rounds).is_empty());
            }
            assert_eq!(next, elements);
        }
    }

    #[test]
    fn chunks_shrink_when_many_peers_share_the_scratch_memory() {
        assert_eq!(Split::new(1 << 24, 2, 4).chunk * 4, CHUNK_BYTES);
        assert_eq!(Split::new(1 << 30, 4096, 4).chunk * 4, SMALL_CHUNK_BYTES);
        // A control reduction takes no megabytes of it.
        assert_eq!(Split::new(4, 4, 8).chunk, 64);
    }
}
