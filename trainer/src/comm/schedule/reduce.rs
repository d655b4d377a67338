//! Reduce-scatter: everybody's sum of its own slice, added in rank order.

use std::ops::Add;

use super::super::buffer::Buffer;
use super::bf16::{from_bf16, round_into, to_bf16};
use super::{Place, Round, Schedule, Scratch, Split, WINDOW};

/// Elements added at a time: all contributions of a block pass through the first-level cache.
const BLOCK: usize = 1024;

/// How elements travel and in which type they are added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Form {
    /// f32 on the wire, added in f32.
    F32,
    /// f64 on the wire, added in f64.
    F64,
    /// f32 in memory, rounded to bf16 (nearest, ties to even) on the wire, added in f32. The own
    /// contribution is rounded as well, so that the sum does not depend on who owns the slice.
    F32AsBf16,
}

impl Form {
    pub(in super::super) fn wire_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F64 => 8,
            Self::F32AsBf16 => 2,
        }
    }
}

/// Where the sum of the own slice goes.
#[derive(Debug, Clone, Copy)]
pub(in super::super) enum Target {
    /// To where the own contribution lies.
    InPlace,
    /// To another buffer of the length of a slice, in place of what is there.
    Write(Buffer),
    /// To another buffer of the length of a slice, added to what is there.
    Add(Buffer),
}

/// Sends each member its slice and sums the own one. The rest of the buffer is left as it was.
pub(in super::super) struct ReduceScatter {
    buffer: Buffer,
    target: Target,
    place: Place,
    split: Split,
    form: Form,
}

impl ReduceScatter {
    /// Reduces `buffer`, whose elements (and those of `target`) are those of `form`.
    pub(in super::super) fn new(buffer: Buffer, target: Target, place: Place, form: Form) -> Self {
        let split = Split::new(buffer.elements(), place.size, buffer.element().bytes());
        Self {
            buffer,
            target,
            place,
            split,
            form,
        }
    }

    fn chunk_bytes(&self) -> usize {
        self.split.chunk * self.form.wire_bytes()
    }

    /// Where the chunk from `peer` lies in the scratch memory.
    fn arrived(&self, round: usize, peer: usize) -> usize {
        let chunks = (round % WINDOW) * (self.place.size - 1) + self.place.position(peer);
        chunks * self.chunk_bytes()
    }

    /// Where the rounded chunk for `peer` lies in the scratch memory: after all that arrive.
    fn rounded(&self, round: usize, peer: usize) -> usize {
        WINDOW * (self.place.size - 1) * self.chunk_bytes() + self.arrived(round, peer)
    }
}

impl Schedule for ReduceScatter {
    fn rounds(&self) -> usize {
        self.split.rounds()
    }

    fn scratch_bytes(&self) -> usize {
        let directions = if self.form == Form::F32AsBf16 { 2 } else { 1 };
        directions * WINDOW * (self.place.size - 1) * self.chunk_bytes()
    }

    fn start(&mut self, round: usize, scratch: &mut Scratch, messages: &mut Round) {
        let wire_bytes = self.form.wire_bytes();
        let own = self.split.range(self.place.index, round);
        for peer in self.place.peers_before() {
            let address = scratch.at(self.arrived(round, peer));
            messages.receive(peer, address, own.len() * wire_bytes);
        }
        for peer in self.place.peers_after() {
            let range = self.split.range(peer, round);
            let mut address = self.buffer.at(range.start);
            if self.form == Form::F32AsBf16 {
                let rounded = scratch.at(self.rounded(round, peer));
                // SAFETY: source and target are `range.len()` elements of the tensor and of the
                // scratch memory, which are different allocations aligned for their types; the
                // window rule says that no transfer uses this part of the scratch memory.
                unsafe { round_into(address.cast::<f32>(), rounded.cast::<u16>(), range.len()) };
                address = rounded;
            }
            messages.send(peer, address, range.len() * wire_bytes);
        }
    }

    fn finish(&mut self, round: usize, scratch: &mut Scratch) {
        let own = self.split.range(self.place.index, round);
        let base = self.buffer.at(own.start).cast_const();
        let offset = own.start - self.split.range(self.place.index, 0).start;
        let (target, add) = match self.target {
            Target::InPlace => (self.buffer.at(own.start), false),
            Target::Write(into) => (into.at(offset), false),
            Target::Add(into) => (into.at(offset), true),
        };
        let arrived: Vec<_> = (0..self.place.size)
            .filter(|&member| member != self.place.index)
            .map(|member| scratch.at(self.arrived(round, member)).cast_const())
            .collect();
        let contributions = Contributions {
            own: base,
            arrived: &arrived,
            index: self.place.index,
            length: own.len(),
        };
        // SAFETY: `base`, `target` and every pointer of `arrived` lead to `length` elements of the
        // form's memory and wire types, aligned (chunks are multiples of 64 elements). The scratch
        // memory is another allocation than the tensors; `target` is `base` itself or lies in a
        // tensor that does not overlap the buffer, which the lane has checked. The finished round
        // has no transfer left that uses any of them, and other rounds use other chunks.
        unsafe {
            match self.form {
                Form::F32 => {
                    contributions.sum_in_order(target.cast::<f32>(), add, |x| x, |x: f32| x)
                }
                Form::F64 => {
                    contributions.sum_in_order(target.cast::<f64>(), add, |x| x, |x: f64| x)
                }
                Form::F32AsBf16 => {
                    let round = |x| from_bf16(to_bf16(x));
                    contributions.sum_in_order(target.cast::<f32>(), add, round, from_bf16)
                }
            }
        }
    }
}

/// What the members give for one chunk of this member's slice.
struct Contributions<'a> {
    own: *const u8,
    /// Those of the others, in their order.
    arrived: &'a [*const u8],
    /// This member's place among them.
    index: usize,
    /// Elements of each.
    length: usize,
}

impl Contributions<'_> {
    /// Writes the sum over members in order to `target`, or adds it (`add`) to what is there: the
    /// own contribution, through `own_value`, stands at `index`, those that arrived, through
    /// `wire_value`, around it.
    ///
    /// # Safety
    /// `own` points to `length` valid, aligned elements of type `E`, all of `arrived` to as many of
    /// type `W`, and nobody else writes to them. `target` points to as many of type `E` that nobody
    /// else uses; it is `own` or overlaps none of the others.
    unsafe fn sum_in_order<E, W>(
        &self,
        target: *mut E,
        add: bool,
        own_value: impl Fn(E) -> E,
        wire_value: impl Fn(W) -> E,
    ) where
        E: Copy + Default + Add<Output = E>,
        W: Copy,
    {
        let mut sums = [E::default(); BLOCK];
        for start in (0..self.length).step_by(BLOCK) {
            let count = BLOCK.min(self.length - start);
            let sums = &mut sums[..count];
            for member in 0..=self.arrived.len() {
                if member == self.index {
                    let own = self.own.cast::<E>();
                    // SAFETY: `start..start + count` lies within the `length` elements that the
                    // caller vouches for; nothing is written to them while the slice lives.
                    let own = unsafe { std::slice::from_raw_parts(own.add(start), count) };
                    accumulate(sums, own, member == 0, &own_value);
                } else {
                    let position = if member < self.index {
                        member
                    } else {
                        member - 1
                    };
                    let source = self.arrived[position].cast::<W>();
                    // SAFETY: as above.
                    let source = unsafe { std::slice::from_raw_parts(source.add(start), count) };
                    accumulate(sums, source, member == 0, &wire_value);
                }
            }
            // SAFETY: as above; the slice of `own`, which this may be, is not used any more.
            let target = unsafe { std::slice::from_raw_parts_mut(target.add(start), count) };
            if add {
                accumulate(target, sums, false, |sum| sum);
            } else {
                target.copy_from_slice(sums);
            }
        }
    }
}

/// Sets (`first`) or adds the values of `source`.
fn accumulate<E: Copy + Add<Output = E>, W: Copy>(
    sums: &mut [E],
    source: &[W],
    first: bool,
    value: impl Fn(W) -> E,
) {
    if first {
        sums.iter_mut()
            .zip(source)
            .for_each(|(sum, &x)| *sum = value(x));
    } else {
        sums.iter_mut()
            .zip(source)
            .for_each(|(sum, &x)| *sum = *sum + value(x));
    }
}
