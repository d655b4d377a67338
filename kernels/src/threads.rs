//! How many threads compute.

use crate::Error;
use crate::sys::parallel;

/// The thread count of compute started by the calling thread.
///
/// OpenMP keeps the count per calling thread, so ranks that are threads of one process each set
/// their own; a new thread starts with the value set last in the process, or all cores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Threads(usize);

impl Threads {
    /// Lets libtorch and this crate's kernels use `count` threads for calls from this thread.
    ///
    /// # Errors
    /// [`Error::Argument`] unless `count` is at least 1 and fits libtorch's 32-bit integer.
    pub fn set(count: usize) -> Result<Threads, Error> {
        match i32::try_from(count) {
            Ok(threads) if threads >= 1 => {
                tch::set_num_threads(threads);
                Ok(Threads(count))
            }
            _ => Err(Error::Argument {
                op: "threads",
                message: format!("the thread count must be between 1 and 2^31-1, found {count}"),
            }),
        }
    }

    /// The count in force for the calling thread.
    pub fn current() -> Threads {
        // Asking libtorch first makes it apply its process-wide setting to a new thread.
        let _ = tch::get_num_threads();
        Threads(parallel::threads())
    }

    /// The number itself.
    pub fn count(self) -> usize {
        self.0
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn libtorch_and_the_own_loop_agree() {
        std::thread::spawn(|| {
            for count in [1, 2, 3] {
                assert_eq!(Threads::set(count).unwrap().count(), count);
                assert_eq!(tch::get_num_threads() as usize, count);
                assert_eq!(Threads::current().count(), count);
            }
        })
        .join()
        .unwrap();
        assert!(Threads::set(0).unwrap_err().to_string().contains("found 0"));
    }
}
