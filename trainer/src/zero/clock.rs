//! What the collectives of a step cost.

use std::time::{Duration, Instant};

use crate::comm::{Times, Traffic};

/// Time and bytes of collectives, and on request what each of them did.
///
/// On a GPU nobody waits to learn the times: what is not over when the costs are taken counts among
/// the next ones.
#[derive(Debug, Default)]
pub struct CommClock {
    /// Time during which lanes moved bytes, added up over lanes. On a GPU, from when a lane's stream
    /// came to an operation until it was done with it, waiting for other ranks included.
    pub busy: Duration,
    /// Time during which the step waited for a lane and did nothing else. On a GPU, during which the
    /// stream that computes stood still for one.
    pub exposed: Duration,
    /// Bytes that this rank sent.
    pub bytes_sent: u64,
    /// One entry per collective, in the order in which they were waited for; `None` when nobody
    /// asked for them.
    pub spans: Option<Vec<CommSpan>>,
    /// Of operations on a GPU, what is not known yet.
    later: Vec<Times>,
}

/// One collective.
#[derive(Clone, Debug, PartialEq)]
pub struct CommSpan {
    /// What it was: `gather`, `reduce`, `replicate`, `control`.
    pub operation: &'static str,
    /// The piece that travelled: an index into the shard map's pieces.
    pub piece: Option<usize>,
    /// When it began to move bytes; `None` on a lane of one rank and on GPUs.
    pub begun: Option<Instant>,
    /// How long it took from then on.
    pub busy: Duration,
    /// Bytes that this rank sent.
    pub bytes_sent: u64,
    /// When the step began to wait for it.
    pub waited_from: Instant,
    /// How long it waited.
    pub waited: Duration,
}

impl CommClock {
    /// Takes account of a collective that the step began to wait for at `waited_from` and that has
    /// just been handed back.
    pub fn count(
        &mut self,
        operation: &'static str,
        piece: Option<usize>,
        waited_from: Instant,
        traffic: Traffic,
    ) {
        let waited = waited_from.elapsed();
        let busy = Duration::from_secs_f64(traffic.busy_seconds);
        match traffic.on_gpu {
            // The host has waited for nothing.
            Some(times) => self.later.push(times),
            None => self.exposed += waited,
        }
        self.busy += busy;
        self.bytes_sent += traffic.bytes_sent;
        if let Some(spans) = &mut self.spans {
            spans.push(CommSpan {
                operation,
                piece,
                begun: traffic.begun,
                busy,
                bytes_sent: traffic.bytes_sent,
                waited_from,
                waited,
            });
        }
    }

    /// The costs so far; counting goes on from zero, with spans if there were spans.
    pub fn take(&mut self) -> Self {
        let (busy, exposed) = (&mut self.busy, &mut self.exposed);
        self.later.retain(|times| {
            let Some(seconds) = times.read() else {
                return true;
            };
            *busy += Duration::from_secs_f64(seconds.busy);
            *exposed += Duration::from_secs_f64(seconds.waited);
            false
        });
        let fresh = Self {
            spans: self.spans.as_ref().map(|_| Vec::new()),
            later: std::mem::take(&mut self.later),
            ..Self::default()
        };
        std::mem::replace(self, fresh)
    }
}
