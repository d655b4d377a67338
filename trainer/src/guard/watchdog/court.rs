//! Rank 0's judgement: from what ranks say and when, to what they are told. Without sockets, so
//! that a world of one uses it as it is.

use std::time::{Duration, Instant};

use super::pulse::{Phase, PulseState};
use super::settings::Settings;
use super::slow::{SlowRank, SlowRanks};
use super::stop::{StopOrder, StopProtocol};
use super::verdict::{self, Cause, Row, Verdict};
use super::wire::{FromRank, ToRank};

/// How often the ranks' times are compared.
const SLOW_CHECK: Duration = Duration::from_secs(5);

/// What rank 0 is to do.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Order {
    /// Send to one rank.
    Tell(usize, ToRank),
    /// Send to all ranks that are there.
    TellAll(ToRank),
    /// Show the verdict.
    Announce(Verdict),
    /// Send everything that is still to be sent, and exit with this reason.
    Exit(String),
}

/// Where a rank is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Presence {
    Expected,
    Present,
    /// It has said goodbye, or was told to leave.
    Left,
    /// Gone without a goodbye.
    Lost,
}

#[derive(Clone, Debug)]
struct Seat {
    presence: Presence,
    host: String,
    pid: Option<u32>,
    state: PulseState,
    /// When it last said anything.
    heard: Instant,
    /// When it last said anything new.
    changed: Instant,
}

/// A run that is lost.
#[derive(Debug)]
struct Ending {
    line: String,
    since: Instant,
    dumped: Vec<bool>,
    over: bool,
}

/// What rank 0 knows of all ranks, and what it makes of it.
#[derive(Debug)]
pub(super) struct Court {
    settings: Settings,
    seats: Vec<Seat>,
    stop: StopProtocol,
    stop_reason: Option<String>,
    slow: SlowRanks,
    slow_checked: Instant,
    slow_found: Vec<SlowRank>,
    ending: Option<Ending>,
    ticked: Instant,
    orders: Vec<Order>,
}

impl Court {
    pub(super) fn new(ranks: usize, settings: &Settings, now: Instant) -> Self {
        let seat = Seat {
            presence: Presence::Expected,
            host: "host unknown".to_owned(),
            pid: None,
            state: PulseState::default(),
            heard: now,
            changed: now,
        };
        Self {
            seats: vec![seat; ranks],
            stop: StopProtocol::new(ranks, settings.stop_grace, settings.save_timeout),
            stop_reason: None,
            slow: SlowRanks::new(ranks),
            slow_checked: now,
            slow_found: Vec::new(),
            ending: None,
            ticked: now,
            orders: Vec::new(),
            settings: settings.clone(),
        }
    }

    /// What is to be done, once.
    pub(super) fn orders(&mut self) -> Vec<Order> {
        std::mem::take(&mut self.orders)
    }

    /// Slow ranks found since the last call.
    pub(super) fn slow_found(&mut self) -> Vec<SlowRank> {
        std::mem::take(&mut self.slow_found)
    }

    /// Whether `rank` may take its seat: once.
    pub(super) fn admits(&self, rank: usize) -> bool {
        self.seats
            .get(rank)
            .is_some_and(|seat| seat.presence == Presence::Expected)
    }

    /// Whether nobody is there any more who was not told to go.
    pub(super) fn is_empty(&self) -> bool {
        self.seats
            .iter()
            .all(|seat| matches!(seat.presence, Presence::Left | Presence::Lost))
    }

    /// A rank has proven itself.
    pub(super) fn joined(&mut self, rank: usize, now: Instant) {
        let Some(seat) = self.seats.get_mut(rank) else {
            return;
        };
        seat.presence = Presence::Present;
        (seat.heard, seat.changed) = (now, now);
        if let Some(reason) = self.stop_reason.clone() {
            self.orders.push(Order::Tell(rank, ToRank::Stop { reason }));
        }
    }

    /// The connection of a rank has closed.
    pub(super) fn closed(&mut self, rank: usize) {
        let told_to_go = self.stop.has_left() || self.ending.is_some();
        if let Some(seat) = self.seats.get_mut(rank)
            && seat.presence == Presence::Present
        {
            seat.presence = if told_to_go {
                Presence::Left
            } else {
                Presence::Lost
            };
        }
    }

    /// A rank has said something.
    pub(super) fn heard(&mut self, rank: usize, message: FromRank, now: Instant) {
        let Some(seat) = self.seats.get_mut(rank) else {
            return;
        };
        seat.heard = now;
        let order = match message {
            FromRank::Here { host, pid } => {
                (seat.host, seat.pid) = (host, Some(pid));
                None
            }
            FromRank::State(mut state) => {
                for (step, seconds) in state.busy.drain(..) {
                    self.slow.record(rank, step, seconds);
                }
                if state.progress != seat.state.progress {
                    seat.changed = now;
                }
                seat.state = state;
                self.orders.push(Order::Tell(rank, ToRank::Heard));
                None
            }
            FromRank::Stop { reason } => self.stop.request(reason, now),
            FromRank::Frozen { mark } => self.stop.frozen(rank, mark, now),
            FromRank::Saved { step, error } => {
                self.stop.saved(rank, step, error.map_or(Ok(()), Err), now)
            }
            FromRank::Committed { error } if rank == 0 => {
                self.stop.committed(error.map_or(Ok(()), Err))
            }
            FromRank::Committed { .. } => None,
            FromRank::Dumped => {
                let dumped = self.ending.as_mut().map(|ending| &mut ending.dumped);
                if let Some(dumped) = dumped.and_then(|dumped| dumped.get_mut(rank)) {
                    *dumped = true;
                }
                None
            }
            FromRank::Goodbye => {
                seat.presence = Presence::Left;
                self.orders.push(Order::Tell(rank, ToRank::Farewell));
                self.stop.left(rank)
            }
        };
        self.spread(order);
    }

    /// Lets time pass and judges.
    pub(super) fn tick(&mut self, now: Instant) {
        self.forgive_own_pause(now);
        if self.ending.is_some() {
            self.end(now);
            return;
        }
        if self.is_empty()
            && !self
                .seats
                .iter()
                .any(|seat| seat.presence == Presence::Lost)
        {
            return;
        }
        if !self.stop.has_left()
            && let Some(cause) = self.cause(now)
        {
            self.condemn(&cause, now);
            return;
        }
        let may_freeze = self.may_freeze();
        let order = self.stop.tick(now, may_freeze);
        self.spread(order);
        self.compare(now);
    }

    /// A pause of rank 0 itself (a stopped process, a frozen machine) is no silence of others.
    fn forgive_own_pause(&mut self, now: Instant) {
        let pause = now.saturating_duration_since(self.ticked);
        self.ticked = now;
        if pause > (self.settings.lease / 4).max(4 * self.settings.tick()) {
            for seat in &mut self.seats {
                seat.heard += pause;
                seat.changed += pause;
            }
        }
    }

    /// Why the run cannot go on, if it cannot.
    fn cause(&self, now: Instant) -> Option<Cause> {
        let mut seats = self.seats.iter().enumerate();
        if let Some((rank, _)) = seats.find(|(_, seat)| seat.presence == Presence::Lost) {
            return Some(Cause::Closed(rank));
        }
        let mut present = self
            .seats
            .iter()
            .enumerate()
            .filter(|(_, seat)| seat.presence == Presence::Present);
        let silence = |seat: &Seat| now.saturating_duration_since(seat.heard);
        if let Some((rank, seat)) = present.find(|(_, seat)| silence(seat) > self.settings.lease) {
            return Some(Cause::Silent(rank, silence(seat)));
        }
        let limit = self.settings.start_timeout;
        let late = |seat: &Seat| {
            seat.presence == Presence::Expected
                && now.saturating_duration_since(seat.changed) > limit
        };
        if let Some(rank) = self.seats.iter().position(late) {
            return Some(Cause::NeverJoined(rank, limit));
        }
        let stalled = self.seats.iter().any(|seat| self.is_stalled(seat, now));
        stalled.then_some(Cause::Stalled)
    }

    /// Whether a rank makes no progress and has no reason for it. Who waits in a collective for a
    /// rank that goes on (with a long save, say) has one.
    fn is_stalled(&self, seat: &Seat, now: Instant) -> bool {
        let limit = match seat.state.phase {
            Phase::Starting => self.settings.start_timeout,
            _ => self.settings.hang_timeout,
        };
        let idle = |seat: &Seat| now.saturating_duration_since(seat.changed);
        let others_go_on = || {
            let mut present = self.seats.iter();
            present.any(|other| other.presence == Presence::Present && idle(other) <= limit)
        };
        let waits = seat.state.waits_for.is_some();
        seat.presence == Presence::Present && idle(seat) > limit && !(waits && others_go_on())
    }

    fn condemn(&mut self, cause: &Cause, now: Instant) {
        let seats = self.seats.iter().enumerate();
        let rows: Vec<Row> = seats
            .map(|(rank, seat)| Row {
                rank,
                host: seat.host.clone(),
                pid: seat.pid,
                step: seat.state.step,
                action: seat.state.action,
                phase: seat.state.phase,
                idle: now.saturating_duration_since(seat.changed),
                waits_for: seat.state.waits_for.clone(),
                left: seat.presence == Presence::Left,
            })
            .collect();
        let stalled: Vec<bool> = self
            .seats
            .iter()
            .map(|seat| self.is_stalled(seat, now))
            .collect();
        let verdict = verdict::judge(cause, &rows, &stalled);
        self.ending = Some(Ending {
            line: verdict.line.clone(),
            since: now,
            dumped: vec![false; self.seats.len()],
            over: false,
        });
        let (line, dump) = (verdict.line.clone(), verdict.dump);
        self.orders.push(Order::Announce(verdict));
        self.orders.push(Order::TellAll(ToRank::End { line, dump }));
    }

    /// Exits when all ranks have written down their stacks, or have had their time.
    fn end(&mut self, now: Instant) {
        let Some(ending) = &mut self.ending else {
            return;
        };
        let mut seats = self.seats.iter().zip(&ending.dumped);
        let all = seats.all(|(seat, &dumped)| dumped || seat.presence != Presence::Present);
        let late = now.saturating_duration_since(ending.since) >= self.settings.end_wait;
        if !ending.over && (all || late) {
            ending.over = true;
            self.orders.push(Order::TellAll(ToRank::Exit));
            self.orders.push(Order::Exit(ending.line.clone()));
        }
    }

    /// Whether a step may be abandoned: every rank is there and has begun to train, and some rank
    /// is not yet on the ordinary way out.
    fn may_freeze(&self) -> bool {
        let training =
            |seat: &Seat| seat.presence == Presence::Present && seat.state.phase != Phase::Starting;
        let ends = |seat: &Seat| matches!(seat.state.phase, Phase::Save | Phase::Finishing);
        self.seats.iter().all(training) && !self.seats.iter().all(ends)
    }

    fn spread(&mut self, order: Option<StopOrder>) {
        let Some(order) = order else { return };
        let message = match order {
            StopOrder::Stop { reason } => {
                tracing::info!("watchdog: the run is to stop: {reason}");
                self.stop_reason = Some(reason.clone());
                ToRank::Stop { reason }
            }
            StopOrder::Freeze => {
                tracing::warn!(
                    "watchdog: the step did not end within {} s of the request to stop; it is \
                     abandoned and the state before it saved",
                    self.settings.stop_grace.as_secs_f64()
                );
                ToRank::Freeze
            }
            StopOrder::Abandon { mark } => ToRank::Abandon { mark },
            StopOrder::Parts { step } => ToRank::Parts { step },
            StopOrder::Leave { complete, detail } => {
                tracing::info!("watchdog: all ranks leave: {detail}");
                ToRank::Leave { complete, detail }
            }
        };
        self.orders.push(Order::TellAll(message));
    }

    /// Compares how long ranks compute.
    fn compare(&mut self, now: Instant) {
        let pause = SLOW_CHECK.min(5 * self.settings.heartbeat);
        if now.saturating_duration_since(self.slow_checked) < pause {
            return;
        }
        self.slow_checked = now;
        for (rank, step, busy_seconds, median_seconds) in self.slow.look(now) {
            let host = self.seats.get(rank).map(|seat| seat.host.clone());
            let found = SlowRank {
                rank,
                host: host.unwrap_or_default(),
                step,
                busy_seconds,
                median_seconds,
            };
            tracing::warn!("watchdog: {found}");
            self.slow_found.push(found);
        }
    }
}

/// Shows a verdict in the log and on standard error, the line to be parsed last.
pub(super) fn announce(verdict: &Verdict) {
    tracing::error!(
        "watchdog: the run cannot go on\n{}{}",
        verdict.table,
        verdict.line
    );
    eprintln!("{}{}", verdict.table, verdict.line);
}

#[cfg(test)]
mod tests;
