//! Ranks as processes: starting them through Open MPI's `mpirun`, and watching over them.
//!
//! ```text
//! oxitron launch ─▶ mpirun (own process group, dies with the launcher) ─▶ rank 0, rank 1, … (die
//!   │   ▲               │                                                  with their mpirun)
//!   │   └─ tagged lines ┘ SIGINT or SIGTERM to the launcher ─▶ SIGUSR1 to mpirun ─▶ every rank
//!   └─ bar or plain lines
//! ```
//!
//! What holds, whatever happens to a rank, to `mpirun` or to the launcher:
//!
//! - **One dead rank ends the run.** `mpirun` ends the others; where it does not within a few
//!   seconds, the launcher kills it and the ranks go with it. The report names the rank, how it
//!   died and its last words.
//! - **Nobody is left behind.** `mpirun` gives each rank a process group of its own, so killing
//!   *its* group reaches no rank. `setpriv --pdeathsig` (util-linux) therefore asks the kernel to
//!   kill `mpirun` when the launcher dies and each rank when its `mpirun` or remote daemon dies,
//!   even by SIGKILL.
//! - **A stop is asked for first.** Open MPI kills ranks one second after a SIGTERM, which is no
//!   time to save in; it passes SIGUSR1 on. So the launcher turns the first SIGINT or SIGTERM into
//!   SIGUSR1, and the second into SIGKILL.
//!
//! The supervisor knows nothing of training (only the words by which a rank says that it aborts):
//! the program that a rank runs is a parameter, which is
//! how it is tested with shell scripts under a real `mpirun`.

mod hosts;
mod mpirun;
mod supervisor;
mod tags;
#[cfg(test)]
mod tests;
mod verdict;

pub use hosts::Hosts;
pub use mpirun::Job;
pub use supervisor::{Ending, Failure, Line, View, supervise};
pub use verdict::How;
