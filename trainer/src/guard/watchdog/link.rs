//! How a rank talks to rank 0: over TCP, or directly in a world of one.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use super::court::{self, Court, Order};
use super::error::WatchdogError;
use super::handshake::{self, Transcript};
use super::invitation::Invitation;
use super::settings::Settings;
use super::wire::{self, Frames, FromRank, ToRank};

/// How long one address may take to answer.
const TRY: Duration = Duration::from_secs(2);

/// The way to rank 0.
pub(super) trait Link: Send {
    /// Sends.
    ///
    /// # Errors
    /// Why rank 0 cannot be reached any more.
    fn send(&mut self, message: &FromRank) -> Result<(), String>;

    /// Waits for a tick at most and returns what has come.
    ///
    /// # Errors
    /// Why nothing more will come.
    fn receive(&mut self) -> Result<Vec<ToRank>, String>;

    /// Rank 0, in words.
    fn peer(&self) -> String;
}

/// A connection to rank 0, proven on both ends.
#[derive(Debug)]
pub(super) struct TcpLink {
    stream: TcpStream,
    address: SocketAddr,
    frames: Frames,
}

impl TcpLink {
    /// Tries all addresses in turn until one answers as rank 0 of the run.
    pub(super) fn connect(
        invitation: &Invitation,
        rank: usize,
        world: usize,
        settings: &Settings,
    ) -> Result<Self, WatchdogError> {
        let until = Instant::now() + settings.join_timeout;
        let mut last = "no address".to_owned();
        loop {
            for &address in &invitation.addresses {
                match Self::try_address(invitation, address, rank, world, settings) {
                    Ok(link) => return Ok(link),
                    Err(Refused::Failed(reason)) => last = format!("{address}: {reason}"),
                    Err(Refused::System(error)) => return Err(error),
                }
            }
            if Instant::now() >= until {
                return Err(WatchdogError::Unreachable {
                    rank,
                    addresses: invitation.addresses.clone(),
                    limit: settings.join_timeout,
                    last,
                });
            }
            std::thread::sleep(settings.tick());
        }
    }

    fn try_address(
        invitation: &Invitation,
        address: SocketAddr,
        rank: usize,
        world: usize,
        settings: &Settings,
    ) -> Result<Self, Refused> {
        let mut stream = TcpStream::connect_timeout(&address, TRY)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(TRY))?;
        stream.set_write_timeout(Some(TRY))?;
        let mut server_nonce = [0; handshake::BYTES];
        stream.read_exact(&mut server_nonce)?;
        let transcript = Transcript {
            server_nonce,
            client_nonce: handshake::random().map_err(Refused::System)?,
            rank: rank as u32,
            world: world as u32,
        };
        stream.write_all(&transcript.answer(&invitation.secret))?;
        let mut confirmation = [0; handshake::BYTES];
        stream.read_exact(&mut confirmation)?;
        if !transcript.verify_confirmation(&invitation.secret, &confirmation) {
            let reason = "whoever listens there is not rank 0 of this run";
            return Err(Refused::Failed(reason.to_owned()));
        }
        stream.set_read_timeout(Some(settings.tick()))?;
        stream.set_write_timeout(Some(settings.lease))?;
        Ok(Self {
            stream,
            address,
            frames: Frames::default(),
        })
    }
}

#[cfg(test)]
impl TcpLink {
    /// Sends what is no message.
    pub(super) fn send_raw(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes);
    }
}

/// Why an address was no good.
enum Refused {
    Failed(String),
    System(WatchdogError),
}

impl From<std::io::Error> for Refused {
    fn from(error: std::io::Error) -> Self {
        Self::Failed(match error.kind() {
            ErrorKind::UnexpectedEof => "it closed the connection during the handshake".to_owned(),
            ErrorKind::WouldBlock | ErrorKind::TimedOut => "it does not answer".to_owned(),
            _ => error.to_string(),
        })
    }
}

impl Link for TcpLink {
    fn send(&mut self, message: &FromRank) -> Result<(), String> {
        self.stream
            .write_all(&wire::encode(message))
            .map_err(|error| format!("its connection broke: {error}"))
    }

    fn receive(&mut self) -> Result<Vec<ToRank>, String> {
        let mut bytes = [0; 4096];
        match self.stream.read(&mut bytes) {
            Ok(0) => return Err("its connection closed".to_owned()),
            Ok(count) => self.frames.push(&bytes[..count]),
            Err(error) => match error.kind() {
                ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted => {}
                _ => return Err(format!("its connection broke: {error}")),
            },
        }
        let mut messages = Vec::new();
        while let Some(message) = self.frames.next()? {
            messages.push(message);
        }
        Ok(messages)
    }

    fn peer(&self) -> String {
        format!("(at {})", self.address)
    }
}

/// The judgement of a world of one, made in the rank's own watchdog thread.
#[derive(Debug)]
pub(super) struct LocalLink {
    court: Court,
    tick: Duration,
}

impl LocalLink {
    pub(super) fn new(settings: &Settings) -> Self {
        let now = Instant::now();
        let mut court = Court::new(1, settings, now);
        court.joined(0, now);
        Self {
            court,
            tick: settings.tick(),
        }
    }
}

impl Link for LocalLink {
    fn send(&mut self, message: &FromRank) -> Result<(), String> {
        self.court.heard(0, message.clone(), Instant::now());
        Ok(())
    }

    fn receive(&mut self) -> Result<Vec<ToRank>, String> {
        std::thread::sleep(self.tick);
        self.court.tick(Instant::now());
        let mut messages = Vec::new();
        for order in self.court.orders() {
            match order {
                Order::Tell(_, message) | Order::TellAll(message) => messages.push(message),
                Order::Announce(verdict) => court::announce(&verdict),
                // The rank hears `ToRank::Exit` as well.
                Order::Exit(_) => {}
            }
        }
        Ok(messages)
    }

    fn peer(&self) -> String {
        "(this process)".to_owned()
    }
}
