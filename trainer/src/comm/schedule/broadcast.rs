//! Broadcast along a binomial tree.

use super::super::buffer::Buffer;
use super::{CHUNK_BYTES, Place, Round, Schedule, Scratch, WINDOW};

/// Hands the root's buffer down a binomial tree, chunk after chunk: the tree is log₂(n) deep, and
/// all of its levels work at once on a long buffer.
pub(in super::super) struct Broadcast {
    buffer: Buffer,
    parent: Option<usize>,
    children: Vec<usize>,
    chunks: usize,
}

impl Broadcast {
    /// Broadcasts `buffer` of the member `root`.
    pub(in super::super) fn new(buffer: Buffer, place: Place, root: usize) -> Self {
        let Place { index, size } = place;
        // Numbered from the root, a member's parent is itself without its lowest set bit, and its
        // children are itself plus each lower power of two.
        let relative = (index + size - root) % size;
        let member = |relative: usize| (relative + root) % size;
        let lowest = if relative == 0 {
            size.next_power_of_two()
        } else {
            relative & relative.wrapping_neg()
        };
        let mut children = Vec::new();
        let mut step = lowest / 2;
        while step > 0 {
            if relative + step < size {
                children.push(member(relative + step));
            }
            step /= 2;
        }
        let parent = (relative != 0).then(|| member(relative - lowest));
        Self {
            buffer,
            parent,
            children,
            chunks: buffer.bytes().div_ceil(CHUNK_BYTES),
        }
    }

    /// How many rounds after its arrival a chunk is passed on: once its own round is finished,
    /// which the window guarantees after [`WINDOW`] rounds. The root has it from the start.
    fn delay(&self) -> usize {
        if self.parent.is_some() && !self.children.is_empty() {
            WINDOW
        } else {
            0
        }
    }

    fn chunk(&self, chunk: usize) -> (*mut u8, usize) {
        let width = self.buffer.element().bytes();
        let start = chunk * CHUNK_BYTES;
        let bytes = self.buffer.bytes().saturating_sub(start).min(CHUNK_BYTES);
        (self.buffer.at(start / width), bytes)
    }
}

impl Schedule for Broadcast {
    fn rounds(&self) -> usize {
        if self.chunks == 0 {
            0
        } else {
            self.chunks + self.delay()
        }
    }

    fn start(&mut self, round: usize, _scratch: &mut Scratch, messages: &mut Round) {
        if let Some(parent) = self.parent
            && round < self.chunks
        {
            let (address, bytes) = self.chunk(round);
            messages.receive(parent, address, bytes);
        }
        if let Some(chunk) = round.checked_sub(self.delay())
            && chunk < self.chunks
        {
            let (address, bytes) = self.chunk(chunk);
            for &child in &self.children {
                messages.send(child, address, bytes);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use tch::{Device, Kind, Tensor};

    use super::super::super::buffer::checked;
    use super::*;

    #[test]
    fn every_member_but_the_root_has_one_parent_that_lists_it() {
        let tensor = Tensor::zeros([4], (Kind::Float, Device::Cpu));
        for size in 1..20 {
            for root in 0..size {
                let tree: Vec<_> = (0..size)
                    .map(|index| {
                        Broadcast::new(checked(&tensor).unwrap(), Place { index, size }, root)
                    })
                    .collect();
                for (index, member) in tree.iter().enumerate() {
                    assert_eq!(member.parent.is_none(), index == root);
                    let listed = tree.iter().filter(|m| m.children.contains(&index)).count();
                    assert_eq!(listed, usize::from(index != root), "{index} of {size}");
                    if let Some(parent) = member.parent {
                        assert!(tree[parent].children.contains(&index));
                    }
                }
            }
        }
    }
}
