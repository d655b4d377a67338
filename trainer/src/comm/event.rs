//! Events: the end of an operation, as the operations that come after it see it.
//!
//! A ticket is the claim to an operation's tensor and can be redeemed once. An event is only the
//! knowledge that the operation has ended, and how. It can be copied and asked again and again,
//! whether the ticket was waited for, dropped, or ready from the start, and it keeps no tensor alive.
//! Nobody sleeps on an event: the communication thread looks at those of the operations at the heads
//! of its lanes whenever it polls. An operation on GPUs is over for the host once it is issued; its
//! event then holds marks, which other streams of the GPU wait for.

use std::sync::{Arc, OnceLock};

use super::error::Error;
use super::nccl::End;

/// The end of one operation.
#[derive(Debug, Clone, Default)]
pub(super) struct Event {
    end: Arc<OnceLock<Ending>>,
}

/// How an operation has ended.
#[derive(Debug)]
pub(super) enum Ending {
    Well,
    Badly(Arc<Error>),
    /// It has been issued to streams of a GPU, and ends there.
    Issued(Vec<Arc<End>>),
}

impl Event {
    /// Says that the operation has ended, and how. The first end stands.
    pub(super) fn happen(&self, ending: Ending) {
        let _ = self.end.set(ending);
    }

    /// Whether it is the end of an operation on a GPU.
    pub(super) fn is_on_gpu(&self) -> bool {
        matches!(self.end.get(), Some(Ending::Issued(_)))
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
    /// All went well so far, and it may start behind these on a GPU.
    Behind(Vec<Arc<End>>),
}

/// Looks at all of `events`. A failure counts even while others are yet to come.
pub(super) fn gate(events: &[Event]) -> Gate {
    let (mut shut, mut issued) = (false, Vec::new());
    for event in events {
        match event.end.get() {
            Some(Ending::Well) => {}
            Some(Ending::Badly(cause)) => return Gate::Broken(Arc::clone(cause)),
            Some(Ending::Issued(ends)) => issued.extend(ends.iter().cloned()),
            None => shut = true,
        }
    }
    if shut {
        Gate::Shut
    } else if issued.is_empty() {
        Gate::Open
    } else {
        Gate::Behind(issued)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gate_opens_with_the_last_event_and_breaks_with_the_first_failure() {
        let events = [Event::default(), Event::default(), Event::default()];
        assert!(matches!(gate(&[]), Gate::Open));
        events[1].happen(Ending::Well);
        assert!(matches!(gate(&events), Gate::Shut));
        events[0].happen(Ending::Well);
        assert!(matches!(gate(&events[..2]), Gate::Open));
        let cause = Arc::new(Error::Start("no network".to_owned()));
        events[2].happen(Ending::Badly(cause));
        events[2].happen(Ending::Well);
        assert!(matches!(gate(&events), Gate::Broken(_)));
        assert!(matches!(
            gate(&[Event::default(), events[2].clone()]),
            Gate::Broken(_)
        ));
    }
}
