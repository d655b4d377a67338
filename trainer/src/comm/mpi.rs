//! Ranks as processes: point-to-point messages of MPI.
//!
//! Everything here runs on the communication thread, which initialises MPI with
//! `MPI_THREAD_FUNNELED`, is therefore MPI's main thread, and finalises it. Raw calls are used
//! instead of the safe binding because that one ignores return codes and panics on dropped requests.
//! Messages travel on an own duplicate of the world communicator whose error handler returns, so an
//! error becomes a result instead of the end of the process.

use std::mem::MaybeUninit;
use std::time::{Duration, Instant};

use mpi::Threading;
use mpi::environment::Universe;
use mpi::ffi;
use mpi::topology::Communicator as _;
use mpi::traits::AsRaw as _;

use super::handle::ABORT_MARK;
use super::transport::Transport;

/// The exit code that an abort gives the job.
const ABORT_CODE: i32 = 1;

/// How often a quiet thread looks after messages: soon after the last one, and later. A transport
/// such as TCP may hold the tail of a message that counts as sent until MPI is called again.
const IDLE_SOON: Duration = Duration::from_millis(2);
const IDLE_LATER: Duration = Duration::from_millis(20);
const SOON: Duration = Duration::from_millis(100);

/// The library's own name and version; it may be asked before MPI is initialised.
pub(super) fn library() -> String {
    let version = mpi::environment::library_version().unwrap_or_default();
    let name = version.split([',', '\n', '\0']).next().unwrap_or_default();
    name.trim().to_owned()
}

/// The transport of this process.
pub(super) struct Mpi {
    communicator: ffi::MPI_Comm,
    rank: usize,
    barrier: Option<ffi::MPI_Request>,
    last_message: Instant,
    /// Finalises MPI when dropped, after the communicator is freed.
    universe: Option<Universe>,
}

/// What the launcher gave this process.
#[derive(Debug, Clone, Copy)]
pub(super) struct Position {
    pub(super) rank: usize,
    pub(super) world: usize,
    pub(super) local_rank: usize,
    pub(super) local_world: usize,
}

impl Mpi {
    /// Initialises MPI on the calling thread, which becomes the only one that may call it.
    pub(super) fn start() -> Result<(Self, Position), String> {
        let (universe, provided) = mpi::initialize_with_threading(Threading::Funneled)
            .ok_or("MPI is initialised already; a process can join a run only once")?;
        if provided < Threading::Funneled {
            return Err(format!(
                "this MPI library offers thread support {provided:?}, needed is Funneled; \
                 use one that was built with thread support"
            ));
        }
        let world = universe.world();
        let number = |value: i32| usize::try_from(value).map_err(|e| e.to_string());
        let rank = number(world.rank())?;
        let size = number(world.size())?;
        let host = world.split_shared(world.rank());
        let (local_rank, local_world) = (number(host.rank())?, number(host.size())?);
        drop(host);

        let mut communicator = MaybeUninit::uninit();
        // SAFETY: MPI is initialised and this is its main thread; the world communicator is valid
        // and `communicator` is written before it is read, since the default handler of the world
        // ends the process on an error.
        let communicator = unsafe {
            ffi::MPI_Comm_dup(world.as_raw(), communicator.as_mut_ptr());
            let communicator = communicator.assume_init();
            ffi::MPI_Comm_set_errhandler(communicator, ffi::RSMPI_ERRORS_RETURN);
            communicator
        };
        let transport = Self {
            communicator,
            rank,
            barrier: None,
            last_message: Instant::now(),
            universe: Some(universe),
        };
        Ok((
            transport,
            Position {
                rank,
                world: size,
                local_rank,
                local_world,
            },
        ))
    }

    fn begin(&mut self, bytes: usize, tag: u32) -> Result<(i32, i32), String> {
        self.last_message = Instant::now();
        let count = i32::try_from(bytes).map_err(|_| format!("a message of {bytes} bytes"))?;
        let tag = i32::try_from(tag).map_err(|_| format!("tag {tag} is too large"))?;
        Ok((count, tag))
    }
}

fn rank_number(peer: usize) -> Result<i32, String> {
    i32::try_from(peer).map_err(|_| format!("rank {peer} is too large for MPI"))
}

/// A message under way.
pub(super) struct Request {
    raw: ffi::MPI_Request,
    /// The bytes that must arrive; `None` for a message that leaves.
    expected: Option<i32>,
}

impl Transport for Mpi {
    type Request = Request;

    unsafe fn start_send(
        &mut self,
        peer: usize,
        tag: u32,
        data: *const u8,
        bytes: usize,
    ) -> Result<Request, String> {
        let (count, tag) = self.begin(bytes, tag)?;
        let peer = rank_number(peer)?;
        let mut raw = MaybeUninit::uninit();
        // SAFETY: the caller keeps `bytes` bytes at `data` valid until the request is done; the
        // request is written whenever the call succeeds, and read only then.
        unsafe {
            check(ffi::MPI_Isend(
                data.cast(),
                count,
                ffi::RSMPI_UINT8_T,
                peer,
                tag,
                self.communicator,
                raw.as_mut_ptr(),
            ))?;
            Ok(Request {
                raw: raw.assume_init(),
                expected: None,
            })
        }
    }

    unsafe fn start_recv(
        &mut self,
        peer: usize,
        tag: u32,
        data: *mut u8,
        bytes: usize,
    ) -> Result<Request, String> {
        let (count, tag) = self.begin(bytes, tag)?;
        let peer = rank_number(peer)?;
        let mut raw = MaybeUninit::uninit();
        // SAFETY: as in `start_send`, and nobody else touches the memory meanwhile.
        unsafe {
            check(ffi::MPI_Irecv(
                data.cast(),
                count,
                ffi::RSMPI_UINT8_T,
                peer,
                tag,
                self.communicator,
                raw.as_mut_ptr(),
            ))?;
            Ok(Request {
                raw: raw.assume_init(),
                expected: Some(count),
            })
        }
    }

    fn test(&mut self, request: &mut Request) -> Result<bool, String> {
        let mut status = MaybeUninit::uninit();
        // SAFETY: the request came from a call that succeeded and is not done yet; the status is
        // written when the flag says done.
        unsafe {
            let mut done = 0;
            check(ffi::MPI_Test(
                &mut request.raw,
                &mut done,
                status.as_mut_ptr(),
            ))?;
            if done == 0 {
                return Ok(false);
            }
            if let Some(expected) = request.expected {
                let mut arrived = 0;
                check(ffi::MPI_Get_count(
                    status.as_ptr(),
                    ffi::RSMPI_UINT8_T,
                    &mut arrived,
                ))?;
                if arrived != expected {
                    return Err(format!("expected {expected} bytes, it sent {arrived}"));
                }
            }
        }
        self.last_message = Instant::now();
        Ok(true)
    }

    fn cancel(&mut self, _request: Request) -> bool {
        // MPI cannot call back a message that has been matched.
        false
    }

    fn idle(&mut self) -> Option<Duration> {
        let mut flag = 0;
        // SAFETY: any source and any tag are valid arguments, and no status is asked for. The
        // result does not matter: the call is made for the progress it drives.
        unsafe {
            ffi::MPI_Iprobe(
                ffi::RSMPI_ANY_SOURCE,
                ffi::RSMPI_ANY_TAG,
                self.communicator,
                &mut flag,
                ffi::RSMPI_STATUS_IGNORE,
            );
        }
        Some(if self.last_message.elapsed() < SOON {
            IDLE_SOON
        } else {
            IDLE_LATER
        })
    }

    fn start_leave(&mut self) -> Result<(), String> {
        let mut raw = MaybeUninit::uninit();
        // SAFETY: the communicator is valid; the request is read only when the call succeeded.
        unsafe {
            check(ffi::MPI_Ibarrier(self.communicator, raw.as_mut_ptr()))?;
            self.barrier = Some(raw.assume_init());
        }
        Ok(())
    }

    fn test_leave(&mut self) -> Result<bool, String> {
        let Some(mut raw) = self.barrier else {
            return Ok(true);
        };
        let mut done = 0;
        // SAFETY: the request is that of the barrier and is dropped as soon as it is done.
        unsafe { check(ffi::MPI_Test(&mut raw, &mut done, ffi::RSMPI_STATUS_IGNORE))? };
        if done != 0 {
            self.barrier = None;
        }
        Ok(done != 0)
    }

    fn abort(&mut self, reason: &str) {
        eprintln!("rank {} {ABORT_MARK} {reason}", self.rank);
        // SAFETY: MPI is initialised; the call ends this process and its peers.
        unsafe { ffi::MPI_Abort(self.communicator, ABORT_CODE) };
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // Finalising would wait for peers that wait for this rank.
            self.abort("its communication thread panicked");
        }
        // SAFETY: the communicator is this transport's own and MPI is not finalised yet.
        unsafe { ffi::MPI_Comm_free(&mut self.communicator) };
        drop(self.universe.take());
    }
}

/// Turns a return code into MPI's own sentence about it.
fn check(code: i32) -> Result<(), String> {
    // MPI_SUCCESS is 0 by the standard.
    if code == 0 {
        return Ok(());
    }
    // Larger than MPI_MAX_ERROR_STRING of the known libraries (256 to 1024).
    let mut text = [0u8; 4096];
    let mut length = 0;
    // SAFETY: the buffer is longer than any error string and `length` receives what was written.
    unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr().cast(), &mut length) };
    let length = usize::try_from(length).unwrap_or(0).min(text.len());
    let text = String::from_utf8_lossy(&text[..length]);
    Err(if text.is_empty() {
        format!("MPI error {code}")
    } else {
        text.into_owned()
    })
}
