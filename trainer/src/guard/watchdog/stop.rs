//! How a request to stop becomes a saved state on every rank: rank 0's part, without clocks or
//! sockets.
//!
//! ```text
//! Running ─request─▶ Stopping ─ grace over, step still under way ─▶ Freezing ─all answered─▶
//!   Saving(m = least mark) ─all saved─▶ Committing ─rank 0 has committed─▶ Left
//! ```
//!
//! A control reduction of step m+1 cannot complete on any rank if one rank never submits its part,
//! and a rank that has answered a freeze with m never submits more. So no rank has updated beyond
//! m. Every rank has submitted m, so the control reduction of m completes everywhere: all ranks
//! come to hold the state after m without any further agreement.

use std::time::{Duration, Instant};

use super::gate::Mark;

/// Where the request stands.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Stage {
    Running,
    Stopping {
        since: Instant,
    },
    Freezing {
        marks: Vec<Option<Mark>>,
    },
    Saving {
        mark: Mark,
        since: Instant,
        saved: Vec<bool>,
    },
    Committing {
        mark: Mark,
        since: Instant,
    },
    Left,
}

/// What all ranks are to be told.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum StopOrder {
    Stop {
        reason: String,
    },
    Freeze,
    Abandon {
        mark: Mark,
    },
    /// Every rank has saved its part.
    Parts {
        step: u64,
    },
    Leave {
        complete: bool,
        detail: String,
    },
}

/// Rank 0's part in stopping a run.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct StopProtocol {
    ranks: usize,
    grace: Duration,
    save_timeout: Duration,
    stage: Stage,
}

impl StopProtocol {
    pub(super) fn new(ranks: usize, grace: Duration, save_timeout: Duration) -> Self {
        Self {
            ranks,
            grace,
            save_timeout,
            stage: Stage::Running,
        }
    }

    /// Whether the ranks have been told to leave.
    pub(super) fn has_left(&self) -> bool {
        self.stage == Stage::Left
    }

    /// Somebody asks to stop. Only the first request counts.
    pub(super) fn request(&mut self, reason: String, now: Instant) -> Option<StopOrder> {
        if self.stage != Stage::Running {
            return None;
        }
        self.stage = Stage::Stopping { since: now };
        Some(StopOrder::Stop { reason })
    }

    /// A rank has closed its gate.
    pub(super) fn frozen(&mut self, rank: usize, mark: Mark, now: Instant) -> Option<StopOrder> {
        let Stage::Freezing { marks } = &mut self.stage else {
            return None;
        };
        // The first answer counts: what a rank says after it may be about another state.
        if let Some(slot @ None) = marks.get_mut(rank) {
            *slot = Some(mark);
        }
        let marks: Option<Vec<Mark>> = marks.iter().copied().collect();
        let mark = marks?.into_iter().min()?;
        self.stage = Stage::Saving {
            mark,
            since: now,
            saved: vec![false; self.ranks],
        };
        Some(StopOrder::Abandon { mark })
    }

    /// A rank has saved its part of the state after `step`, or could not.
    pub(super) fn saved(
        &mut self,
        rank: usize,
        step: u64,
        result: Result<(), String>,
        now: Instant,
    ) -> Option<StopOrder> {
        let Stage::Saving { mark, saved, .. } = &mut self.stage else {
            return None;
        };
        let mark = *mark;
        if let Err(reason) = result {
            return Some(self.leave(false, format!("rank {rank} could not save: {reason}")));
        }
        if step != mark.step {
            let detail = format!(
                "rank {rank} saved the state after step {step} where {} was expected",
                mark.step
            );
            return Some(self.leave(false, detail));
        }
        if let Some(slot) = saved.get_mut(rank) {
            *slot = true;
        }
        if !saved.iter().all(|&saved| saved) {
            return None;
        }
        self.stage = Stage::Committing { mark, since: now };
        Some(StopOrder::Parts { step: mark.step })
    }

    /// Rank 0 has made the parts a checkpoint, or could not.
    pub(super) fn committed(&mut self, result: Result<(), String>) -> Option<StopOrder> {
        let Stage::Committing { mark, .. } = self.stage else {
            return None;
        };
        let step = mark.step;
        Some(match result {
            Ok(()) => self.leave(true, format!("the state after step {step} is saved")),
            Err(reason) => self.leave(false, format!("rank 0 could not commit: {reason}")),
        })
    }

    /// A rank has said goodbye. In the middle of an abandoned step nobody can save without it.
    pub(super) fn left(&mut self, rank: usize) -> Option<StopOrder> {
        match self.stage {
            Stage::Freezing { .. } | Stage::Saving { .. } | Stage::Committing { .. } => {
                Some(self.leave(
                    false,
                    format!("rank {rank} left before the state was saved"),
                ))
            }
            Stage::Running | Stage::Stopping { .. } | Stage::Left => None,
        }
    }

    /// Lets time pass. `may_freeze` says that a step is under way on some rank and that none is
    /// still starting or already gone.
    pub(super) fn tick(&mut self, now: Instant, may_freeze: bool) -> Option<StopOrder> {
        let over = |since: Instant, limit| now.saturating_duration_since(since) >= limit;
        match &self.stage {
            Stage::Stopping { since } if may_freeze && over(*since, self.grace) => {
                self.stage = Stage::Freezing {
                    marks: vec![None; self.ranks],
                };
                Some(StopOrder::Freeze)
            }
            Stage::Saving { since, saved, .. } if over(*since, self.save_timeout) => {
                let late = saved.iter().enumerate().filter(|&(_, &saved)| !saved);
                let late: Vec<usize> = late.map(|(rank, _)| rank).collect();
                let detail = format!(
                    "{} did not save within {} s",
                    super::verdict::ranks(&late),
                    self.save_timeout.as_secs_f64()
                );
                Some(self.leave(false, detail))
            }
            Stage::Committing { since, .. } if over(*since, self.save_timeout) => {
                let limit = self.save_timeout.as_secs_f64();
                Some(self.leave(false, format!("rank 0 did not commit within {limit} s")))
            }
            _ => None,
        }
    }

    fn leave(&mut self, complete: bool, detail: String) -> StopOrder {
        self.stage = Stage::Left;
        StopOrder::Leave { complete, detail }
    }
}

#[cfg(test)]
mod tests;
