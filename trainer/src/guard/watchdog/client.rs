//! A rank's own watchdog thread.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Instant;

use super::link::Link;
use super::pulse::{Pulse, lock};
use super::settings::Settings;
use super::verdict::VERDICT_MARK;
use super::wire::{FromRank, ToRank, short};
use super::{Departure, Hooks};

/// What the rest of the rank wants from its watchdog.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Command {
    /// Tell rank 0.
    Send(FromRank),
    /// Say goodbye and end.
    Leave,
}

/// What the watchdog thread has heard, for those who ask or wait.
#[derive(Debug, Default)]
pub(super) struct News {
    pub(super) facts: Mutex<Facts>,
    pub(super) changed: Condvar,
}

#[derive(Debug, Default)]
pub(super) struct Facts {
    pub(super) stop_reason: Option<String>,
    /// All ranks have saved their parts of the state after this step.
    pub(super) parts: Option<u64>,
    pub(super) departure: Option<Departure>,
    /// The thread has ended.
    pub(super) over: bool,
}

/// Why the loop goes on or not.
enum Turn {
    On,
    Over,
}

/// The watchdog thread of one rank.
pub(super) struct Client {
    pub(super) link: Box<dyn Link>,
    pub(super) rank: usize,
    /// Rank 0 in a world of several: its host exits.
    pub(super) hosted: bool,
    pub(super) settings: Settings,
    pub(super) hooks: Hooks,
    pub(super) stop: Arc<AtomicBool>,
    pub(super) pulse: Arc<Pulse>,
    pub(super) commands: Receiver<Command>,
    pub(super) news: Arc<News>,
    pub(super) state: State,
}

/// What the thread remembers.
#[derive(Debug, Default)]
pub(super) struct State {
    /// When the last sign of life went out.
    sent: Option<Instant>,
    /// When rank 0 was last heard.
    heard: Option<Instant>,
    /// Rank 0 knows that somebody wants to stop.
    stop_told: bool,
    goodbye_said: bool,
    /// The end of the connection is no misfortune any more.
    free: bool,
    /// The run is lost: since when, and the verdict.
    ending: Option<(Instant, String)>,
}

impl Client {
    pub(super) fn run(mut self) {
        let here = FromRank::Here {
            host: host_name(),
            pid: std::process::id(),
        };
        self.state.heard = Some(Instant::now());
        match self.link.send(&here) {
            Ok(()) => while let Turn::On = self.turn() {},
            Err(reason) => self.lost(&reason),
        }
        lock(&self.news.facts).over = true;
        self.news.changed.notify_all();
    }

    fn turn(&mut self) -> Turn {
        match self.try_turn() {
            Ok(turn) => turn,
            Err(reason) => {
                self.listen_out();
                self.lost(&reason);
                Turn::Over
            }
        }
    }

    /// Takes in what rank 0 said before it went: it may explain why, and be no misfortune.
    fn listen_out(&mut self) {
        while let Ok(messages) = self.link.receive() {
            if messages.is_empty() {
                return;
            }
            for message in messages {
                match self.take(message) {
                    // It has taken its leave, or the exit hook has been called.
                    Ok(Turn::Over) => self.state.free = true,
                    // Nothing can be sent any more; that is known.
                    Ok(Turn::On) | Err(_) => {}
                }
            }
        }
    }

    /// One round; an error is why rank 0 is lost.
    fn try_turn(&mut self) -> Result<Turn, String> {
        loop {
            match self.commands.try_recv() {
                Ok(Command::Send(message)) => self.link.send(&message)?,
                Ok(Command::Leave) => {
                    self.state.goodbye_said = true;
                    self.link.send(&FromRank::Goodbye)?;
                }
                Err(TryRecvError::Empty) => break,
                // The rank goes without a goodbye, and rank 0 is to notice.
                Err(TryRecvError::Disconnected) if !self.state.goodbye_said => {
                    return Ok(Turn::Over);
                }
                Err(TryRecvError::Disconnected) => break,
            }
        }
        if !self.state.stop_told && self.stop.load(Ordering::Relaxed) {
            self.state.stop_told = true;
            let reason = format!("rank {} was asked to", self.rank);
            self.link.send(&FromRank::Stop { reason })?;
        }
        let due = |sent: Instant| sent.elapsed() >= self.settings.heartbeat;
        if !self.state.goodbye_said && self.state.sent.is_none_or(due) {
            self.state.sent = Some(Instant::now());
            let mut state = self.pulse.read();
            state.waits_for = (self.hooks.waits_for)().map(|text| short(&text));
            self.link.send(&FromRank::State(state))?;
        }
        for message in self.link.receive()? {
            self.state.heard = Some(Instant::now());
            if let Turn::Over = self.take(message)? {
                return Ok(Turn::Over);
            }
        }
        if let Some((since, line)) = &self.state.ending
            && since.elapsed() > 2 * self.settings.end_wait
        {
            let line = line.clone();
            self.exit(&line);
            return Ok(Turn::Over);
        }
        if let Some(heard) = self.state.heard
            && heard.elapsed() > self.settings.lease
        {
            return Err(format!(
                "no word from it for {:.0} s although its connection stands; the process is \
                 stopped or its host is gone",
                heard.elapsed().as_secs_f64()
            ));
        }
        Ok(Turn::On)
    }

    fn take(&mut self, message: ToRank) -> Result<Turn, String> {
        match message {
            ToRank::Heard => {}
            ToRank::Stop { reason } => {
                self.state.stop_told = true;
                lock(&self.news.facts).stop_reason = Some(reason);
                self.stop.store(true, Ordering::Relaxed);
                self.news.changed.notify_all();
            }
            ToRank::Freeze => {
                let mark = self.pulse.freeze();
                self.link.send(&FromRank::Frozen { mark })?;
            }
            ToRank::Abandon { mark } => {
                if !self.pulse.abandon(mark) {
                    let error = Some("it had already gone back to an older state".to_owned());
                    let step = mark.step;
                    self.link.send(&FromRank::Saved { step, error })?;
                }
                (self.hooks.on_abandon)(mark.step);
            }
            ToRank::Parts { step } => {
                lock(&self.news.facts).parts = Some(step);
                self.news.changed.notify_all();
            }
            ToRank::Leave { complete, detail } => {
                self.state.free = true;
                lock(&self.news.facts).departure = Some(Departure { complete, detail });
                self.news.changed.notify_all();
            }
            ToRank::End { line, dump } => {
                if self.rank != 0 {
                    tracing::error!("watchdog: rank 0 ends the run: {line}");
                }
                self.state.ending = Some((Instant::now(), line));
                if dump {
                    (self.hooks.dump)();
                }
                self.link.send(&FromRank::Dumped)?;
            }
            ToRank::Exit => {
                if let Some((_, line)) = self.state.ending.take() {
                    self.exit(&line);
                }
                return Ok(Turn::Over);
            }
            ToRank::Farewell | ToRank::Closing => return Ok(Turn::Over),
        }
        Ok(Turn::On)
    }

    /// Rank 0 is gone.
    fn lost(&mut self, reason: &str) {
        if let Some((_, line)) = self.state.ending.take() {
            self.exit(&line);
        } else if !self.state.goodbye_said && !self.state.free {
            let (peer, rank) = (self.link.peer(), self.rank);
            let line =
                format!("{VERDICT_MARK} 0 {peer}: {reason}; rank {rank} cannot go on without it");
            tracing::error!("{line}");
            eprintln!("{line}");
            (self.hooks.exit)(&line);
        }
    }

    fn exit(&self, line: &str) {
        if !self.hosted {
            (self.hooks.exit)(line);
        }
    }
}

/// The name of this host, as the kernel has it.
fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match name.trim() {
        "" => "host unknown".to_owned(),
        name => short(name),
    }
}
