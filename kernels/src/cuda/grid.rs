//! Launch shapes: how many blocks of how many threads a kernel takes for given sizes.
//!
//! Pure arithmetic. A shape depends on sizes alone and never on the device, so that sums are taken
//! in the same order everywhere.

use crate::Error;

/// Threads that run in step.
pub(crate) const WARP: usize = 32;

/// Elements that a thread moves at once.
pub(crate) const GROUP: usize = 8;

/// Most threads of a block.
pub(crate) const MOST_THREADS: usize = 1024;

/// Most blocks along the first axis of a grid.
const MOST_ACROSS: usize = (1 << 31) - 1;

/// Most blocks along the second one.
const MOST_DOWN: usize = (1 << 16) - 1;

/// A launch shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Grid {
    /// Blocks along the axes x, y and z.
    pub(crate) blocks: [u32; 3],
    /// Threads of a block along x and y.
    pub(crate) threads: [u32; 2],
    /// Dynamic shared memory of a block, in bytes.
    pub(crate) shared_bytes: u32,
}

impl Grid {
    /// `blocks` blocks of `threads` threads in a row.
    ///
    /// # Errors
    /// [`Error::Argument`] for sizes that no device takes.
    pub(crate) fn new(op: &'static str, blocks: usize, threads: usize) -> Result<Grid, Error> {
        Grid::plane(op, [blocks, 1], [threads, 1])
    }

    /// Blocks along x and y, of threads along x and y.
    ///
    /// # Errors
    /// [`Error::Argument`] for sizes that no device takes.
    pub(crate) fn plane(
        op: &'static str,
        [across, down]: [usize; 2],
        [width, height]: [usize; 2],
    ) -> Result<Grid, Error> {
        let threads = width * height;
        if across > MOST_ACROSS || down > MOST_DOWN || threads == 0 || threads > MOST_THREADS {
            let message = format!(
                "a grid has up to {MOST_ACROSS} by {MOST_DOWN} blocks of 1 to {MOST_THREADS} threads, \
                 found {across} by {down} of {threads}; use a smaller micro-batch"
            );
            return Err(Error::Argument { op, message });
        }
        Ok(Grid {
            blocks: [across as u32, down as u32, 1],
            threads: [width as u32, height as u32],
            shared_bytes: 0,
        })
    }

    /// Blocks of `threads` threads that cover `elements` elements, `each` a thread.
    ///
    /// # Errors
    /// [`Error::Argument`] for more than a device takes.
    pub(crate) fn flat(
        op: &'static str,
        elements: usize,
        threads: usize,
        each: usize,
    ) -> Result<Grid, Error> {
        Grid::new(op, elements.div_ceil(threads * each), threads)
    }

    /// The same with dynamic shared memory.
    pub(crate) fn with_shared(self, bytes: usize) -> Grid {
        Grid {
            shared_bytes: bytes as u32,
            ..self
        }
    }

    /// Whether there is nothing to do.
    pub(crate) fn is_empty(&self) -> bool {
        self.blocks.contains(&0)
    }
}

/// Threads, in whole warps, that cover `elements` elements with `each` a thread, as far as `most`
/// threads go.
pub(crate) fn whole_warps(elements: usize, each: usize, most: usize) -> usize {
    elements
        .div_ceil(each)
        .next_multiple_of(WARP)
        .clamp(WARP, most)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn whole_warps_cover_what_they_can() {
        for width in (1..20_000).step_by(7).chain([8192, 1 << 20]) {
            for (each, most) in [(8, 256), (8, 1024), (16, 512)] {
                let threads = whole_warps(width, each, most);
                assert!(threads.is_multiple_of(WARP) && (WARP..=most).contains(&threads));
                let covered = threads * each;
                assert!(covered >= width || threads == most, "{width}");
                assert!(
                    covered - width.min(covered) < WARP * each,
                    "{width}: a warp is idle"
                );
            }
        }
    }

    #[test]
    fn flat_grids_cover_all_and_no_block_is_idle() {
        for elements in [0, 1, 7, 8, 9, 2047, 2048, 2049, 1 << 33] {
            let grid = Grid::flat("test", elements, 256, 32).unwrap();
            let block = 256 * 32;
            assert!(grid.blocks[0] as usize * block >= elements);
            assert!((grid.blocks[0] as usize).saturating_sub(1) * block < elements.max(1));
            assert_eq!(grid.is_empty(), elements == 0);
        }
    }

    #[test]
    fn what_no_device_takes_is_refused() {
        assert!(Grid::flat("test", usize::MAX / 2, 256, 1).is_err());
        assert!(Grid::plane("test", [1, 1 << 16], [32, 1]).is_err());
        assert!(Grid::new("test", 1, 1025).is_err());
        assert!(Grid::new("test", 1, 0).is_err());
    }
}
