//! Who can ask a run to stop: a signal, a file, a limit of time.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A file of this name in the run directory asks the run to stop.
const STOP_FILE: &str = "stop";

/// What may ask this rank to stop.
#[derive(Debug)]
pub(super) struct Stops {
    /// Set by signals, and by the request of another rank.
    flag: Arc<AtomicBool>,
    /// Watched by the leader.
    file: Option<PathBuf>,
    deadline: Option<Instant>,
    time_limit: Option<Duration>,
}

impl Stops {
    /// For a rank that has started now.
    pub(super) fn new(
        flag: &Arc<AtomicBool>,
        run_dir: &Path,
        leads: bool,
        time_limit: Option<Duration>,
    ) -> Self {
        Self {
            flag: Arc::clone(flag),
            file: leads.then(|| run_dir.join(STOP_FILE)),
            deadline: time_limit.and_then(|limit| Instant::now().checked_add(limit)),
            time_limit,
        }
    }

    /// Who asks this rank to stop, if anybody does.
    pub(super) fn request(&self) -> Option<String> {
        if self.flag.load(Ordering::Relaxed) {
            return Some("a signal, or a request of another rank".to_owned());
        }
        if let (Some(deadline), Some(limit)) = (self.deadline, self.time_limit)
            && Instant::now() >= deadline
        {
            return Some(format!("run.time_limit of {} s is over", limit.as_secs()));
        }
        let file = self.file.as_ref().filter(|file| file.exists())?;
        Some(format!("the file {} asks for it", file.display()))
    }

    /// Takes the file away, once its request has been answered: the next start is to go on.
    pub(super) fn answered(&self) {
        if let Some(file) = &self.file
            && file.exists()
            && let Err(error) = std::fs::remove_file(file)
        {
            tracing::warn!(
                "cannot remove {}: {error}; remove it before the next start, which would stop \
                 after one step otherwise",
                file.display()
            );
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_flag_a_file_and_a_limit_ask() {
        let folder = tempfile::tempdir().unwrap();
        let flag = Arc::new(AtomicBool::new(false));
        let stops = |leads, limit| Stops::new(&flag, folder.path(), leads, limit);
        assert_eq!(stops(true, None).request(), None);
        assert_eq!(stops(true, Some(Duration::MAX)).request(), None);
        let limited = stops(false, Some(Duration::ZERO)).request().unwrap();
        assert!(limited.contains("time_limit of 0 s"), "{limited}");

        std::fs::write(folder.path().join("stop"), "").unwrap();
        assert_eq!(stops(false, None).request(), None);
        let leader = stops(true, None);
        assert!(leader.request().unwrap().contains("/stop asks"));
        leader.answered();
        assert_eq!(leader.request(), None);

        flag.store(true, Ordering::Relaxed);
        assert!(stops(false, None).request().is_some());
    }
}
