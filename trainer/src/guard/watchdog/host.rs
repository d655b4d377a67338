//! Rank 0's end: it listens, admits ranks that know the secret, and carries words between them and
//! its judgement. One thread, whatever the number of ranks.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::ExitHook;
use super::court::{Court, Order, announce};
use super::error::WatchdogError;
use super::handshake::{self, ANSWER_BYTES, Secret, Transcript};
use super::invitation::{Invitation, listening};
use super::pulse::lock;
use super::settings::Settings;
use super::slow::SlowRank;
use super::wire::{self, Frames, FromRank, ToRank};

/// How long a stranger may take to prove itself.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);

/// Strangers beyond the number of ranks that may be at the door at once.
const SPARE_DOORS: usize = 16;

/// Bytes that wait for a rank that does not read; with more, only what decides is added.
const FULL: usize = 64 * 1024;

/// How long the last words may take to go out.
const FLUSH_LIMIT: Duration = Duration::from_millis(500);

/// The watchdog of rank 0 in a world of several ranks. It is handed to
/// [`Watchdog::join`](super::Watchdog::join).
///
/// Dropped without a goodbye, it vanishes: the other ranks notice at once and exit.
#[derive(Debug)]
pub struct Host {
    invitation: Invitation,
    wishes: Arc<Wishes>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Wishes {
    /// End when all ranks have said goodbye.
    close: AtomicBool,
    /// End although some have not.
    part: AtomicBool,
    /// End without a word.
    vanish: AtomicBool,
    slow: Mutex<Vec<SlowRank>>,
}

impl Host {
    /// Begins to listen for the other ranks of a world of `world`. With `one_host`, nothing outside
    /// this host can connect. `exit` is called when the run is lost, with the verdict; see
    /// [`Hooks`](super::Hooks).
    ///
    /// # Errors
    /// [`WatchdogError`] when nothing can be listened on.
    pub fn open(
        world: usize,
        one_host: bool,
        settings: &Settings,
        exit: ExitHook,
    ) -> Result<Self, WatchdogError> {
        let mut listeners = Vec::new();
        let mut refused = None;
        for ip in listening(one_host, settings.interface.as_deref())? {
            match listen(SocketAddr::new(ip, 0)) {
                Ok(listener) => listeners.push(listener),
                Err(source) => {
                    refused = Some(WatchdogError::Listen {
                        address: ip.to_string(),
                        source,
                    });
                }
            }
        }
        let addresses: Vec<SocketAddr> = listeners
            .iter()
            .filter_map(|listener| listener.local_addr().ok())
            .collect();
        if let (true, Some(error)) = (addresses.is_empty(), refused) {
            return Err(error);
        }
        let invitation = Invitation {
            addresses,
            secret: Secret(handshake::random()?),
        };
        tracing::debug!("watchdog: listening on {:?}", invitation.addresses);
        allow_files(world);
        let wishes = Arc::new(Wishes::default());
        let server = Server {
            listeners,
            connections: Vec::new(),
            court: Court::new(world, settings, Instant::now()),
            world,
            secret: invitation.secret.clone(),
            tick: settings.tick(),
            wishes: Arc::clone(&wishes),
            exit,
        };
        let thread = std::thread::Builder::new()
            .name("watchdog-host".to_owned())
            .spawn(move || server.run())
            .map_err(|error| WatchdogError::System {
                what: "the thread of the watchdog",
                reason: error.to_string(),
            })?;
        Ok(Self {
            invitation,
            wishes,
            thread: Some(thread),
        })
    }

    /// To be broadcast to all ranks.
    #[must_use]
    pub fn invitation(&self) -> &Invitation {
        &self.invitation
    }

    /// Ranks found to be slow since the last call.
    pub(super) fn take_slow(&self) -> Vec<SlowRank> {
        std::mem::take(&mut *lock(&self.wishes.slow))
    }

    /// Waits until all ranks have said goodbye, for `limit` at most, and ends.
    pub(super) fn close(self, limit: Duration) {
        self.wishes.close.store(true, Ordering::Relaxed);
        self.wait_until(Instant::now() + limit);
        self.wishes.part.store(true, Ordering::Relaxed);
        self.wait_until(Instant::now() + 2 * FLUSH_LIMIT);
    }

    fn wait_until(&self, until: Instant) {
        let running = |thread: &JoinHandle<()>| !thread.is_finished();
        while self.thread.as_ref().is_some_and(running) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.wishes.vanish.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let listener = TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Raises the number of files that this process may open, where a connection for each rank would
/// not fit. What the system refuses shows when ranks cannot join.
fn allow_files(world: usize) {
    let limit = getrlimit(Resource::Nofile);
    let wanted = world as u64 + 512;
    if limit.current.is_some_and(|current| current < wanted) {
        let current = Some(limit.maximum.map_or(wanted, |maximum| wanted.min(maximum)));
        let _ = setrlimit(Resource::Nofile, Rlimit { current, ..limit });
    }
}

/// Where a connection stands.
enum Stage {
    /// It has not proven anything yet.
    Stranger {
        nonce: [u8; handshake::BYTES],
        answer: Vec<u8>,
        since: Instant,
    },
    Rank(usize, Frames),
}

struct Connection {
    stream: TcpStream,
    from: SocketAddr,
    stage: Stage,
    out: Vec<u8>,
    closed: bool,
}

struct Server {
    listeners: Vec<TcpListener>,
    connections: Vec<Connection>,
    court: Court,
    world: usize,
    secret: Secret,
    tick: Duration,
    wishes: Arc<Wishes>,
    exit: ExitHook,
}

impl Server {
    fn run(mut self) {
        loop {
            if self.wishes.vanish.load(Ordering::Relaxed) {
                return;
            }
            self.wait();
            let now = Instant::now();
            self.accept(now);
            self.read(now);
            self.court.tick(now);
            if let Some(reason) = self.obey() {
                self.flush_for(FLUSH_LIMIT);
                (self.exit)(&reason);
                return;
            }
            self.flush();
            self.sweep();
            lock(&self.wishes.slow).extend(self.court.slow_found());
            let part = self.wishes.part.load(Ordering::Relaxed);
            if part || self.wishes.close.load(Ordering::Relaxed) && self.court.is_empty() {
                self.tell(None, &ToRank::Closing);
                self.flush_for(FLUSH_LIMIT);
                return;
            }
            // With many ranks something is always ready; a short sleep makes it one round.
            std::thread::sleep(self.tick.min(Duration::from_millis(5)));
        }
    }

    /// Sleeps until a word arrives, for a tick at most.
    fn wait(&self) {
        let mut fds: Vec<PollFd<'_>> = Vec::new();
        for listener in &self.listeners {
            fds.push(PollFd::new(listener, PollFlags::IN));
        }
        for connection in &self.connections {
            let mut flags = PollFlags::IN;
            if !connection.out.is_empty() {
                flags |= PollFlags::OUT;
            }
            fds.push(PollFd::new(&connection.stream, flags));
        }
        let limit = Timespec {
            tv_sec: 0,
            tv_nsec: self.tick.subsec_nanos().into(),
        };
        // An interrupted sleep is a short one.
        let _ = poll(&mut fds, Some(&limit));
    }

    fn accept(&mut self, now: Instant) {
        for listener in &self.listeners {
            // What is wrong with one connection, or with the number of open files, passes.
            while let Ok((stream, from)) = listener.accept() {
                let Ok(nonce) = handshake::random() else {
                    break;
                };
                if stream.set_nonblocking(true).is_err() {
                    continue;
                }
                let _ = stream.set_nodelay(true);
                let is_stranger =
                    |connection: &Connection| matches!(connection.stage, Stage::Stranger { .. });
                let strangers = self
                    .connections
                    .iter()
                    .filter(|one| is_stranger(one))
                    .count();
                if strangers >= self.world + SPARE_DOORS
                    && let Some(oldest) = self.connections.iter().position(is_stranger)
                {
                    self.connections.remove(oldest);
                }
                self.connections.push(Connection {
                    stream,
                    from,
                    stage: Stage::Stranger {
                        nonce,
                        answer: Vec::with_capacity(ANSWER_BYTES),
                        since: now,
                    },
                    out: nonce.to_vec(),
                    closed: false,
                });
            }
        }
    }

    fn read(&mut self, now: Instant) {
        let Self {
            connections,
            court,
            secret,
            world,
            ..
        } = self;
        for connection in connections {
            if let Err(reason) = connection.read(court, secret, *world, now) {
                connection.closed = true;
                if let Some(reason) = reason {
                    tracing::warn!(
                        "watchdog: the connection from {} is closed: {reason}",
                        connection.from
                    );
                }
            }
        }
    }

    /// Does what the court says; the reason to exit, if it says so.
    fn obey(&mut self) -> Option<String> {
        let mut exit = None;
        for order in self.court.orders() {
            match order {
                Order::Tell(rank, message) => self.tell(Some(rank), &message),
                Order::TellAll(message) => self.tell(None, &message),
                Order::Announce(verdict) => announce(&verdict),
                Order::Exit(reason) => exit = Some(reason),
            }
        }
        exit
    }

    fn tell(&mut self, to: Option<usize>, message: &ToRank) {
        let frame = wire::encode(message);
        for connection in &mut self.connections {
            let Stage::Rank(rank, _) = connection.stage else {
                continue;
            };
            let full = connection.out.len() > FULL && *message == ToRank::Heard;
            if to.is_none_or(|to| to == rank) && !full {
                connection.out.extend_from_slice(&frame);
            }
        }
    }

    fn flush(&mut self) {
        for connection in &mut self.connections {
            connection.flush();
        }
    }

    fn flush_for(&mut self, limit: Duration) {
        let until = Instant::now() + limit;
        loop {
            self.flush();
            let mut connections = self.connections.iter();
            if connections.all(|one| one.out.is_empty() || one.closed) || Instant::now() >= until {
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Takes leave of connections that have closed.
    fn sweep(&mut self) {
        for connection in &self.connections {
            if let (true, Stage::Rank(rank, _)) = (connection.closed, &connection.stage) {
                self.court.closed(*rank);
            }
        }
        self.connections.retain(|connection| !connection.closed);
    }
}

impl Connection {
    /// Reads what has come. An error closes the connection, with a reason if it is worth a word.
    fn read(
        &mut self,
        court: &mut Court,
        secret: &Secret,
        world: usize,
        now: Instant,
    ) -> Result<(), Option<String>> {
        let mut bytes = [0; 4096];
        // Bounded, so that nobody who talks without a pause keeps the others waiting.
        for _ in 0..16 {
            let wanted = match &self.stage {
                Stage::Stranger { since, .. }
                    if now.saturating_duration_since(*since) > HANDSHAKE_LIMIT =>
                {
                    return Err(Some("it did not prove itself in time".to_owned()));
                }
                Stage::Stranger { answer, .. } => ANSWER_BYTES - answer.len(),
                Stage::Rank(..) => bytes.len(),
            };
            let count = match self.stream.read(&mut bytes[..wanted]) {
                Ok(0) => return Err(None),
                Ok(count) => count,
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock => return Ok(()),
                    ErrorKind::Interrupted => continue,
                    _ => return Err(None),
                },
            };
            let read = &bytes[..count];
            match &mut self.stage {
                Stage::Stranger { nonce, answer, .. } => {
                    answer.extend_from_slice(read);
                    let Some(whole) = answer.first_chunk::<ANSWER_BYTES>() else {
                        continue;
                    };
                    let transcript = Transcript::verify_answer(secret, *nonce, whole)
                        .map_err(|reason| Some(reason.to_owned()))?;
                    let rank = transcript.rank as usize;
                    if transcript.world as usize != world || !court.admits(rank) {
                        return Err(Some(format!(
                            "expected each of {world} ranks once, found rank {rank} of {}",
                            transcript.world
                        )));
                    }
                    self.out.extend(transcript.confirmation(secret));
                    self.stage = Stage::Rank(rank, Frames::default());
                    court.joined(rank, now);
                }
                Stage::Rank(rank, frames) => {
                    frames.push(read);
                    while let Some(message) = frames.next::<FromRank>().map_err(Some)? {
                        court.heard(*rank, message, now);
                    }
                }
            }
        }
        Ok(())
    }

    fn flush(&mut self) {
        while !self.out.is_empty() {
            match self.stream.write(&self.out) {
                Ok(0) => self.closed = true,
                Ok(count) => {
                    self.out.drain(..count);
                    continue;
                }
                Err(error) => match error.kind() {
                    ErrorKind::Interrupted => continue,
                    ErrorKind::WouldBlock => {}
                    _ => self.closed = true,
                },
            }
            return;
        }
    }
}
