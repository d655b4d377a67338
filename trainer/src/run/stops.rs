//! Who can ask a run to stop: a signal, another rank, a file, a limit of time.
//!
//! A file and a limit are looked at by a thread, not between steps: a step may take longer than
//! whoever asks is willing to wait. It raises the same flag as a signal, and the watchdog carries
//! that to all ranks.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// A file of this name in the run directory asks the run to stop.
const STOP_FILE: &str = "stop";

/// How often the thread looks.
const LOOK: Duration = Duration::from_millis(500);

/// What may ask this rank to stop.
#[derive(Debug)]
pub(super) struct Stops {
    /// Set by signals, by the requests of other ranks, and by the thread.
    flag: Arc<AtomicBool>,
    /// What the thread has found.
    reason: Arc<OnceLock<String>>,
    file: Option<PathBuf>,
    /// The thread ends with it.
    _thread: Option<Sender<()>>,
}

/// What the thread looks at.
struct Conditions {
    file: Option<PathBuf>,
    limit: Option<Duration>,
    began: Instant,
}

impl Conditions {
    fn met(&self) -> Option<String> {
        if let Some(limit) = self.limit
            && self.began.elapsed() >= limit
        {
            return Some(format!("run.time_limit, {} s, is over", limit.as_secs()));
        }
        let file = self.file.as_ref().filter(|file| file.exists())?;
        Some(format!("the file {} asks for it", file.display()))
    }
}

impl Stops {
    /// For a rank that began at `began`, which the limit counts from; the leader looks for the file.
    ///
    /// # Errors
    /// When no thread can be started.
    pub(super) fn new(
        flag: &Arc<AtomicBool>,
        run_dir: &Path,
        leads: bool,
        (began, limit): (Instant, Option<Duration>),
    ) -> std::io::Result<Self> {
        let file = leads.then(|| run_dir.join(STOP_FILE));
        let conditions = Conditions {
            file: file.clone(),
            limit,
            began,
        };
        let reason = Arc::new(OnceLock::new());
        let thread = if file.is_some() || limit.is_some() {
            Some(watch(conditions, Arc::clone(flag), Arc::clone(&reason))?)
        } else {
            None
        };
        Ok(Self {
            flag: Arc::clone(flag),
            reason,
            file,
            _thread: thread,
        })
    }

    /// Whether this rank is asked to stop.
    pub(super) fn requested(&self) -> bool {
        self.flag.load(Ordering::Relaxed)
    }

    /// What asks for it, where that is neither a signal nor another rank.
    pub(super) fn reason(&self) -> Option<&str> {
        self.reason.get().map(String::as_str)
    }

    /// Takes the file away, once its request has been answered: the next start is to go on.
    pub(super) fn answered(&self) {
        if let Some(file) = &self.file
            && file.exists()
            && let Err(error) = std::fs::remove_file(file)
        {
            tracing::warn!(
                "cannot remove {}: {error}; remove it before the next start, which would stop \
                 at once otherwise",
                file.display()
            );
        }
    }
}

/// Looks until a condition is met or the other end of the channel is gone.
fn watch(
    conditions: Conditions,
    flag: Arc<AtomicBool>,
    reason: Arc<OnceLock<String>>,
) -> std::io::Result<Sender<()>> {
    let (alive, ended) = channel::<()>();
    let look = move || {
        loop {
            if let Some(met) = conditions.met() {
                // Nobody else sets it.
                let _ = reason.set(met);
                flag.store(true, Ordering::Relaxed);
                return;
            }
            if ended.recv_timeout(LOOK) == Err(RecvTimeoutError::Disconnected) {
                return;
            }
        }
    };
    std::thread::Builder::new()
        .name("stops".to_owned())
        .spawn(look)?;
    Ok(alive)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn wait_for(stops: &Stops) {
        let began = Instant::now();
        while !stops.requested() {
            assert!(began.elapsed() < Duration::from_secs(10));
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn a_limit_of_time_asks() {
        let folder = tempfile::tempdir().unwrap();
        let flag = Arc::new(AtomicBool::new(false));
        let limit = Some(Duration::from_millis(20));
        let stops = Stops::new(&flag, folder.path(), false, (Instant::now(), limit)).unwrap();
        wait_for(&stops);
        assert!(stops.reason().unwrap().contains("time_limit"));
        stops.answered();
    }

    #[test]
    fn a_file_asks_the_leader_once() {
        let folder = tempfile::tempdir().unwrap();
        let flag = Arc::new(AtomicBool::new(false));
        let stops = Stops::new(&flag, folder.path(), true, (Instant::now(), None)).unwrap();
        assert!(!stops.requested());
        let file = folder.path().join("stop");
        std::fs::write(&file, "").unwrap();
        wait_for(&stops);
        assert!(stops.reason().unwrap().ends_with("/stop asks for it"));
        stops.answered();
        assert!(!file.exists());
    }

    #[test]
    fn a_signal_has_no_reason_to_give() {
        let folder = tempfile::tempdir().unwrap();
        let flag = Arc::new(AtomicBool::new(false));
        let stops = Stops::new(&flag, folder.path(), false, (Instant::now(), None)).unwrap();
        flag.store(true, Ordering::Relaxed);
        assert!(stops.requested() && stops.reason().is_none());
    }
}
