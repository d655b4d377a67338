//! Why the watchdog could not be set up.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use thiserror::Error;

/// Why the watchdog could not be set up.
#[derive(Debug, Error)]
pub enum WatchdogError {
    /// Rank 0 cannot be listened for.
    #[error(
        "watchdog: rank 0 cannot listen on {address}: {source}; \
         set the interface of the watchdog to one that all hosts reach"
    )]
    Listen {
        /// An address, or what was asked for.
        address: String,
        /// What the system answered.
        source: io::Error,
    },
    /// No interface, or not the one asked for.
    #[error(
        "watchdog: expected {wanted}, found {found}; \
         set the interface of the watchdog to the name or the address of one of them"
    )]
    Interface {
        /// What was looked for.
        wanted: String,
        /// The interfaces of this host.
        found: String,
    },
    /// The system has no random bytes or no thread to give.
    #[error("watchdog: the system refuses {what}: {reason}")]
    System {
        /// What was asked for.
        what: &'static str,
        /// What it answered.
        reason: String,
    },
    /// The bytes that came from rank 0 are no invitation.
    #[error(
        "watchdog: expected the invitation of rank 0, found {found}; \
         all ranks must run the same program"
    )]
    Invitation {
        /// What is wrong with the bytes.
        found: String,
    },
    /// Rank 0 was not reached.
    #[error(
        "watchdog: rank {rank} cannot reach rank 0 on any of {} within {} s ({last}); \
         see that no firewall stands between the hosts, or set the interface of the watchdog to \
         one that all hosts reach",
        join(addresses), limit.as_secs_f64()
    )]
    Unreachable {
        /// This rank.
        rank: usize,
        /// Where rank 0 listens.
        addresses: Vec<SocketAddr>,
        /// How long it was tried.
        limit: Duration,
        /// What the last try came to.
        last: String,
    },
}

fn join(addresses: &[SocketAddr]) -> String {
    let addresses: Vec<_> = addresses.iter().map(ToString::to_string).collect();
    addresses.join(", ")
}
