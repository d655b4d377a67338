//! What the threads of this process are doing: for a run that hangs.
//!
//! [`capture`] asks every thread for its stack, one after the other ([`crate::sys::stacks`]), and
//! finds the names of the functions afterwards. A thread that cannot answer, because the kernel does
//! not let it go or it blocks signals, is shown with what the kernel says about it.

use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::io;
use std::time::Duration;

use crate::sys::stacks::{self, Silence};

/// How long one thread may take to answer.
const LIMIT: Duration = Duration::from_millis(200);

/// Threads that may keep silent before the rest is not asked any more; bounds the time.
const MAX_SILENT: usize = 16;

/// A thread and what it is doing.
#[derive(Clone, Debug)]
pub struct ThreadStack {
    /// The kernel's number of the thread.
    pub id: i32,
    /// The thread's name, at most 15 characters.
    pub name: String,
    /// The kernel's letter for its state before it was asked: R runs, S sleeps, D sleeps and cannot
    /// be woken, T is stopped.
    pub state: char,
    /// Where in the kernel it sleeps, as far as the kernel tells.
    pub kernel_wait: String,
    /// Its functions, innermost first, or why they are not known.
    pub frames: Result<Vec<Frame>, Silence>,
}

/// A function on a stack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// The return address.
    pub address: usize,
    /// The function, if it has a name.
    pub function: Option<String>,
    /// File and line, if the debug information has them.
    pub place: Option<String>,
}

/// To be called before [`capture`], early: it takes memory and a signal.
///
/// # Errors
/// What the system answers when it has no signal to give.
pub fn prepare() -> io::Result<()> {
    stacks::install()
}

/// The stacks of all threads of this process. Threads that begin meanwhile are missing.
#[must_use]
pub fn capture() -> Vec<ThreadStack> {
    let Ok(tasks) = fs::read_dir("/proc/self/task") else {
        return Vec::new();
    };
    let mut threads: Vec<i32> = tasks
        .flatten()
        .filter_map(|task| task.file_name().to_str()?.parse().ok())
        .collect();
    threads.sort_unstable();
    let mut silent = 0;
    // All are asked before any name is looked up, which takes longer: the stacks then belong to one
    // moment, nearly.
    let asked: Vec<_> = threads
        .into_iter()
        .map(|id| {
            let mut thread = of_the_kernel(id);
            let addresses = if silent < MAX_SILENT {
                stacks::frames(id, LIMIT)
            } else {
                Err(Silence::Unable)
            };
            silent += usize::from(addresses == Err(Silence::NoAnswer));
            let addresses = addresses.unwrap_or_else(|silence| {
                thread.frames = Err(silence);
                Vec::new()
            });
            (thread, addresses)
        })
        .collect();
    let mut names = HashMap::new();
    let mut threads = Vec::new();
    for (mut thread, addresses) in asked {
        match &mut thread.frames {
            Ok(frames) => *frames = resolve(&addresses, &mut names),
            Err(Silence::Gone) => continue,
            Err(_) => {}
        }
        threads.push(thread);
    }
    threads
}

/// What the kernel knows of a thread.
fn of_the_kernel(id: i32) -> ThreadStack {
    let read = |file: &str| fs::read_to_string(format!("/proc/self/task/{id}/{file}"));
    let name = read("comm").unwrap_or_default().trim_end().to_owned();
    // The name in `stat` may hold anything, parentheses included; the state follows the last one.
    let stat = read("stat").unwrap_or_default();
    let state = stat
        .rsplit_once(") ")
        .and_then(|(_, rest)| rest.chars().next());
    let kernel_wait = match read("wchan").unwrap_or_default().as_str() {
        "" | "0" => String::new(),
        wait => wait.to_owned(),
    };
    ThreadStack {
        id,
        name,
        state: state.unwrap_or('?'),
        kernel_wait,
        frames: Ok(Vec::new()),
    }
}

/// The functions of a stack, without those of the signal handler.
fn resolve(addresses: &[usize], names: &mut HashMap<usize, Vec<Frame>>) -> Vec<Frame> {
    let mut frames: Vec<Frame> = Vec::new();
    let mut handler_ends = 0;
    // Where a stack ends the unwinder says 0.
    for &address in addresses.iter().filter(|&&address| address != 0) {
        let found = names.entry(address).or_insert_with(|| at(address));
        frames.extend(found.iter().cloned());
        let is_handler = |frame: &Frame| {
            let function = frame.function.as_deref().unwrap_or_default();
            function.contains("sys::stacks::answer")
        };
        if handler_ends == 0 && found.iter().any(is_handler) {
            handler_ends = frames.len();
        }
    }
    let mut frames = frames.split_off(handler_ends);
    // What the kernel put between the handler and the function that it interrupted.
    let is_trampoline = frames.first().is_some_and(|frame| {
        let function = frame.function.as_deref();
        function.is_none_or(|name| name.contains("restore_rt"))
    });
    if handler_ends > 0 && is_trampoline {
        frames.remove(0);
    }
    frames
}

/// The functions at an address: several where some were inlined.
fn at(address: usize) -> Vec<Frame> {
    let mut frames = Vec::new();
    backtrace::resolve(address as *mut _, |symbol| {
        let function = symbol.name().map(|name| format!("{name:#}"));
        let place = symbol.filename().map(|file| {
            let line = symbol.lineno().unwrap_or_default();
            format!("{}:{line}", file.display())
        });
        frames.push(Frame {
            address,
            function,
            place,
        });
    });
    if frames.is_empty() {
        frames.push(Frame {
            address,
            function: None,
            place: None,
        });
    }
    frames
}

impl fmt::Display for ThreadStack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "thread {} `{}` ({}", self.id, self.name, self.state)?;
        if !self.kernel_wait.is_empty() {
            write!(f, ", in {}", self.kernel_wait)?;
        }
        write!(f, ")")?;
        let frames = match &self.frames {
            Ok(frames) => frames,
            Err(Silence::Gone) => return write!(f, ": has ended"),
            Err(Silence::NoAnswer) => {
                return write!(
                    f,
                    ": does not answer; the kernel holds it or it blocks signals"
                );
            }
            Err(Silence::Unable) => return write!(f, ": was not asked"),
        };
        for (at, frame) in frames.iter().enumerate() {
            write!(f, "\n  {at:>3}: ")?;
            match &frame.function {
                Some(function) => write!(f, "{function}")?,
                None => write!(f, "{:#x}", frame.address)?,
            }
            if let Some(place) = &frame.place {
                write!(f, " at {place}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use std::sync::mpsc;
    use std::thread;

    use super::*;

    #[inline(never)]
    fn parked_in_a_named_function(release: &mpsc::Receiver<()>) {
        release.recv().unwrap();
        std::hint::black_box(());
    }

    #[test]
    fn a_parked_thread_shows_where_it_is() {
        prepare().unwrap();
        let (release, released) = mpsc::channel();
        let parked = thread::Builder::new()
            .name("parked-thread".to_owned())
            .spawn(move || parked_in_a_named_function(&released))
            .unwrap();
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        let shown = loop {
            let all = capture();
            let one = all.into_iter().find(|one| one.name == "parked-thread");
            let shown = one.map(|one| one.to_string()).unwrap_or_default();
            if shown.contains("recv") || std::time::Instant::now() > deadline {
                break shown;
            }
        };
        println!("{shown}");
        assert!(shown.contains("parked_in_a_named_function"), "{shown}");
        assert!(!shown.contains("stacks::answer"), "{shown}");
        release.send(()).unwrap();
        parked.join().unwrap();
    }

    #[test]
    fn the_asking_thread_is_among_them() {
        prepare().unwrap();
        let all = capture();
        let asking = all.iter().filter_map(|one| one.frames.as_ref().ok());
        let mut functions = asking
            .flatten()
            .filter_map(|frame| frame.function.as_deref());
        assert!(functions.any(|function| function.contains("stacks::capture")));
    }

    #[test]
    fn a_silent_thread_says_what_the_kernel_knows() {
        let silent = ThreadStack {
            id: 7,
            name: "io".into(),
            state: 'D',
            kernel_wait: "nfs_wait".into(),
            frames: Err(Silence::NoAnswer),
        };
        let shown = silent.to_string();
        assert!(
            shown.starts_with("thread 7 `io` (D, in nfs_wait): does not answer"),
            "{shown}"
        );
    }
}
