//! Making a thread tell where it is, whatever it is doing.
//!
//! A thread gets a real-time signal; its handler unwinds the stack under it into a buffer made
//! beforehand. One thread is asked at a time, and a word that the asking and the answering side swap
//! atomically says whose turn it is: an answer that comes too late finds that nobody asks any more,
//! and writes nothing.

use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicI32, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use libc::{c_int, pid_t};

/// Return addresses that are kept of a stack; what lies further out is cut off.
const DEPTH: usize = 128;

/// How long a thread that has begun to answer may take.
const BUSY_LIMIT: Duration = Duration::from_secs(1);

/// The turn: a phase in the upper half, the thread asked in the lower.
static TURN: AtomicU64 = AtomicU64::new(IDLE);
const IDLE: u64 = 0;
const ASKED: u64 = 1 << 32;
const BUSY: u64 = 2 << 32;
const DONE: u64 = 3 << 32;

/// The answer.
static FRAMES: [AtomicUsize; DEPTH] = [const { AtomicUsize::new(0) }; DEPTH];
static COUNT: AtomicUsize = AtomicUsize::new(0);

/// The signal in use; 0 before [`install`].
static SIGNAL: AtomicI32 = AtomicI32::new(0);

/// Held while threads are asked, or the handler is installed.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Why a thread did not tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Silence {
    /// It has ended.
    Gone,
    /// It blocks the signal, or the kernel does not let it go.
    NoAnswer,
    /// An earlier thread is stuck in the middle of its answer, or [`install`] was not called.
    Unable,
}

/// Installs the handler, once in a process, on a real-time signal that nobody uses.
///
/// # Errors
/// What the system answers, or that all real-time signals are taken.
pub fn install() -> io::Result<()> {
    let _guard = lock();
    if SIGNAL.load(Ordering::Relaxed) != 0 {
        return Ok(());
    }
    // The unwinder allocates and loads what it needs when it is first used; a handler must not.
    backtrace::trace(|_| true);
    // The first few are taken by C libraries and debuggers more often than those in the middle.
    for signal in libc::SIGRTMIN() + 10..libc::SIGRTMAX() {
        // SAFETY: a zeroed sigaction is a valid one (default action, empty mask), and the pointers
        // are to a local of the right type or null.
        let installed = unsafe {
            let mut old: libc::sigaction = std::mem::zeroed();
            if libc::sigaction(signal, std::ptr::null(), &raw mut old) != 0 {
                return Err(io::Error::last_os_error());
            }
            if old.sa_sigaction != libc::SIG_DFL {
                continue;
            }
            let mut new: libc::sigaction = std::mem::zeroed();
            let handler: extern "C" fn(c_int) = answer;
            new.sa_sigaction = handler as libc::sighandler_t;
            new.sa_flags = libc::SA_RESTART | libc::SA_ONSTACK;
            libc::sigaction(signal, &raw const new, std::ptr::null_mut())
        };
        if installed != 0 {
            return Err(io::Error::last_os_error());
        }
        SIGNAL.store(signal, Ordering::Release);
        return Ok(());
    }
    Err(io::Error::other(
        "every real-time signal has a handler already",
    ))
}

/// The return addresses on the stack of thread `thread` of this process, innermost first. The first
/// few are those of the handler itself.
///
/// # Errors
/// Why it does not tell; it has `limit` to begin.
pub fn frames(thread: pid_t, limit: Duration) -> Result<Vec<usize>, Silence> {
    let _guard = lock();
    let signal = SIGNAL.load(Ordering::Acquire);
    let me = u64::from(thread.unsigned_abs());
    let asked = TURN.compare_exchange(IDLE, ASKED | me, Ordering::AcqRel, Ordering::Acquire);
    if signal == 0 || asked.is_err() {
        return Err(Silence::Unable);
    }
    // SAFETY: the call takes numbers only; the signal has a handler of this module.
    let sent = unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal) };
    if sent != 0 {
        TURN.store(IDLE, Ordering::Release);
        return Err(Silence::Gone);
    }
    if !wait_for(DONE | me, limit) {
        let taken_back =
            TURN.compare_exchange(ASKED | me, IDLE, Ordering::AcqRel, Ordering::Acquire);
        if taken_back.is_ok() {
            return Err(Silence::NoAnswer);
        }
        // It has begun to answer. If it never ends, nobody else can be asked: the buffer is its.
        if !wait_for(DONE | me, BUSY_LIMIT) {
            return Err(Silence::NoAnswer);
        }
    }
    let count = COUNT.load(Ordering::Acquire).min(DEPTH);
    let frames = FRAMES[..count]
        .iter()
        .map(|frame| frame.load(Ordering::Relaxed))
        .collect();
    TURN.store(IDLE, Ordering::Release);
    Ok(frames)
}

fn wait_for(turn: u64, limit: Duration) -> bool {
    let until = Instant::now() + limit;
    loop {
        if TURN.load(Ordering::Acquire) == turn {
            return true;
        }
        if Instant::now() >= until {
            return false;
        }
        std::thread::sleep(Duration::from_micros(100));
    }
}

fn lock() -> std::sync::MutexGuard<'static, ()> {
    let locked = ONE_AT_A_TIME.lock();
    locked.unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// The handler. It calls nothing that allocates or locks; the unwinder's own lock (in C libraries
/// older than glibc 2.35) may be held by the thread it interrupts, which then answers never: the
/// asking side has a limit for that.
extern "C" fn answer(_signal: c_int) {
    // SAFETY: the C library's error number of this thread, which interrupted code may be about to
    // read, is left as it was found.
    let errno = unsafe { *libc::__errno_location() };
    // SAFETY: takes nothing and cannot fail.
    let me = unsafe { libc::syscall(libc::SYS_gettid) }.unsigned_abs();
    let asked = TURN.compare_exchange(ASKED | me, BUSY | me, Ordering::AcqRel, Ordering::Acquire);
    if asked.is_ok() {
        let mut count = 0;
        // SAFETY: the function asks that no two threads use it at once, for its own state on other
        // systems; only the thread whose turn it is gets here.
        unsafe {
            backtrace::trace_unsynchronized(|frame| {
                FRAMES[count].store(frame.ip() as usize, Ordering::Relaxed);
                count += 1;
                count < DEPTH
            });
        }
        COUNT.store(count, Ordering::Release);
        TURN.store(DONE | me, Ordering::Release);
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn own_thread() -> pid_t {
        // SAFETY: takes nothing and cannot fail.
        let thread = unsafe { libc::syscall(libc::SYS_gettid) };
        pid_t::try_from(thread).unwrap()
    }

    #[test]
    fn a_thread_that_blocks_the_signal_does_not_answer_and_does_no_harm() {
        install().unwrap();
        let (tell, told) = std::sync::mpsc::channel();
        let (release, released) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            // SAFETY: a full set is a valid mask; it ends with this thread.
            unsafe {
                let mut all: libc::sigset_t = std::mem::zeroed();
                libc::sigfillset(&raw mut all);
                libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, std::ptr::null_mut());
            }
            tell.send(own_thread()).unwrap();
            released.recv().unwrap();
            // Now the late signal arrives, while nobody asks.
            // SAFETY: an empty set is a valid mask.
            unsafe {
                let mut none: libc::sigset_t = std::mem::zeroed();
                libc::sigemptyset(&raw mut none);
                libc::pthread_sigmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
            }
        });
        let silent = told.recv().unwrap();
        let limit = Duration::from_millis(50);
        assert_eq!(frames(silent, limit), Err(Silence::NoAnswer));
        assert!(frames(own_thread(), limit).unwrap().len() > 2);
        release.send(()).unwrap();
        thread.join().unwrap();
        assert!(frames(own_thread(), limit).unwrap().len() > 2);
    }

    #[test]
    fn a_thread_that_is_no_more_is_gone() {
        install().unwrap();
        let thread = std::thread::spawn(own_thread).join().unwrap();
        // The system may take a moment to forget it.
        let limit = Duration::from_millis(50);
        for _ in 0..100 {
            if frames(thread, limit) == Err(Silence::Gone) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(frames(thread, limit), Err(Silence::Gone));
    }
}
