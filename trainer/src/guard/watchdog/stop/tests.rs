#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::HashSet;

use proptest::prelude::*;

use super::super::gate::Gate;
use super::*;

/// A run of a few ranks in the middle of a freeze: every message is a bit that is on its way, and
/// every rank goes on as far as its gate and the other ranks let it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    protocol: StopProtocol,
    ranks: Vec<Rank>,
    now: Instant,
    /// No rank takes more steps than this; keeps the world finite.
    last_step: u64,
    /// What rank 0 has decided.
    abandoned: Option<Mark>,
    complete: Option<bool>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Rank {
    gate: Gate,
    /// The step under way.
    step: u64,
    /// Its control reduction is submitted.
    submitted: bool,
    /// The newest update applied.
    updated: u64,
    freeze_under_way: bool,
    answer_under_way: Option<Mark>,
    abandon_under_way: bool,
    /// The step thread knows what to keep.
    keeps: Option<u64>,
    report_under_way: Option<u64>,
    saved: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    GraceEnds,
    Submit(usize),
    /// The control reduction completes on the rank, which updates and begins the next step.
    Complete(usize),
    FreezeArrives(usize),
    AnswerArrives(usize),
    AbandonArrives(usize),
    Save(usize),
    ReportArrives(usize),
    Commit,
}

impl World {
    fn new(ranks: usize, last_step: u64, now: Instant) -> Self {
        let mut protocol =
            StopProtocol::new(ranks, Duration::from_secs(10), Duration::from_secs(60));
        protocol.request("test".into(), now).unwrap();
        let mut rank = Rank {
            step: 1,
            ..Rank::default()
        };
        rank.gate.begin(0).unwrap();
        Self {
            protocol,
            ranks: vec![rank; ranks],
            now,
            last_step,
            abandoned: None,
            complete: None,
        }
    }

    /// Everything that can happen next.
    fn enabled(&self) -> Vec<Event> {
        let mut events = Vec::new();
        if matches!(self.protocol.stage, Stage::Stopping { .. }) {
            events.push(Event::GraceEnds);
        }
        if matches!(self.protocol.stage, Stage::Committing { .. }) {
            events.push(Event::Commit);
        }
        for (at, rank) in self.ranks.iter().enumerate() {
            let left = rank.keeps.is_some_and(|kept| rank.step > kept);
            if !rank.submitted && rank.step <= self.last_step && !left {
                let mut gate = rank.gate;
                if gate.submit(rank.step).is_ok() {
                    events.push(Event::Submit(at));
                }
            }
            // Tickets of the step that must be left fail; those of an older one go on.
            if rank.submitted && !left && self.all_submitted(rank.step) {
                events.push(Event::Complete(at));
            }
            if rank.freeze_under_way {
                events.push(Event::FreezeArrives(at));
            }
            if rank.answer_under_way.is_some() {
                events.push(Event::AnswerArrives(at));
            }
            if rank.abandon_under_way {
                events.push(Event::AbandonArrives(at));
            }
            if left && rank.saved.is_none() {
                events.push(Event::Save(at));
            }
            if rank.report_under_way.is_some() {
                events.push(Event::ReportArrives(at));
            }
        }
        events
    }

    fn all_submitted(&self, step: u64) -> bool {
        let mut ranks = self.ranks.iter();
        ranks.all(|rank| rank.step > step || (rank.step == step && rank.submitted))
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::GraceEnds => {
                let late = self.now + Duration::from_secs(11);
                assert_eq!(
                    self.protocol.tick(self.now, true),
                    None,
                    "before the grace ends"
                );
                assert_eq!(
                    self.protocol.tick(late, false),
                    None,
                    "no step is under way"
                );
                let order = self.protocol.tick(late, true);
                self.obey(order);
            }
            Event::Submit(at) => {
                let rank = &mut self.ranks[at];
                rank.gate.submit(rank.step).unwrap();
                rank.submitted = true;
            }
            Event::Complete(at) => {
                let rank = &mut self.ranks[at];
                rank.updated = rank.step;
                rank.step += 1;
                rank.submitted = false;
            }
            Event::FreezeArrives(at) => {
                let rank = &mut self.ranks[at];
                rank.freeze_under_way = false;
                rank.answer_under_way = Some(rank.gate.freeze());
            }
            Event::AnswerArrives(at) => {
                let mark = self.ranks[at].answer_under_way.take().unwrap();
                let order = self.protocol.frozen(at, mark, self.now);
                self.obey(order);
            }
            Event::AbandonArrives(at) => {
                let rank = &mut self.ranks[at];
                rank.abandon_under_way = false;
                rank.keeps = Some(self.abandoned.unwrap().step);
            }
            Event::Save(at) => {
                let rank = &mut self.ranks[at];
                rank.saved = Some(rank.updated);
                rank.report_under_way = rank.saved;
            }
            Event::ReportArrives(at) => {
                let step = self.ranks[at].report_under_way.take().unwrap();
                let order = self.protocol.saved(at, step, Ok(()), self.now);
                self.obey(order);
            }
            Event::Commit => {
                let order = self.protocol.committed(Ok(()));
                self.obey(order);
            }
        }
    }

    fn obey(&mut self, order: Option<StopOrder>) {
        match order {
            None | Some(StopOrder::Parts { .. }) => {}
            Some(StopOrder::Freeze) => {
                for rank in &mut self.ranks {
                    rank.freeze_under_way = true;
                }
            }
            Some(StopOrder::Abandon { mark }) => {
                assert_eq!(self.abandoned, None, "abandoned twice");
                self.abandoned = Some(mark);
                for rank in &mut self.ranks {
                    rank.abandon_under_way = true;
                }
            }
            Some(StopOrder::Leave { complete, detail }) => {
                assert!(complete, "{detail}");
                self.complete = Some(complete);
            }
            Some(StopOrder::Stop { .. }) => panic!("stopped twice"),
        }
    }

    /// What must hold at any moment.
    fn check(&self) {
        let Some(mark) = self.abandoned else { return };
        for rank in &self.ranks {
            assert!(
                rank.updated <= mark.step,
                "a rank updated past {mark:?}: {self:?}"
            );
            assert!(
                rank.saved.is_none_or(|saved| saved == mark.step),
                "{self:?}"
            );
        }
    }

    /// What must hold when nothing more can happen.
    fn check_end(&self) {
        assert_eq!(self.complete, Some(true), "the run hangs: {self:?}");
        let mark = self.abandoned.unwrap();
        assert!(self.ranks.iter().all(|rank| rank.saved == Some(mark.step)));
    }
}

/// Walks every interleaving and returns the number of states and the marks that came out.
fn explore(ranks: usize, last_step: u64) -> (usize, HashSet<u64>) {
    let first = World::new(ranks, last_step, Instant::now());
    let mut seen = HashSet::from([first.clone()]);
    let mut marks = HashSet::new();
    let mut open = vec![first];
    while let Some(world) = open.pop() {
        world.check();
        let events = world.enabled();
        if events.is_empty() {
            world.check_end();
            marks.extend(world.abandoned.map(|mark| mark.step));
        }
        for event in events {
            let mut next = world.clone();
            next.take(event);
            if seen.insert(next.clone()) {
                open.push(next);
            }
        }
    }
    (seen.len(), marks)
}

#[test]
fn every_interleaving_of_two_ranks_saves_one_state() {
    let (states, marks) = explore(2, 3);
    assert!(states > 400, "{states}");
    assert_eq!(marks, HashSet::from([0, 1, 2, 3]));
}

#[test]
fn every_interleaving_of_three_ranks_saves_one_state() {
    let (states, marks) = explore(3, 2);
    assert!(states > 1000, "{states}");
    assert_eq!(marks, HashSet::from([0, 1, 2]));
}

proptest! {
    #[test]
    fn random_interleavings_of_many_ranks_save_one_state(
        ranks in 1usize..9,
        choices in prop::collection::vec(any::<prop::sample::Index>(), 400),
    ) {
        let mut world = World::new(ranks, 6, Instant::now());
        let mut choices = choices.iter().cycle();
        loop {
            world.check();
            let events = world.enabled();
            if events.is_empty() {
                break;
            }
            let event = events[choices.next().unwrap().index(events.len())];
            world.take(event);
        }
        world.check_end();
    }
}

fn saving(ranks: usize, now: Instant) -> StopProtocol {
    let mut protocol = StopProtocol::new(ranks, Duration::ZERO, Duration::from_secs(60));
    protocol.request("test".into(), now).unwrap();
    assert_eq!(protocol.tick(now, true), Some(StopOrder::Freeze));
    for rank in 0..ranks {
        let mark = Mark {
            beginnings: 1,
            step: 7,
        };
        let order = protocol.frozen(rank, mark, now);
        assert_eq!(order.is_some(), rank + 1 == ranks);
    }
    protocol
}

#[test]
fn only_the_first_request_counts() {
    let now = Instant::now();
    let mut protocol = StopProtocol::new(2, Duration::ZERO, Duration::ZERO);
    assert!(protocol.request("one".into(), now).is_some());
    assert_eq!(protocol.request("two".into(), now), None);
}

#[test]
fn answers_that_nobody_asked_for_change_nothing() {
    let now = Instant::now();
    let mut protocol = StopProtocol::new(2, Duration::ZERO, Duration::ZERO);
    let before = protocol.clone();
    assert_eq!(protocol.frozen(0, Mark::default(), now), None);
    assert_eq!(protocol.saved(0, 3, Ok(()), now), None);
    assert_eq!(protocol.committed(Ok(())), None);
    assert_eq!(protocol, before);
}

#[test]
fn a_second_answer_does_not_move_the_first() {
    let now = Instant::now();
    let mut protocol = StopProtocol::new(2, Duration::ZERO, Duration::ZERO);
    protocol.request("test".into(), now);
    protocol.tick(now, true);
    let mark = |step| Mark {
        beginnings: 1,
        step,
    };
    assert_eq!(protocol.frozen(0, mark(4), now), None);
    assert_eq!(protocol.frozen(0, mark(9), now), None);
    let expected = Some(StopOrder::Abandon { mark: mark(4) });
    assert_eq!(protocol.frozen(1, mark(5), now), expected);
}

#[test]
fn a_failed_or_wrong_or_late_save_is_not_complete() {
    let now = Instant::now();
    let detail = |order: Option<StopOrder>| match order {
        Some(StopOrder::Leave {
            complete: false,
            detail,
        }) => detail,
        other => panic!("{other:?}"),
    };
    let mut protocol = saving(2, now);
    assert_eq!(
        detail(protocol.saved(1, 7, Err("disk full".into()), now)),
        "rank 1 could not save: disk full"
    );
    assert!(protocol.has_left());

    let wrong = detail(saving(2, now).saved(0, 8, Ok(()), now));
    assert!(wrong.contains("step 8 where 7 was expected"), "{wrong}");

    let mut protocol = saving(3, now);
    assert_eq!(protocol.saved(1, 7, Ok(()), now), None);
    assert_eq!(protocol.tick(now + Duration::from_secs(59), true), None);
    let late = detail(protocol.tick(now + Duration::from_secs(60), true));
    assert_eq!(late, "ranks 0 and 2 did not save within 60 s");

    let mut protocol = saving(1, now);
    assert_eq!(
        protocol.saved(0, 7, Ok(()), now),
        Some(StopOrder::Parts { step: 7 })
    );
    let failed = detail(protocol.committed(Err("no rename".into())));
    assert!(failed.contains("no rename"), "{failed}");
}
