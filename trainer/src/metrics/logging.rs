//! Where the words of a rank go.
//!
//! Every rank writes its own `logs/rank-NNNN.log`; rank 0 also speaks on standard output. Lines go
//! out whole and at once, so that the last ones of a rank that died are there to be shown. What is
//! said is filtered by the environment variable [`LOG_VARIABLE`], in the syntax of `env_logger`
//! (`debug`, or `info,oxitron_trainer::comm=trace`), and is `info` without it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use oxitron_data::io_remedy;
use thiserror::Error;
use tracing::Subscriber;
use tracing_subscriber::filter::{EnvFilter, ParseError};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};

use super::jsonl;

/// Environment variable that says what is logged.
pub const LOG_VARIABLE: &str = "OXITRON_LOG";

/// Why logging could not be set up.
#[derive(Debug, Error)]
pub enum LogError {
    /// The folder or the file of a rank's log.
    #[error(
        "{}: cannot open the log: {source}{}; run.dir must be a folder that can be written",
        path.display(), io_remedy(source)
    )]
    Open {
        /// File or folder.
        path: PathBuf,
        /// What the system answered.
        source: io::Error,
    },
    /// A filter that is not one.
    #[error(
        "{LOG_VARIABLE}: `{text}` is not a log filter ({source}); \
         write a level such as `debug`, or `info,oxitron_trainer::comm=trace`"
    )]
    Filter {
        /// The value found.
        text: String,
        /// What is wrong with it.
        source: ParseError,
    },
    /// Logging was set up before.
    #[error("logging is set up twice in one process: {0}")]
    Twice(#[from] TryInitError),
}

/// The log file of a rank, relative to the run directory.
pub fn log_file(rank: usize) -> PathBuf {
    PathBuf::from(format!("logs/rank-{rank:04}.log"))
}

/// Sets up logging for this process, once, as rank `rank` of the run in `run_dir`.
///
/// # Errors
/// A log file that cannot be opened, a filter that cannot be parsed, a second call.
pub fn init_rank(run_dir: &Path, rank: usize) -> Result<(), LogError> {
    let text = std::env::var(LOG_VARIABLE).unwrap_or_default();
    rank_subscriber(run_dir, rank, &text, io::stdout)?.try_init()?;
    Ok(())
}

/// What [`init_rank`] installs, with rank 0's standard output replaceable.
fn rank_subscriber<W>(
    run_dir: &Path,
    rank: usize,
    filter: &str,
    stdout: W,
) -> Result<impl Subscriber + Send + Sync + use<W>, LogError>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let file = open_log(&run_dir.join(log_file(rank)))?;
    let filter = if filter.trim().is_empty() {
        "info"
    } else {
        filter
    };
    let filter = EnvFilter::try_new(filter).map_err(|source| LogError::Filter {
        text: filter.to_owned(),
        source,
    })?;
    // A Mutex around a file without a buffer: each line is one write, nothing waits.
    let to_file = tracing_subscriber::fmt::layer()
        .with_ansi(false)
        .with_writer(Mutex::new(file));
    // On standard output the level is noise unless it is a warning, and colours would end up in
    // files: under mpirun a rank's output is a terminal even when it is redirected.
    let to_stdout = (rank == 0).then(|| {
        tracing_subscriber::fmt::layer()
            .with_ansi(false)
            .with_target(false)
            .with_writer(stdout)
            .boxed()
    });
    Ok(tracing_subscriber::registry()
        .with(filter)
        .with(to_stdout)
        .with(to_file))
}

/// A log that goes on in a new file when somebody removes the one that it was.
struct LogFile {
    path: PathBuf,
    file: File,
}

impl io::Write for LogFile {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if !jsonl::is_at(&self.file, &self.path)
            && let Ok(anew) = open_log(&self.path)
        {
            self.file = anew.file;
        }
        self.file.write(line)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

fn open_log(path: &Path) -> Result<LogFile, LogError> {
    let at = |path: &Path| {
        let path = path.to_owned();
        move |source| LogError::Open { path, source }
    };
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(at(folder))?;
    }
    let file = OpenOptions::new()
        .append(true)
        .create(true)
        .open(path)
        .map_err(at(path))?;
    Ok(LogFile {
        path: path.to_owned(),
        file,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::Arc;

    use super::*;

    /// Collects what would go to standard output.
    #[derive(Clone, Default)]
    struct Captured(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Captured {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn spoken(rank: usize, filter: &str) -> (String, String) {
        let folder = tempfile::tempdir().unwrap();
        let captured = Captured::default();
        let stdout = {
            let captured = captured.clone();
            move || captured.clone()
        };
        let subscriber = rank_subscriber(folder.path(), rank, filter, stdout).unwrap();
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!("step 1");
            tracing::debug!("detail");
        });
        let log = fs::read_to_string(folder.path().join(log_file(rank))).unwrap();
        let stdout = String::from_utf8(captured.0.lock().unwrap().clone()).unwrap();
        (log, stdout)
    }

    #[test]
    fn rank_0_speaks_on_both_and_others_only_in_their_file() {
        let (log, stdout) = spoken(0, "");
        assert!(
            log.contains("step 1") && stdout.contains("step 1"),
            "{log}{stdout}"
        );
        let (log, stdout) = spoken(12, "");
        assert!(log.contains("step 1") && stdout.is_empty(), "{log}{stdout}");
        assert_eq!(log_file(12), Path::new("logs/rank-0012.log"));
    }

    #[test]
    fn the_filter_decides_and_a_bad_one_is_explained() {
        assert!(!spoken(0, "").0.contains("detail"));
        assert!(spoken(0, "debug").0.contains("detail"));
        let folder = tempfile::tempdir().unwrap();
        let error = rank_subscriber(folder.path(), 0, "info=loud=x", io::sink)
            .err()
            .unwrap();
        assert!(
            error.to_string().starts_with("OXITRON_LOG: `info=loud=x`"),
            "{error}"
        );
    }
}
