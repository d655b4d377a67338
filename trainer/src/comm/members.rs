//! The ranks of a lane, as operations and error messages name them.

use std::fmt;

/// How many ranks of a lane an error message lists.
const LISTED_RANKS: usize = 8;

/// The ranks of a lane and its number.
#[derive(Debug, Default)]
pub(super) struct Members {
    pub(super) id: u32,
    /// Ranks of the world, ascending.
    pub(super) ranks: Vec<usize>,
}

impl fmt::Display for Members {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let listed: Vec<_> = self
            .ranks
            .iter()
            .take(LISTED_RANKS)
            .map(usize::to_string)
            .collect();
        write!(f, "lane {} (ranks {}", self.id, listed.join(", "))?;
        match self.ranks.len().saturating_sub(LISTED_RANKS) {
            0 => write!(f, ")"),
            more => write!(f, " and {more} more)"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_lane_is_named_by_its_first_ranks() {
        let members = |ranks: std::ops::Range<usize>| Members {
            id: 3,
            ranks: ranks.collect(),
        };
        assert_eq!(members(4..6).to_string(), "lane 3 (ranks 4, 5)");
        assert_eq!(
            members(0..100).to_string(),
            "lane 3 (ranks 0, 1, 2, 3, 4, 5, 6, 7 and 92 more)"
        );
    }
}
