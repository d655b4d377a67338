//! When each operation of a layer ran, for those who ask.

use std::time::Instant;

/// One operation of a layer, forwards or backwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpSpan {
    /// What it was: `rms_norm`, `linear`, `linear dgrad`, `linear wgrad`, `rope`, `attention`, …
    pub operation: &'static str,
    /// Name of the slot that the operation writes, or wrote when its gradient is computed.
    pub slot: &'static str,
    /// When it began.
    pub begun: Instant,
    /// When it had ended.
    pub ended: Instant,
}

/// A stopwatch beside the operations; it is off until somebody wants to know.
///
/// Operations follow each other without a gap, so one glance at the clock ends one and begins the
/// next.
#[derive(Debug, Default)]
pub struct Stopwatch {
    laps: Option<Laps>,
}

#[derive(Debug)]
struct Laps {
    last: Instant,
    spans: Vec<OpSpan>,
}

impl Stopwatch {
    /// Begins to measure, or stops and forgets what was measured.
    pub fn switch(&mut self, on: bool) {
        self.laps = on.then(|| Laps {
            last: Instant::now(),
            spans: Vec::new(),
        });
    }

    /// What was measured since the last call, in order.
    pub fn take(&mut self) -> Vec<OpSpan> {
        match &mut self.laps {
            Some(laps) => std::mem::take(&mut laps.spans),
            None => Vec::new(),
        }
    }

    /// The next operation begins now.
    pub(super) fn start(&mut self) {
        if let Some(laps) = &mut self.laps {
            laps.last = Instant::now();
        }
    }

    /// An operation ends now.
    pub(super) fn lap(&mut self, operation: &'static str, slot: &'static str) {
        if let Some(Laps { last, spans }) = &mut self.laps {
            let ended = Instant::now();
            spans.push(OpSpan {
                operation,
                slot,
                begun: *last,
                ended,
            });
            *last = ended;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn laps_follow_each_other_and_are_handed_out_once() {
        let mut watch = Stopwatch::default();
        watch.lap("rope", "qkv");
        assert!(watch.take().is_empty(), "it is off at first");
        watch.switch(true);
        watch.start();
        watch.lap("rope", "qkv");
        watch.lap("attention", "attention");
        let spans = watch.take();
        assert_eq!(spans.len(), 2);
        assert_eq!(spans[0].ended, spans[1].begun);
        assert!(watch.take().is_empty());
        watch.switch(false);
        watch.lap("rope", "qkv");
        assert!(watch.take().is_empty());
    }
}
