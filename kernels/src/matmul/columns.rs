//! Which columns of B lie in which panel, and which panels must stay in one block.

use std::ops::Range;

use crate::simd::vector::WIDTH;

/// Columns of B and how a product may cut them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Columns {
    /// So many columns, cut anywhere.
    Any(usize),
    /// Groups of columns (heads) that are never cut. Each begins with a panel of its own.
    Groups {
        /// Groups.
        count: usize,
        /// Columns of a group.
        width: usize,
    },
    /// Two halves of which a block holds the same columns: panels alternate, first half first.
    Halves {
        /// Columns of a half.
        width: usize,
    },
}

/// Neighbouring columns that lie side by side in panels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first panel, counted from the block's first.
    pub panel: usize,
    /// Panels; the last one's columns may be fewer than sixteen.
    pub panels: usize,
    /// The columns.
    pub columns: Range<usize>,
}

impl Run {
    /// A block's sums from the run's first column on.
    #[inline(always)]
    pub fn sums<'a>(&self, sums: &'a [f32]) -> &'a [f32] {
        &sums[self.panel * WIDTH..]
    }
}

impl Columns {
    /// Columns in all.
    pub fn count(self) -> usize {
        match self {
            Columns::Any(count) => count,
            Columns::Groups { count, width } => count * width,
            Columns::Halves { width } => 2 * width,
        }
    }

    /// Panels in all.
    pub fn panels(self) -> usize {
        match self {
            Columns::Any(count) => count.div_ceil(WIDTH),
            Columns::Groups { count, width } => count * width.div_ceil(WIDTH),
            Columns::Halves { width } => 2 * width.div_ceil(WIDTH),
        }
    }

    /// Panels that stay together.
    pub(super) fn unit(self) -> usize {
        match self {
            // Whole register tiles, and whole lines of bf16 rows.
            Columns::Any(_) => 2,
            Columns::Groups { width, .. } => width.div_ceil(WIDTH).max(1),
            Columns::Halves { .. } => 2,
        }
    }

    /// Columns from the first of a panel to the end of what is contiguous with it, and the panels
    /// that these fill.
    fn stretch(self, panel: usize) -> (Range<usize>, usize) {
        match self {
            Columns::Any(count) => (panel * WIDTH..count, usize::MAX),
            Columns::Groups { count, width } if width.is_multiple_of(WIDTH) => {
                (panel * WIDTH..count * width, usize::MAX)
            }
            Columns::Groups { width, .. } => {
                let unit = width.div_ceil(WIDTH);
                let (group, within) = (panel / unit, panel % unit);
                let first = group * width;
                (first + within * WIDTH..first + width, unit - within)
            }
            Columns::Halves { width } => {
                let (half, within) = (panel % 2, panel / 2);
                let first = half * width + within * WIDTH;
                (first..(half + 1) * width, 1)
            }
        }
    }

    /// The columns of some panels in runs of neighbours.
    pub(super) fn runs(self, all: Range<usize>) -> impl Iterator<Item = Run> {
        let mut panel = all.start;
        std::iter::from_fn(move || {
            if panel >= all.end {
                return None;
            }
            let (columns, panels) = self.stretch(panel);
            let panels = panels.min(all.end - panel);
            let end = columns.end.min(columns.start + panels * WIDTH);
            let run = Run {
                panel: panel - all.start,
                panels,
                columns: columns.start..end,
            };
            panel += panels;
            Some(run)
        })
    }
}
