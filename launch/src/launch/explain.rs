//! The report of a failure.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::time::SystemTime;

use oxitron_trainer::metrics::logging::log_file;

use crate::ranks::Failure;

/// Lines of a rank's log that a failure report shows, and the bytes at its end they are taken from.
const REPORTED_LINES: usize = 15;
const REPORTED_BYTES: u64 = 16 << 10;

/// The report of a failure: who, how, and the last lines of the log and of standard error.
pub(super) fn explain(failure: &Failure, run_dir: &Path, begun: SystemTime) -> String {
    let mut report = format!("error: {}", failure.headline());
    if failure.rank.is_some() {
        report.push_str("; the other ranks were ended");
    }
    let mut section = |title: String, lines: &[String]| {
        if !lines.is_empty() {
            report.push_str(&format!("\n{title}\n  {}", lines.join("\n  ")));
        }
    };
    if let Some(rank) = failure.rank {
        let log = run_dir.join(log_file(rank));
        section(
            format!("its last log lines ({}):", log.display()),
            &last_lines(&log, begun),
        );
        section(
            "its last lines on standard error:".to_owned(),
            &failure.words,
        );
    } else {
        section(
            "the last lines of mpirun and of the ranks:".to_owned(),
            &failure.words,
        );
        let logs = run_dir.join(log_file(0)).with_file_name("");
        section(
            "the logs of all ranks lie in".to_owned(),
            &[logs.display().to_string()],
        );
    }
    report
}

/// The last lines of a log that was written to since `begun`; an older one says nothing about this
/// failure.
fn last_lines(log: &Path, begun: SystemTime) -> Vec<String> {
    let read = || -> std::io::Result<Vec<String>> {
        let mut file = File::open(log)?;
        let metadata = file.metadata()?;
        if metadata.modified()? < begun {
            return Ok(Vec::new());
        }
        let start = metadata.len().saturating_sub(REPORTED_BYTES);
        file.seek(SeekFrom::Start(start))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        let text = String::from_utf8_lossy(&bytes);
        // The first line may have been cut by the seek.
        let lines: Vec<&str> = text.lines().skip(usize::from(start > 0)).collect();
        let shown = lines.len().saturating_sub(REPORTED_LINES);
        Ok(lines[shown..]
            .iter()
            .map(|line| (*line).to_owned())
            .collect())
    };
    // A log that cannot be read is no reason to hide the failure itself.
    read().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::time::Duration;

    use super::*;
    use crate::ranks::How;

    #[test]
    fn a_failure_shows_the_end_of_the_log_of_the_rank_that_died() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join(log_file(1));
        std::fs::create_dir_all(log.parent().unwrap()).unwrap();
        let lines: String = (0..2000)
            .map(|line| format!("step {line} of many\n"))
            .collect();
        std::fs::write(&log, lines).unwrap();
        let words = vec!["thread panicked".to_owned()];
        let failure = Failure {
            rank: Some(1),
            how: How::Exit(101),
            words,
            started: true,
        };
        let before = SystemTime::now() - Duration::from_secs(5);
        let report = explain(&failure, folder.path(), before);
        assert!(
            report.starts_with("error: rank 1 exited with code 101;"),
            "{report}"
        );
        assert!(report.contains("rank-0001.log") && report.contains("\n  step 1999 of many\n"));
        assert!(report.contains("\n  step 1985 of many\n") && !report.contains("step 1984"));
        assert!(
            report.ends_with("standard error:\n  thread panicked"),
            "{report}"
        );
        // The log of an earlier attempt is left out.
        let later = SystemTime::now() + Duration::from_secs(5);
        assert!(!explain(&failure, folder.path(), later).contains("step"));
    }
}
