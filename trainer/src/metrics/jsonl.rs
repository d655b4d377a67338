//! Files of one JSON object per line, safe against a writer that dies in the middle of one.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

/// What can go wrong with the files of a run's figures.
#[derive(Debug, Error)]
pub enum MetricsError {
    /// The operating system refused.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// File or folder.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the system answered.
        source: io::Error,
    },
    /// A whole line that is not a record.
    #[error(
        "{}, line {line}: expected {expected}, found `{excerpt}` ({source}); \
         the file is damaged: restore it, or delete that line to go on without it",
        path.display()
    )]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What a line of this file holds.
        expected: &'static str,
        /// The beginning of the line, escaped.
        excerpt: String,
        /// Where and why parsing stopped.
        source: serde_json::Error,
    },
    /// A figure that cannot be written as JSON.
    #[error("{}: cannot write a record: {source}", path.display())]
    Encode {
        /// The file.
        path: PathBuf,
        /// What the encoder said.
        source: serde_json::Error,
    },
    /// The folder is not there, or is not a run directory.
    #[error("{}: {found}; expected a run directory, the folder named by `run.dir` in a training config", path.display())]
    NotARun {
        /// The folder.
        path: PathBuf,
        /// What is there instead.
        found: &'static str,
    },
}

impl MetricsError {
    pub(super) fn io(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            path: path.to_owned(),
            action,
            source,
        }
    }
}

/// An append-only file of JSON lines.
#[derive(Debug)]
pub(super) struct JsonLog {
    path: PathBuf,
    file: File,
    /// Lines that are not in the file yet: the one in the making, and those before it for which
    /// there was no room.
    pending: Vec<u8>,
}

/// Bytes of lines that are kept for later when they cannot be written: days of steps.
const MOST_PENDING: usize = 16 << 20;

impl JsonLog {
    /// Opens `path`, creating it if need be, and makes sure that the next line starts afresh.
    ///
    /// A tail without a line break is what a killed writer leaves. If it is a whole object (only
    /// its line break was lost) it is kept, otherwise it is cut off and the log says so.
    pub(super) fn open(path: &Path) -> Result<Self, MetricsError> {
        let file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(path)
            .map_err(MetricsError::io(path, "open for appending"))?;
        let mut log = Self {
            path: path.to_owned(),
            file,
            pending: Vec::new(),
        };
        log.mend_tail()
            .map_err(MetricsError::io(path, "mend the last line"))?;
        Ok(log)
    }

    /// Appends one line. A line that cannot be written, because the disk is full for instance, is
    /// kept and written before the next one.
    pub(super) fn append(&mut self, record: &impl Serialize) -> Result<(), MetricsError> {
        let start = self.pending.len();
        if let Err(source) = serde_json::to_writer(&mut self.pending, record) {
            self.pending.truncate(start);
            let path = self.path.clone();
            return Err(MetricsError::Encode { path, source });
        }
        self.pending.push(b'\n');
        self.write_pending()
    }

    /// Writes the lines that are not in the file yet.
    pub(super) fn write_pending(&mut self) -> Result<(), MetricsError> {
        let mut written = 0;
        while written < self.pending.len() {
            match self.file.write(&self.pending[written..]) {
                Ok(count) if count > 0 => written += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                stopped => {
                    let source = stopped.err().unwrap_or(io::ErrorKind::WriteZero.into());
                    self.withdraw(written);
                    let path = self.path.clone();
                    let action = "append a record";
                    return Err(MetricsError::Io {
                        path,
                        action,
                        source,
                    });
                }
            }
        }
        self.pending.clear();
        Ok(())
    }

    /// Cuts the `written` bytes off again that the file took of more, so that it ends with a whole
    /// line. If even that fails, the next `open` mends it.
    fn withdraw(&mut self, written: usize) {
        let length = self.file.metadata().map(|data| data.len());
        if let Ok(length) = length
            && written > 0
        {
            let _ = self.file.set_len(length.saturating_sub(written as u64));
        }
        if self.pending.len() > MOST_PENDING {
            let excess = self.pending.len() - MOST_PENDING;
            let line = self.pending[excess..]
                .iter()
                .position(|&byte| byte == b'\n');
            let dropped = excess + line.map_or(0, |end| end + 1);
            self.pending.drain(..dropped);
            tracing::warn!(
                "{}: {dropped} bytes of records are lost: they could not be written, and no more \
                 are kept",
                self.path.display()
            );
        }
    }

    /// Makes the file anew if somebody has removed it: what is written to it is lost otherwise.
    pub(super) fn reopen_if_removed(&mut self) -> Result<(), MetricsError> {
        if is_at(&self.file, &self.path) {
            return Ok(());
        }
        if let Some(folder) = self.path.parent() {
            std::fs::create_dir_all(folder)
                .map_err(MetricsError::io(folder, "create the folder"))?;
        }
        let pending = std::mem::take(&mut self.pending);
        *self = Self::open(&self.path.clone())?;
        self.pending = pending;
        tracing::warn!(
            "{}: was removed while the run writes to it; a new file begins here",
            self.path.display()
        );
        Ok(())
    }

    /// Waits until the lines are on disk.
    pub(super) fn sync(&self) -> Result<(), MetricsError> {
        self.file
            .sync_data()
            .map_err(MetricsError::io(&self.path, "flush to disk"))
    }

    fn mend_tail(&mut self) -> io::Result<()> {
        let (start, tail) = unfinished_tail(&mut self.file)?;
        if tail.is_empty() {
            return Ok(());
        }
        if serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(&tail).is_ok() {
            return self.file.write_all(b"\n");
        }
        tracing::warn!(
            "{}: dropped {} bytes of a line that was being written when the run was killed",
            self.path.display(),
            tail.len()
        );
        self.file.set_len(start)
    }
}

/// Whether an open file is the one at `path`, and not one that has been removed since.
pub(super) fn is_at(file: &File, path: &Path) -> bool {
    let open = file.metadata().map(|open| identity(&open));
    let found = std::fs::metadata(path).map(|found| identity(&found));
    matches!((open, found), (Ok(open), Ok(found)) if open == found)
}

/// What tells a file from all others while it exists.
pub(super) fn identity(data: &std::fs::Metadata) -> (u64, u64) {
    use std::os::unix::fs::MetadataExt as _;
    (data.dev(), data.ino())
}

/// The bytes after the last line break, and where they start.
fn unfinished_tail(file: &mut File) -> io::Result<(u64, Vec<u8>)> {
    const CHUNK: u64 = 64 << 10;
    let mut start = file.seek(SeekFrom::End(0))?;
    let mut tail = Vec::new();
    while start > 0 {
        let size = CHUNK.min(start);
        start -= size;
        file.seek(SeekFrom::Start(start))?;
        let mut chunk = Vec::with_capacity(size as usize + tail.len());
        Read::by_ref(file).take(size).read_to_end(&mut chunk)?;
        if let Some(last) = chunk.iter().rposition(|byte| *byte == b'\n') {
            start += last as u64 + 1;
            chunk.drain(..=last);
            chunk.append(&mut tail);
            return Ok((start, chunk));
        }
        chunk.append(&mut tail);
        tail = chunk;
    }
    Ok((start, tail))
}

/// The records of a file, in the order of its lines.
#[derive(Debug)]
pub(super) struct JsonLines<T> {
    pub(super) records: Vec<T>,
    /// What a reader should know about the file though it could be read.
    pub(super) warning: Option<String>,
}

/// Reads a whole file. Blank lines are passed over; a torn last line is left out with a warning.
///
/// `expected` says what a line holds, for the error.
pub(super) fn read<T: DeserializeOwned>(
    path: &Path,
    expected: &'static str,
) -> Result<JsonLines<T>, MetricsError> {
    let file = File::open(path).map_err(MetricsError::io(path, "open"))?;
    let mut reader = BufReader::with_capacity(1 << 20, file);
    let mut lines = JsonLines {
        records: Vec::new(),
        warning: None,
    };
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        let read = reader
            .read_until(b'\n', &mut line)
            .map_err(MetricsError::io(path, "read"))?;
        if read == 0 {
            break;
        }
        match parse(&line) {
            Ok(record) => lines.records.extend(record),
            Err(_) if line.last() != Some(&b'\n') => {
                lines.warning = Some(format!(
                    "{}, line {number}: left out the last line, which is not whole (the run is \
                     writing it, or was killed while it did)",
                    path.display()
                ));
            }
            Err(source) => return Err(malformed(path, number, expected, &line, source)),
        }
    }
    Ok(lines)
}

/// The record of a line; none for a blank one.
pub(super) fn parse<T: DeserializeOwned>(line: &[u8]) -> Result<Option<T>, serde_json::Error> {
    let line = line.trim_ascii();
    if line.is_empty() {
        Ok(None)
    } else {
        serde_json::from_slice(line).map(Some)
    }
}

pub(super) fn malformed(
    path: &Path,
    line: usize,
    expected: &'static str,
    content: &[u8],
    source: serde_json::Error,
) -> MetricsError {
    let text = String::from_utf8_lossy(content.trim_ascii());
    let mut excerpt: String = text.chars().take(80).flat_map(char::escape_debug).collect();
    if text.chars().nth(80).is_some() {
        excerpt.push('…');
    }
    MetricsError::Malformed {
        path: path.to_owned(),
        line,
        expected,
        excerpt,
        source,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::fs;

    use serde::Deserialize;

    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Item {
        value: u64,
    }

    fn read_values(path: &Path) -> Vec<u64> {
        read::<Item>(path, "an item")
            .unwrap()
            .records
            .iter()
            .map(|item| item.value)
            .collect()
    }

    #[test]
    fn a_torn_line_is_cut_off_before_the_next_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("items.jsonl");
        // Every way of tearing the second line, and none of the first.
        let whole = b"{\"value\":1}\n{\"value\":22}\n";
        for cut in 12..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            let mut log = JsonLog::open(&path).unwrap();
            log.append(&Item { value: 3 }).unwrap();
            let expected: &[u64] = if cut < whole.len() - 1 {
                &[1, 3]
            } else {
                &[1, 22, 3]
            };
            assert_eq!(read_values(&path), expected, "cut at {cut}");
        }
    }

    #[test]
    fn a_torn_line_longer_than_a_chunk_is_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("items.jsonl");
        let mut bytes = b"{\"value\":1}\n".to_vec();
        bytes.resize(200_000, 0);
        fs::write(&path, &bytes).unwrap();
        JsonLog::open(&path)
            .unwrap()
            .append(&Item { value: 2 })
            .unwrap();
        assert_eq!(read_values(&path), [1, 2]);
    }

    #[test]
    fn reading_tolerates_a_torn_last_line_with_a_warning() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("items.jsonl");
        fs::write(&path, "{\"value\":1}\n\n{\"val").unwrap();
        let lines = read::<Item>(&path, "an item").unwrap();
        assert_eq!(lines.records, [Item { value: 1 }]);
        assert!(lines.warning.unwrap().contains("line 3"));
    }

    #[test]
    fn a_whole_last_line_without_its_line_break_counts() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("items.jsonl");
        fs::write(&path, "{\"value\":1}\n{\"value\":2}").unwrap();
        let lines = read::<Item>(&path, "an item").unwrap();
        assert_eq!((lines.records.len(), lines.warning), (2, None));
    }

    #[test]
    fn a_damaged_line_is_refused_by_file_and_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("items.jsonl");
        fs::write(
            &path,
            b"{\"value\":1}\n\x1b\xff{\"value\":2}\n{\"value\":3}\n",
        )
        .unwrap();
        let message = read::<Item>(&path, "an item").unwrap_err().to_string();
        assert!(
            message.contains("items.jsonl, line 2: expected an item"),
            "{message}"
        );
        assert!(message.contains("delete that line"), "{message}");
        assert!(
            !message.contains('\u{1b}'),
            "control characters must be escaped: {message}"
        );
    }
}
