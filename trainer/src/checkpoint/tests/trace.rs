//! What the tests see and do between the code and the disk: a record of all changes, and failures.

use std::cell::RefCell;
use std::io;
use std::path::PathBuf;

/// A change on disk that has been made.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Change {
    CreateFolder(PathBuf),
    CreateFile(PathBuf),
    /// Bytes appended.
    Write(PathBuf, Vec<u8>),
    SyncFile(PathBuf),
    Rename(PathBuf, PathBuf),
    RemoveFile(PathBuf),
    RemoveFolder(PathBuf),
    SyncFolder(PathBuf),
}

#[derive(Default)]
struct State {
    changes: Option<Vec<Change>>,
    /// Points still to be passed before one fails.
    failing: Option<usize>,
    failed_at: Option<String>,
}

thread_local! {
    static STATE: RefCell<State> = RefCell::default();
}

/// Called by `disk.rs` after a change.
pub(crate) fn record(change: Change) {
    STATE.with_borrow_mut(|state| {
        if let Some(changes) = &mut state.changes {
            changes.push(change);
        }
    });
}

/// Called by `disk.rs` where an operation can fail.
pub(crate) fn visit(point: &str) -> io::Result<()> {
    STATE.with_borrow_mut(|state| match &mut state.failing {
        Some(0) => {
            state.failing = None;
            state.failed_at = Some(point.to_owned());
            Err(io::Error::from_raw_os_error(libc::ENOSPC))
        }
        Some(left) => {
            *left -= 1;
            Ok(())
        }
        None => Ok(()),
    })
}

/// The changes that `work` makes on this thread.
pub(crate) fn changes_of<T>(work: impl FnOnce() -> T) -> (T, Vec<Change>) {
    STATE.with_borrow_mut(|state| state.changes = Some(Vec::new()));
    let value = work();
    let changes = STATE.with_borrow_mut(|state| state.changes.take());
    (value, changes.unwrap())
}

/// Lets the point after `passed` others fail on this thread, as if the disk were full. Also says
/// which it was, if `work` came that far.
pub(crate) fn failing_after<T>(passed: usize, work: impl FnOnce() -> T) -> (T, Option<String>) {
    STATE.with_borrow_mut(|state| {
        state.failing = Some(passed);
        state.failed_at = None;
    });
    let value = work();
    let failed_at = STATE.with_borrow_mut(|state| {
        state.failing = None;
        state.failed_at.take()
    });
    (value, failed_at)
}
