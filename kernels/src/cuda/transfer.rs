//! Host memory that a GPU works on, a portion at a time.
//!
//! A portion is copied to one of two buffers on the GPU, worked on there by kernels of the compute
//! stream, and copied back. Copies have a stream for each direction, so that those of the next
//! portion and of the one before run beside the kernels of this one; the host only issues, and
//! waits for nothing. What has to wait for what is a list of [`Act`]s that [`acts`] writes and a
//! [`Relay`] carries out: the order can be tested without a GPU.

use std::ffi::{c_char, c_void};
use std::ops::Range;

use tch::{Kind, Tensor};
use torch_sys::C_tensor;

use super::{Device, Event, Stream};
use crate::Error;
use crate::error::torch;
use crate::shim::{outcome, text};

const OP: &str = "cuda.relay";

unsafe extern "C" {
    fn oxitron_copy(to: *mut C_tensor, from: *const C_tensor) -> *mut c_char;
}

/// Copies a contiguous tensor to another one of its shape and dtype, on the current stream; the
/// host does not wait where its side is page-locked.
fn copy(to: &mut Tensor, from: &Tensor) -> Result<(), Error> {
    // SAFETY: two tensors that live through the call; the caller keeps them until the stream has
    // come so far.
    let message = unsafe { oxitron_copy(to.as_mut_ptr(), from.as_ptr()) };
    outcome("copy", text(message))
}

/// Pages of host memory that stay where they are, so that a GPU can copy to and from them by itself.
///
/// The memory is libtorch's own: its page-locking allocator rounds sizes up to powers of two, which
/// is no choice for something that fills a machine.
#[derive(Debug)]
pub struct PageLock {
    device: &'static Device,
    memory: Tensor,
}

impl PageLock {
    /// Locks the pages of a contiguous tensor in host memory, for GPU number `device`.
    ///
    /// # Errors
    /// [`Error::Cuda`] where the system or the driver refuses, with the remedy.
    pub fn new(memory: &Tensor, device: usize) -> Result<Self, Error> {
        let device = Device::get(device)?;
        let bytes = memory.numel() * memory.kind().elt_size_in_bytes();
        let lock = PageLock {
            device,
            memory: memory.shallow_clone(),
        };
        if bytes == 0 {
            return Ok(lock);
        }
        // SAFETY: the lock holds a handle of the memory, and undoes this when it is dropped.
        let locked = unsafe { device.lock_pages(memory.data_ptr(), bytes) };
        if let Err(error) = locked {
            // Nothing to undo.
            std::mem::forget(lock);
            return Err(Error::Cuda {
                call: "cuMemHostRegister",
                message: format!(
                    "{bytes} bytes of host memory cannot be locked for the GPU: {error}; give the \
                     process that much memory and no limit on locked memory (`ulimit -l unlimited`, \
                     in a container or job its own setting), or use less of it"
                ),
            });
        }
        Ok(lock)
    }
}

impl Drop for PageLock {
    fn drop(&mut self) {
        if self.memory.numel() > 0 {
            // SAFETY: locked by `new`; a relay that copies has waited for its copies when it was
            // dropped. What an unlock has to object to cannot be helped here.
            let _ = unsafe { self.device.unlock_pages(self.memory.data_ptr()) };
        }
    }
}

/// What becomes of a portion that was worked on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// It was only read.
    In,
    /// It is copied back.
    InAndOut,
}

/// Buffers of a relay.
const SLOTS: usize = 2;

/// A stream of work on a portion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lane {
    Inward,
    Compute,
    Outward,
}

/// A point in a lane, for a buffer: its portion is there, was worked on, is back in host memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mark {
    Arrived(usize),
    Worked(usize),
    Left(usize),
}

/// One thing that is issued for a portion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    /// What the lane is given from now on waits for the mark.
    Wait(Lane, Mark),
    /// The mark is where the lane has got to.
    Put(Lane, Mark),
    /// Host to buffer, on the inward lane.
    CopyIn,
    /// Kernels on the compute lane.
    Work,
    /// Buffer to host, on the outward lane.
    CopyOut,
}

/// What is issued for a portion in buffer `slot`. `follows`: host memory of the portion before is
/// among it.
fn acts(slot: usize, way: Way, follows: bool) -> Vec<Act> {
    use {Act::*, Lane::*, Mark::*};
    // The buffer is free once its last portion was worked on and is back.
    let mut acts = vec![Wait(Inward, Worked(slot)), Wait(Inward, Left(slot))];
    if follows {
        acts.push(Wait(Inward, Left((slot + SLOTS - 1) % SLOTS)));
    }
    acts.extend([
        CopyIn,
        Put(Inward, Arrived(slot)),
        Wait(Compute, Arrived(slot)),
        Work,
        Put(Compute, Worked(slot)),
    ]);
    if way == Way::InAndOut {
        acts.extend([
            Wait(Outward, Worked(slot)),
            CopyOut,
            Put(Outward, Left(slot)),
        ]);
    }
    acts
}

/// Two buffers on a device through which portions of host memory pass.
#[derive(Debug)]
pub struct Relay {
    /// The buffers, by slot: one tensor for each part of a portion.
    buffers: [Vec<Tensor>; SLOTS],
    /// The buffer of the next portion.
    next: usize,
    /// Where the first part of the last portion lies in host memory.
    last: Range<usize>,
    /// Absent where device memory is the host's: then everything is done on return.
    lanes: Option<Lanes>,
}

#[derive(Debug)]
struct Lanes {
    device: usize,
    inward: Stream,
    outward: Stream,
    arrived: [Event; SLOTS],
    worked: [Event; SLOTS],
    left: [Event; SLOTS],
}

impl Relay {
    /// Buffers on `device` for portions of up to `elements` elements, in parts of these dtypes.
    ///
    /// # Errors
    /// [`Error::Torch`] without that much memory, [`Error::Shim`] without such a device.
    pub fn new(device: tch::Device, elements: usize, parts: &[Kind]) -> Result<Self, Error> {
        let buffers = || {
            let buffer = |&kind: &Kind| Tensor::f_zeros([elements as i64], (kind, device));
            let buffers: Result<Vec<Tensor>, _> = parts.iter().map(buffer).collect();
            buffers.map_err(torch(OP))
        };
        let buffers = [buffers()?, buffers()?];
        let lanes = match device {
            tch::Device::Cuda(ordinal) => Some(Lanes::new(ordinal)?),
            _ => None,
        };
        Ok(Relay {
            buffers,
            next: 0,
            last: 0..0,
            lanes,
        })
    }

    /// Lets `work` have a portion: the parts `host`, flat tensors of one length in (page-locked) host
    /// memory, as tensors on the device. `work` issues kernels on the current stream, before which
    /// everything that was issued on it comes; none of this is done on return. Until
    /// [`Relay::finish`] the host leaves the parts alone.
    ///
    /// # Errors
    /// What `work` says; [`Error::Argument`] for portions that do not fit, [`Error::Shim`] and
    /// [`Error::Torch`] of failing copies.
    pub fn pass<const N: usize>(
        &mut self,
        host: &mut [Tensor; N],
        way: Way,
        work: impl FnOnce(&mut [Tensor; N]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let slot = self.next;
        self.next = (slot + 1) % SLOTS;
        let mut parts = self.parts(slot, host)?;
        let here = host.first().map_or(0..0, memory_of);
        let follows = here.start < self.last.end && self.last.start < here.end;
        self.last = here;
        let compute = self.lanes.as_ref().map(Lanes::compute).transpose()?;
        let mut work = Some(work);
        for act in acts(slot, way, follows) {
            match act {
                Act::Wait(..) | Act::Put(..) => {
                    if let (Some(lanes), Some(compute)) = (&mut self.lanes, compute) {
                        lanes.order(act, compute)?;
                    }
                }
                Act::CopyIn => self.on(Lane::Inward, compute, || copy_all(&mut parts, host))?,
                Act::CopyOut => self.on(Lane::Outward, compute, || copy_all(host, &parts))?,
                Act::Work => {
                    if let Some(work) = work.take() {
                        work(&mut parts)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Waits until every portion is back in host memory.
    ///
    /// # Errors
    /// [`Error::Shim`], also for a failure of the work before.
    pub fn finish(&self) -> Result<(), Error> {
        let mut marks = self.lanes.iter().flat_map(|lanes| {
            let marks = [&lanes.arrived, &lanes.worked, &lanes.left];
            marks.into_iter().flatten()
        });
        marks.try_for_each(Event::synchronize)
    }

    /// Views of a buffer for a portion like `host`.
    fn parts<const N: usize>(&self, slot: usize, host: &[Tensor; N]) -> Result<[Tensor; N], Error> {
        let refused = |message: String| Error::Argument { op: OP, message };
        let part = |(buffer, host): (&Tensor, &Tensor)| {
            if host.numel() > buffer.numel() || host.kind() != buffer.kind() {
                return Err(refused(format!(
                    "a portion of {} elements {:?}, expected up to {} elements {:?}",
                    host.numel(),
                    host.kind(),
                    buffer.numel(),
                    buffer.kind()
                )));
            }
            let part = buffer.f_narrow(0, 0, host.numel() as i64);
            part.map_err(torch(OP))
        };
        let buffers = self.buffers[slot].iter().zip(host);
        let parts: Vec<Tensor> = buffers.map(part).collect::<Result<_, _>>()?;
        parts.try_into().map_err(|parts: Vec<Tensor>| {
            let expected = parts.len();
            refused(format!("a portion of {N} parts, expected up to {expected}"))
        })
    }

    /// Runs `issue` with a lane as the current stream.
    fn on(
        &self,
        lane: Lane,
        compute: Option<Stream>,
        issue: impl FnOnce() -> Result<(), Error>,
    ) -> Result<(), Error> {
        let (Some(lanes), Some(compute)) = (&self.lanes, compute) else {
            return issue();
        };
        lanes.stream(lane, compute).select()?;
        let issued = issue();
        compute.select()?;
        issued
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        // The buffers, and the host memory behind them, are about to go. A failure of the GPU has
        // been told by what met it first.
        let _ = self.finish();
    }
}

impl Lanes {
    fn new(device: usize) -> Result<Self, Error> {
        let events = || Ok::<_, Error>([Event::new(false)?, Event::new(false)?]);
        let mut lanes = Lanes {
            device,
            inward: Stream::from_pool(device, false)?,
            outward: Stream::from_pool(device, false)?,
            arrived: events()?,
            worked: events()?,
            left: events()?,
        };
        // The buffers were filled on the compute stream.
        let compute = lanes.compute()?;
        for worked in &mut lanes.worked {
            worked.record(compute)?;
        }
        Ok(lanes)
    }

    fn compute(&self) -> Result<Stream, Error> {
        Stream::current(self.device)
    }

    fn stream(&self, lane: Lane, compute: Stream) -> Stream {
        match lane {
            Lane::Inward => self.inward,
            Lane::Compute => compute,
            Lane::Outward => self.outward,
        }
    }

    fn event(&mut self, mark: Mark) -> &mut Event {
        match mark {
            Mark::Arrived(slot) => &mut self.arrived[slot],
            Mark::Worked(slot) => &mut self.worked[slot],
            Mark::Left(slot) => &mut self.left[slot],
        }
    }

    /// Issues a wait or a mark.
    fn order(&mut self, act: Act, compute: Stream) -> Result<(), Error> {
        match act {
            Act::Wait(lane, mark) => {
                let stream = self.stream(lane, compute);
                self.event(mark).hold_back(stream)
            }
            Act::Put(lane, mark) => {
                let stream = self.stream(lane, compute);
                self.event(mark).record(stream)
            }
            Act::CopyIn | Act::Work | Act::CopyOut => Ok(()),
        }
    }
}

fn copy_all(to: &mut [Tensor], from: &[Tensor]) -> Result<(), Error> {
    to.iter_mut()
        .zip(from)
        .try_for_each(|(to, from)| copy(to, from))
}

/// Addresses of a contiguous tensor.
fn memory_of(tensor: &Tensor) -> Range<usize> {
    let at: *mut c_void = tensor.data_ptr();
    let bytes = tensor.numel() * tensor.kind().elt_size_in_bytes();
    at as usize..at as usize + bytes
}

#[cfg(test)]
mod tests;
