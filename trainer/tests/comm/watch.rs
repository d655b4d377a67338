//! A limit on what may hang.

use std::sync::mpsc;
use std::time::Duration;

/// Ends the process, with a word about what it was at, unless what is returned is dropped in time.
pub fn watch(limit: Duration, what: String) -> mpsc::Sender<()> {
    let (alive, ended) = mpsc::channel();
    std::thread::spawn(move || {
        if ended.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout) {
            eprintln!(
                "{what}: not finished after {} s: deadlock?",
                limit.as_secs()
            );
            std::process::abort();
        }
    });
    alive
}
