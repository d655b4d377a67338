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
//!   Whoever is left on this machine all the same (a rank that takes time to die, an `ssh` that
//!   waits for a machine) is known by a mark in its environment, killed and waited for.
//! - **A stop is asked for first.** Open MPI kills ranks one second after a SIGTERM, which is no
//!   time to save in; it passes SIGUSR1 on. So the launcher turns the first SIGINT or SIGTERM into
//!   SIGUSR1, and the second into SIGKILL.
//!
//! The supervisor stays with one attempt; whether there is another one is decided by a policy of its
//! own (`restart`), and on which machines by asking them (`probe`). Nothing here knows about training
//! (only the words by which a rank says why it ends): the program that a rank runs is a parameter,
//! which is how it is tested with shell scripts under a real `mpirun`.

mod hosts;
mod leftover;
mod mpirun;
mod probe;
mod restart;
mod supervisor;
mod tags;
#[cfg(test)]
pub(crate) mod tests;
mod verdict;

pub use hosts::Hosts;
pub use mpirun::Job;
pub use probe::{Answer, PROBE_LIMIT, probe};
pub use restart::{Decision, Progress, Restarts};
pub use supervisor::{Ending, Failure, Line, Requests, View, supervise};
pub use verdict::How;
