//! Streams of a GPU, and marks in them.
//!
//! Work goes into a stream in the order in which it is issued and runs in that order; streams run
//! beside each other. Each thread has one current stream for a device, into which libtorch and our
//! kernels put their work. Where one stream must wait for another, an [`Event`] marks the point,
//! and the host does not wait at all.

use std::ffi::{c_char, c_void};

use tch::Tensor;
use torch_sys::C_tensor;

use crate::Error;
use crate::shim::{outcome, text};

unsafe extern "C" {
    fn oxitron_stream_current(device: i32, stream: *mut *mut c_void) -> *mut c_char;
    fn oxitron_stream_select(device: i32, stream: *mut c_void) -> *mut c_char;
    fn oxitron_stream_from_pool(
        device: i32,
        high_priority: i32,
        stream: *mut *mut c_void,
    ) -> *mut c_char;
    fn oxitron_stream_synchronize(device: i32, stream: *mut c_void) -> *mut c_char;
    fn oxitron_stream_uses(
        device: i32,
        stream: *mut c_void,
        tensor: *const C_tensor,
    ) -> *mut c_char;
    fn oxitron_event_new(timing: i32, event: *mut *mut c_void) -> *mut c_char;
    fn oxitron_event_free(event: *mut c_void);
    fn oxitron_event_record(event: *mut c_void, device: i32, stream: *mut c_void) -> *mut c_char;
    fn oxitron_event_wait(event: *const c_void, device: i32, stream: *mut c_void) -> *mut c_char;
    fn oxitron_event_synchronize(event: *const c_void) -> *mut c_char;
    fn oxitron_event_done(event: *const c_void, done: *mut i32) -> *mut c_char;
    fn oxitron_event_elapsed(
        start: *const c_void,
        end: *const c_void,
        milliseconds: *mut f64,
    ) -> *mut c_char;
}

/// A stream of one GPU, of libtorch's own or from elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    device: i32,
    /// A `CUstream`; null is the default stream.
    handle: *mut c_void,
}

// SAFETY: the driver takes its handles from any thread, and streams of libtorch live for good.
unsafe impl Send for Stream {}
// SAFETY: as above; a handle is never written through.
unsafe impl Sync for Stream {}

impl Stream {
    /// The current stream of this thread on GPU number `device`.
    ///
    /// # Errors
    /// [`Error::Shim`] where there is no such GPU.
    pub fn current(device: usize) -> Result<Stream, Error> {
        Stream::made("getStream", device, |device, handle| {
            // SAFETY: the pointer outlives the call.
            unsafe { oxitron_stream_current(device, handle) }
        })
    }

    /// A stream of libtorch's pool, which does not order itself with the default stream: 32 of each
    /// priority, handed out in turn.
    ///
    /// # Errors
    /// [`Error::Shim`] where there is no such GPU.
    pub fn from_pool(device: usize, high_priority: bool) -> Result<Stream, Error> {
        Stream::made("getStreamFromGlobalPool", device, |device, handle| {
            // SAFETY: the pointer outlives the call.
            unsafe { oxitron_stream_from_pool(device, i32::from(high_priority), handle) }
        })
    }

    fn made(
        call: &'static str,
        device: usize,
        make: impl FnOnce(i32, *mut *mut c_void) -> *mut c_char,
    ) -> Result<Stream, Error> {
        let (device, mut handle) = (device as i32, std::ptr::null_mut());
        outcome(call, text(make(device, &mut handle)))?;
        Ok(Stream { device, handle })
    }

    /// Makes it the current one of this thread.
    ///
    /// # Errors
    /// [`Error::Shim`].
    pub fn select(self) -> Result<(), Error> {
        // SAFETY: the stream lives for good.
        let message = unsafe { oxitron_stream_select(self.device, self.handle) };
        outcome("exchangeStream", text(message))
    }

    /// Blocks until all its work is done.
    ///
    /// # Errors
    /// [`Error::Shim`], also for a failure of that work.
    pub fn synchronize(self) -> Result<(), Error> {
        // SAFETY: the stream lives for good.
        let message = unsafe { oxitron_stream_synchronize(self.device, self.handle) };
        outcome("synchronizeStream", text(message))
    }

    /// Keeps the memory of `tensor` from being reused, once it is freed, until the work that this
    /// stream has by then is done: for tensors that were allocated under another current stream.
    ///
    /// # Errors
    /// [`Error::Shim`].
    pub fn uses(self, tensor: &Tensor) -> Result<(), Error> {
        // SAFETY: the stream lives for good, and the tensor through the call.
        let message = unsafe { oxitron_stream_uses(self.device, self.handle, tensor.as_ptr()) };
        outcome("recordDataPtrOnStream", text(message))
    }

    /// The GPU that it is of.
    pub fn device(self) -> usize {
        self.device as usize
    }

    /// The driver's handle, a `CUstream`, for libraries that put work into it.
    pub fn handle(self) -> *mut c_void {
        self.handle
    }
}

/// A mark in a stream. One that was never recorded is waited for by nobody.
#[derive(Debug)]
pub struct Event(*mut c_void);

// SAFETY: libtorch's event is a handle and a flag, used through shared references by its own calls.
unsafe impl Send for Event {}
// SAFETY: only `record` changes it, which nobody else may use it during; the calls through shared
// references are libtorch's `const` ones, which ask the driver.
unsafe impl Sync for Event {}

impl Event {
    /// A mark, with the time at which it is reached where `timing` asks for it.
    ///
    /// # Errors
    /// [`Error::Shim`] without libtorch's CUDA half.
    pub fn new(timing: bool) -> Result<Event, Error> {
        let mut event = std::ptr::null_mut();
        // SAFETY: the pointer outlives the call.
        let message = unsafe { oxitron_event_new(i32::from(timing), &mut event) };
        outcome("Event", text(message)).map(|()| Event(event))
    }

    /// Puts it where `stream` has got to. A further call moves it.
    ///
    /// # Errors
    /// [`Error::Shim`], also for another device than that of the first call.
    pub fn record(&mut self, stream: Stream) -> Result<(), Error> {
        // SAFETY: the event is alive.
        let message = unsafe { oxitron_event_record(self.0, stream.device, stream.handle) };
        outcome("Event::record", text(message))
    }

    /// Lets the later work of `stream` wait for it.
    ///
    /// # Errors
    /// [`Error::Shim`].
    pub fn hold_back(&self, stream: Stream) -> Result<(), Error> {
        // SAFETY: the event is alive.
        let message = unsafe { oxitron_event_wait(self.0, stream.device, stream.handle) };
        outcome("Event::block", text(message))
    }

    /// Blocks the host until it is reached.
    ///
    /// # Errors
    /// [`Error::Shim`], also for a failure of the work before it.
    pub fn synchronize(&self) -> Result<(), Error> {
        // SAFETY: the event is alive.
        outcome(
            "Event::synchronize",
            text(unsafe { oxitron_event_synchronize(self.0) }),
        )
    }

    /// Whether it is reached.
    ///
    /// # Errors
    /// [`Error::Shim`], also for a failure of the work before it.
    pub fn is_done(&self) -> Result<bool, Error> {
        let mut done = 0;
        // SAFETY: the event is alive, and the pointer outlives the call.
        let message = unsafe { oxitron_event_done(self.0, &mut done) };
        outcome("Event::query", text(message)).map(|()| done != 0)
    }

    /// Milliseconds from `start` to this mark; both have been reached, and both have `timing`.
    ///
    /// # Errors
    /// [`Error::Shim`].
    pub fn milliseconds_since(&self, start: &Event) -> Result<f64, Error> {
        let mut milliseconds = 0.0;
        // SAFETY: both events are alive, and the pointer outlives the call.
        let message = unsafe { oxitron_event_elapsed(start.0, self.0, &mut milliseconds) };
        outcome("Event::elapsedTime", text(message)).map(|()| milliseconds)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `new`, freed once.
        unsafe { oxitron_event_free(self.0) }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::cuda::devices;
    use tch::{Device, Kind};

    #[test]
    fn without_a_gpu_the_answer_is_an_error() {
        if devices().is_ok_and(|devices| !devices.is_empty()) {
            println!("skipped: this machine has a GPU");
            return;
        }
        println!("{}", Stream::current(0).unwrap_err());
    }

    #[test]
    fn marks_order_streams_and_tell_the_time() {
        if !devices().is_ok_and(|devices| !devices.is_empty()) {
            println!("skipped: this machine has no GPU");
            return;
        }
        let first = Stream::current(0).unwrap();
        let second = Stream::from_pool(0, true).unwrap();
        assert_ne!(first, second);
        let (mut start, mut end) = (Event::new(true).unwrap(), Event::new(true).unwrap());
        start.record(first).unwrap();
        let x = Tensor::ones([1 << 20], (Kind::Float, Device::Cuda(0)));
        end.record(first).unwrap();
        end.hold_back(second).unwrap();
        second.uses(&x).unwrap();
        second.select().unwrap();
        assert_eq!(Stream::current(0).unwrap(), second);
        let sum = x.sum(Kind::Float);
        second.synchronize().unwrap();
        first.select().unwrap();
        assert_eq!(sum.double_value(&[]), f64::from(1 << 20));
        assert!(end.is_done().unwrap());
        assert!(end.milliseconds_since(&start).unwrap() >= 0.0);
    }
}
