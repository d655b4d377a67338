//! A buffer that is either here or under way in a collective.

use std::time::{Duration, Instant};

use tch::Tensor;

use super::ZeroError;
use crate::comm::Ticket;

/// What the collectives of a step cost.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct CommClock {
    /// Time during which a lane moved bytes.
    pub busy: Duration,
    /// Time during which the step waited for a lane and did nothing else.
    pub exposed: Duration,
    /// Bytes that this rank sent.
    pub bytes_sent: u64,
}

/// A flat buffer, here or under way.
#[derive(Debug, Default)]
pub enum Slot {
    /// Here, to be read and written.
    Ready(Tensor),
    /// Moved into a collective.
    InFlight(Ticket),
    /// Gone: the collective that held it failed.
    #[default]
    Lost,
}

impl Slot {
    /// Moves the buffer into a collective.
    ///
    /// # Errors
    /// When an earlier collective on the buffer failed.
    pub fn start(
        &mut self,
        clock: &mut CommClock,
        collective: impl FnOnce(Tensor) -> Ticket,
    ) -> Result<(), ZeroError> {
        self.ready(clock)?;
        match std::mem::take(self) {
            Slot::Ready(tensor) => *self = Slot::InFlight(collective(tensor)),
            _ => return Err(ZeroError::Lost),
        }
        Ok(())
    }

    /// The buffer, after waiting for the collective that holds it, if any.
    ///
    /// # Errors
    /// When that collective failed.
    pub fn ready(&mut self, clock: &mut CommClock) -> Result<&mut Tensor, ZeroError> {
        if matches!(self, Slot::InFlight(_))
            && let Slot::InFlight(ticket) = std::mem::take(self)
        {
            let began = Instant::now();
            let (tensor, traffic) = ticket.wait()?;
            clock.exposed += began.elapsed();
            clock.busy += Duration::from_secs_f64(traffic.busy_seconds);
            clock.bytes_sent += traffic.bytes_sent;
            *self = Slot::Ready(tensor);
        }
        match self {
            Slot::Ready(tensor) => Ok(tensor),
            _ => Err(ZeroError::Lost),
        }
    }
}

impl std::ops::AddAssign for CommClock {
    fn add_assign(&mut self, other: Self) {
        self.busy += other.busy;
        self.exposed += other.exposed;
        self.bytes_sent += other.bytes_sent;
    }
}
