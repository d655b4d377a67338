//! What the collectives of a step cost.

use std::time::{Duration, Instant};

use crate::comm::Traffic;

/// Time and bytes of collectives, and on request what each of them did.
#[derive(Clone, Debug, Default)]
pub struct CommClock {
    /// Time during which lanes moved bytes, added up over lanes.
    pub busy: Duration,
    /// Time during which the step waited for a lane and did nothing else.
    pub exposed: Duration,
    /// Bytes that this rank sent.
    pub bytes_sent: u64,
    /// One entry per collective, in the order in which they were waited for; `None` when nobody
    /// asked for them.
    pub spans: Option<Vec<CommSpan>>,
}

/// One collective.
#[derive(Clone, Debug, PartialEq)]
pub struct CommSpan {
    /// What it was: `gather`, `reduce`, `replicate`, `control`.
    pub operation: &'static str,
    /// The piece that travelled: an index into the shard map's pieces.
    pub piece: Option<usize>,
    /// When it began to move bytes; `None` on a lane of one rank.
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
        self.exposed += waited;
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
        let fresh = Self {
            spans: self.spans.as_ref().map(|_| Vec::new()),
            ..Self::default()
        };
        std::mem::replace(self, fresh)
    }
}
