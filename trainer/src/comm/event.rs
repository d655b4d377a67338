//! Events: the end of an operation, as the operations that come after it see it.
//!
//! A ticket is the claim to an operation's tensor and can be redeemed once. An event is only the
//! knowledge that the operation has ended, and how. It can be copied and asked again and again,
//! whether the ticket was waited for, dropped, or ready from the start, and it keeps no tensor alive.
//! Nobody sleeps on an event: the communication thread looks at those of the operations at the heads
//! of its lanes whenever it polls.

use std::sync::{Arc, OnceLock};

use super::error::Error;

/// The end of one operation; `None` inside says that it went well.
#[derive(Debug, Clone, Default)]
pub(super) struct Event {
    end: Arc<OnceLock<Option<Arc<Error>>>>,
}

impl Event {
    /// Says that the operation has ended, with what stopped it if anything did. The first end
    /// stands.
    pub(super) fn happen(&self, failure: Option<Arc<Error>>) {
        let _ = self.end.set(failure);
    }

    /// Whether the operation has ended.
    pub(super) fn has_happened(&self) -> bool {
        self.end.get().is_some()
    }
}

/// What the events that an operation comes after say about it.
#[derive(Debug)]
pub(super) enum Gate {
    /// All went well: it may start.
    Open,
    /// One of them is yet to come.
    Shut,
    /// One of their operations failed: it must not run.
    Broken(Arc<Error>),
}

/// Looks at all of `events`. A failure counts even while others are yet to come.
pub(super) fn gate(events: &[Event]) -> Gate {
    let mut gate = Gate::Open;
    for event in events {
        match event.end.get() {
            Some(None) => {}
            Some(Some(cause)) => return Gate::Broken(Arc::clone(cause)),
            None => gate = Gate::Shut,
        }
    }
    gate
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gate_opens_with_the_last_event_and_breaks_with_the_first_failure() {
        let events = [Event::default(), Event::default(), Event::default()];
        assert!(matches!(gate(&[]), Gate::Open));
        events[1].happen(None);
        assert!(matches!(gate(&events), Gate::Shut));
        events[0].happen(None);
        assert!(matches!(gate(&events[..2]), Gate::Open));
        let cause = Arc::new(Error::Start("no network".to_owned()));
        events[2].happen(Some(cause));
        events[2].happen(None);
        assert!(matches!(gate(&events), Gate::Broken(_)));
        assert!(matches!(
            gate(&[Event::default(), events[2].clone()]),
            Gate::Broken(_)
        ));
    }
}
