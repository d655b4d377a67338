//! Ranks as threads of one process: letters in shared mailboxes.
//!
//! A sender leaves the address of its bytes in the mailbox of (sender, receiver, tag); the receiver
//! copies them straight to where they belong. One copy, no buffers. The copy happens under the
//! mailbox's lock, so a sender that gives up knows, once it holds the lock, that nobody is reading.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use super::transport::Transport;

/// A letter's state, written by the receiver.
const WAITING: u8 = 0;
const TAKEN: u8 = 1;
const REFUSED: u8 = 2;

struct Letter {
    data: *const u8,
    bytes: usize,
    state: Arc<AtomicU8>,
}

// SAFETY: a letter is an address with a length. The sender keeps the memory valid and unchanged
// until the letter is taken or withdrawn, as `Transport::start_send` demands.
unsafe impl Send for Letter {}

/// Letters under way from one rank to another under one tag, by their number.
type Mailbox = Arc<Mutex<HashMap<u64, Letter>>>;

/// What the ranks of one world share.
#[derive(Default)]
struct PostOffice {
    /// By sender, receiver and tag.
    mailboxes: Mutex<HashMap<(usize, usize, u32), Mailbox>>,
    /// Why a rank has left, once it has.
    departed: Vec<OnceLock<String>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every critical section leaves a consistent map, so a panic elsewhere does not matter.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The transport of one rank of a world of threads.
pub(super) struct Threads {
    rank: usize,
    office: Arc<PostOffice>,
    /// Letters started so far by (sender, receiver, tag), this rank being one of the two.
    numbers: HashMap<(usize, usize, u32), u64>,
}

/// The transports of a world of `world` ranks.
pub(super) fn world(world: usize) -> Vec<Threads> {
    let departed = (0..world).map(|_| OnceLock::new()).collect();
    let office = Arc::new(PostOffice {
        departed,
        ..PostOffice::default()
    });
    (0..world)
        .map(|rank| Threads {
            rank,
            office: Arc::clone(&office),
            numbers: HashMap::new(),
        })
        .collect()
}

/// A letter or the wait for one.
pub(super) struct Request {
    peer: usize,
    mailbox: Mailbox,
    number: u64,
    bytes: usize,
    end: End,
}

enum End {
    Send(Arc<AtomicU8>),
    Receive(*mut u8),
}

impl Threads {
    /// The mailbox of a new letter and the letter's number in it.
    fn address(&mut self, from: usize, to: usize, tag: u32) -> (Mailbox, u64) {
        let key = (from, to, tag);
        let mailbox = Arc::clone(lock(&self.office.mailboxes).entry(key).or_default());
        let number = self.numbers.entry(key).or_default();
        *number += 1;
        (mailbox, *number)
    }

    fn depart(&self, reason: String) {
        // The first reason stands.
        let _ = self.office.departed[self.rank].set(reason);
    }
}

impl Transport for Threads {
    type Request = Request;

    unsafe fn start_send(
        &mut self,
        peer: usize,
        tag: u32,
        data: *const u8,
        bytes: usize,
    ) -> Result<Request, String> {
        let (mailbox, number) = self.address(self.rank, peer, tag);
        let state = Arc::new(AtomicU8::new(WAITING));
        lock(&mailbox).insert(
            number,
            Letter {
                data,
                bytes,
                state: Arc::clone(&state),
            },
        );
        Ok(Request {
            peer,
            mailbox,
            number,
            bytes,
            end: End::Send(state),
        })
    }

    unsafe fn start_recv(
        &mut self,
        peer: usize,
        tag: u32,
        data: *mut u8,
        bytes: usize,
    ) -> Result<Request, String> {
        let (mailbox, number) = self.address(peer, self.rank, tag);
        Ok(Request {
            peer,
            mailbox,
            number,
            bytes,
            end: End::Receive(data),
        })
    }

    fn test(&mut self, request: &mut Request) -> Result<bool, String> {
        let bytes = request.bytes;
        // Looked at before the letter: a rank that takes the letter and leaves may do both between
        // two looks, and the letter has then arrived all the same.
        let departed = self.office.departed[request.peer].get();
        match &request.end {
            End::Send(state) => match state.load(Ordering::Acquire) {
                TAKEN => return Ok(true),
                REFUSED => {
                    return Err(format!(
                        "it expected another length than the {bytes} bytes sent"
                    ));
                }
                _ => {}
            },
            End::Receive(data) => {
                let mut letters = lock(&request.mailbox);
                if let Some(letter) = letters.remove(&request.number) {
                    if letter.bytes != bytes {
                        letter.state.store(REFUSED, Ordering::Release);
                        let sent = letter.bytes;
                        return Err(format!("expected {bytes} bytes, it sent {sent}"));
                    }
                    // SAFETY: the sender keeps `bytes` bytes valid and unchanged until the state
                    // says taken (or until it withdraws the letter, for which it needs the lock
                    // that is held here); the receiver of this request vouched for the target.
                    unsafe { std::ptr::copy_nonoverlapping(letter.data, *data, bytes) };
                    letter.state.store(TAKEN, Ordering::Release);
                    return Ok(true);
                }
            }
        }
        // A rank leaves only after its letters were taken or withdrawn, so none can be missed here.
        match departed {
            Some(reason) => Err(format!("it has left the run: {reason}")),
            None => Ok(false),
        }
    }

    fn cancel(&mut self, request: Request) -> bool {
        if let End::Send(_) = request.end {
            lock(&request.mailbox).remove(&request.number);
        }
        true
    }

    fn idle(&mut self) -> Option<Duration> {
        None
    }

    fn start_leave(&mut self) -> Result<(), String> {
        self.depart("it has finished".to_owned());
        Ok(())
    }

    fn test_leave(&mut self) -> Result<bool, String> {
        Ok(true)
    }

    fn abort(&mut self, reason: &str) {
        self.depart(format!("it aborted: {reason}"));
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.depart("its communication thread has ended".to_owned());
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn letters_meet_receives_in_order_however_they_are_tested() {
        let mut ranks = world(2);
        let (mut second, mut first) = (ranks.pop().unwrap(), ranks.pop().unwrap());
        let sent = [[1u8; 4], [2; 4]];
        let mut received = [[0u8; 4]; 2];
        // SAFETY: both arrays outlive their requests, which are tested to the end below.
        let (mut sends, mut receives) = unsafe {
            (
                sent.each_ref()
                    .map(|s| first.start_send(1, 5, s.as_ptr(), 4).unwrap()),
                received
                    .each_mut()
                    .map(|r| second.start_recv(0, 5, r.as_mut_ptr(), 4).unwrap()),
            )
        };
        for request in receives.iter_mut().rev() {
            assert!(second.test(request).unwrap());
        }
        assert!(sends.iter_mut().all(|request| first.test(request).unwrap()));
        assert_eq!(received, sent);
    }

    #[test]
    fn another_length_fails_at_both_ends() {
        let mut ranks = world(2);
        let (mut second, mut first) = (ranks.pop().unwrap(), ranks.pop().unwrap());
        let (sent, mut received) = ([0u8; 4], [0u8; 8]);
        // SAFETY: both arrays outlive their requests.
        let (mut send, mut receive) = unsafe {
            (
                first.start_send(1, 0, sent.as_ptr(), 4).unwrap(),
                second.start_recv(0, 0, received.as_mut_ptr(), 8).unwrap(),
            )
        };
        assert!(!first.test(&mut send).unwrap());
        assert_eq!(
            second.test(&mut receive).unwrap_err(),
            "expected 8 bytes, it sent 4"
        );
        assert!(first.test(&mut send).is_err());
    }

    #[test]
    fn a_rank_that_left_is_reported_to_whoever_waits_for_it() {
        let mut ranks = world(2);
        let (second, mut first) = (ranks.pop().unwrap(), ranks.pop().unwrap());
        let mut received = [0u8; 4];
        // SAFETY: the array outlives the request.
        let mut receive = unsafe { first.start_recv(1, 0, received.as_mut_ptr(), 4).unwrap() };
        assert!(!first.test(&mut receive).unwrap());
        drop(second);
        assert!(
            first
                .test(&mut receive)
                .unwrap_err()
                .contains("left the run")
        );
    }
}
