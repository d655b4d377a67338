//! Threads that must not be in the way of those that compute.

use std::io;

/// `IOPRIO_WHO_PROCESS` of `linux/ioprio.h`: one thread, 0 for the calling one.
const WHO_THREAD: libc::c_int = 1;
/// The lowest level (7) of the best-effort class (2): served after everybody else who has something
/// to read or write, but, unlike the idle class, never starved.
const LOWEST_BEST_EFFORT: libc::c_int = (2 << 13) | 7;
/// Steps of niceness: the thread gets a tenth of a core that others want as well.
const NICE: libc::c_int = 10;

/// Lets the calling thread give way to others, in computing and in access to disks. It holds for
/// the rest of the thread's life, and for threads that it starts.
///
/// # Errors
/// What the system answers, for instance in a container that forbids it; the thread then works on
/// as before.
pub fn give_way() -> io::Result<()> {
    // SAFETY: takes three integers and touches no memory.
    let priority =
        unsafe { libc::syscall(libc::SYS_ioprio_set, WHO_THREAD, 0, LOWEST_BEST_EFFORT) };
    if priority != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above. 0 is the calling thread: niceness is a thread's own on Linux.
    if unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn only_the_calling_thread_gives_way() {
        // SAFETY: takes integers only.
        let niceness = || unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
        let before = niceness();
        let thread = std::thread::spawn(move || {
            give_way().unwrap();
            niceness()
        });
        assert_eq!(thread.join().unwrap(), NICE.max(before));
        assert_eq!(niceness(), before);
    }
}
