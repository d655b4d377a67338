//! The one thing that a way of moving bytes between ranks has to offer.
//!
//! Everything above (collectives, order, errors, back-off) is written once against this trait, so a
//! schedule that holds on threads holds on processes too.

use std::time::Duration;

/// Non-blocking point-to-point messages between ranks, used by one thread per rank.
///
/// Messages from one rank to another with the same `tag` arrive in the order in which they were
/// started, and meet the receives of that tag in the order in which *those* were started. Messages
/// of different tags never meet.
pub(super) trait Transport {
    /// A message under way.
    type Request;

    /// Starts to send `bytes` bytes at `data` to `peer`.
    ///
    /// # Safety
    /// The memory must stay valid and unchanged until [`Transport::test`] says that the request is
    /// done or [`Transport::cancel`] returns true.
    ///
    /// # Errors
    /// What the transport says, without the names of the peer and the operation.
    unsafe fn start_send(
        &mut self,
        peer: usize,
        tag: u32,
        data: *const u8,
        bytes: usize,
    ) -> Result<Self::Request, String>;

    /// Starts to receive exactly `bytes` bytes from `peer` into `data`.
    ///
    /// # Safety
    /// The memory must stay valid, and be touched by nobody else, until [`Transport::test`] says
    /// that the request is done or [`Transport::cancel`] returns true.
    ///
    /// # Errors
    /// What the transport says, without the names of the peer and the operation.
    unsafe fn start_recv(
        &mut self,
        peer: usize,
        tag: u32,
        data: *mut u8,
        bytes: usize,
    ) -> Result<Self::Request, String>;

    /// Makes progress and says whether the request is done. A request that is done must not be
    /// tested again.
    ///
    /// # Errors
    /// What the transport says: the peer is gone, or the lengths of the two ends differ.
    fn test(&mut self, request: &mut Self::Request) -> Result<bool, String>;

    /// Gives up a request that is not done. Returns true when the transport will not touch its
    /// memory again, false when it might: the caller must then never free that memory.
    fn cancel(&mut self, request: Self::Request) -> bool;

    /// Lets messages that are complete on this side travel on while nothing is active here. Returns
    /// how long the communication thread may sleep before the next call; `None` means for ever.
    fn idle(&mut self) -> Option<Duration>;

    /// Starts to leave; the first half of a clean end. All lanes are empty by now.
    ///
    /// # Errors
    /// What the transport says.
    fn start_leave(&mut self) -> Result<(), String>;

    /// Whether all ranks have started to leave.
    ///
    /// # Errors
    /// What the transport says.
    fn test_leave(&mut self) -> Result<bool, String>;

    /// Brings the other ranks down because of `reason`. A transport between processes does not
    /// return from this; one between threads makes every further operation of a peer fail.
    fn abort(&mut self, reason: &str);
}
