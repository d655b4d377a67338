//! All ranks of a run, and how they agree outside a step.

use super::{RunError, control};
use crate::comm::{Comm, Lane};
use crate::zero::CommClock;

/// How a rank tells the others that it fails because of the command line or the configuration.
const USAGE: f64 = 2.0;

/// A rank among all ranks of the run.
#[derive(Debug)]
pub(super) struct Ranks {
    pub(super) rank: usize,
    pub(super) ranks: usize,
    /// All ranks.
    pub(super) world: Lane,
}

impl Ranks {
    pub(super) fn new(comm: &Comm) -> Result<Self, RunError> {
        let everyone: Vec<usize> = (0..comm.world()).collect();
        Ok(Self {
            rank: comm.rank(),
            ranks: comm.world(),
            world: comm.lane(&everyone)?,
        })
    }

    /// Whether this rank speaks for the run: it writes metrics and manifests.
    pub(super) fn leads(&self) -> bool {
        self.rank == 0
    }

    /// Passes on what this rank did, provided that every rank succeeded: without this, ranks that
    /// succeeded would wait in the next collective for one that has gone.
    pub(super) fn together<T>(&self, mine: Result<T, RunError>) -> Result<T, RunError> {
        let mut failed = vec![0.0; self.ranks];
        failed[self.rank] = match &mine {
            Ok(_) => 0.0,
            Err(error) if error.is_usage() => USAGE,
            Err(_) => 1.0,
        };
        // A rank that has failed reports its own reason, whatever becomes of the others.
        let failed = match control::sum(&self.world, &failed, &mut CommClock::default()) {
            Ok(failed) => failed,
            Err(lost) => return mine.and(Err(lost)),
        };
        let value = mine?;
        match failed.iter().position(|&failed| failed > 0.0) {
            Some(rank) => Err(RunError::OtherRank {
                rank,
                usage: failed[rank] == USAGE,
            }),
            None => Ok(value),
        }
    }

    /// Whether it holds on every rank.
    pub(super) fn all(&self, mine: bool) -> Result<bool, RunError> {
        let against = [f64::from(u8::from(!mine))];
        let against = control::sum(&self.world, &against, &mut CommClock::default())?;
        Ok(against[0] == 0.0)
    }

    /// The leader's value on every rank, or an error on every rank when the leader has none.
    pub(super) fn leaders_choice<const N: usize>(
        &self,
        produce: impl FnOnce() -> Result<[u64; N], RunError>,
    ) -> Result<[u64; N], RunError> {
        let mine = if self.leads() { produce() } else { Ok([0; N]) };
        let mine = self.together(mine)?;
        // 32 bits at a time: a sum of f64 carries those exactly.
        let halves: Vec<f64> = mine
            .iter()
            .flat_map(|value| [(value >> 32) as f64, (*value as u32) as f64])
            .collect();
        let sums = control::sum(&self.world, &halves, &mut CommClock::default())?;
        Ok(std::array::from_fn(|index| {
            ((sums[2 * index] as u64) << 32) | sums[2 * index + 1] as u64
        }))
    }

    /// The leader's bytes on every rank.
    pub(super) fn leaders_bytes<const N: usize>(&self, mine: [u8; N]) -> Result<[u8; N], RunError> {
        let mine: Vec<f64> = mine
            .iter()
            .map(|&byte| if self.leads() { f64::from(byte) } else { 0.0 })
            .collect();
        let sums = control::sum(&self.world, &mine, &mut CommClock::default())?;
        Ok(std::array::from_fn(|index| sums[index] as u8))
    }

    /// Does something on the leader first, then on the others: for what the leader may have to
    /// make and the others only read.
    pub(super) fn in_turn<T>(
        &self,
        mut act: impl FnMut() -> Result<T, RunError>,
    ) -> Result<T, RunError> {
        if self.leads() {
            let made = self.together(act())?;
            return self.together(Ok(made));
        }
        self.together(Ok(()))?;
        self.together(act())
    }
}
