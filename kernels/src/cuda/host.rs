//! Small copies between the host and a GPU for which nobody stands still.
//!
//! A plain copy waits until the GPU has done all that it was asked for. A step that is issued ahead
//! of the GPU would lose its lead with each: what goes up passes through page-locked memory, and what
//! comes down is on its way while the host does something else.

use std::ffi::c_char;
use std::time::Duration;

use tch::{Device, Tensor};
use torch_sys::C_tensor;

use super::{Event, Stream};
use crate::Error;
use crate::error::torch;
use crate::shim::{outcome, text};

const DOWNLOAD: &str = "cuda.download";

/// How long the host sleeps between two looks at a GPU that it waits for.
const LOOK: Duration = Duration::from_micros(50);

unsafe extern "C" {
    fn oxitron_upload(
        host: *const C_tensor,
        device: i32,
        uploaded: *mut *mut C_tensor,
    ) -> *mut c_char;
}

/// `values` as a tensor `[n]` on `device`, ready for what is issued after.
///
/// # Errors
/// [`Error::Torch`] and [`Error::Shim`] if libtorch cannot allocate or copy.
pub fn upload<E: tch::kind::Element>(values: &[E], device: Device) -> Result<Tensor, Error> {
    let host = Tensor::f_from_slice(values).map_err(torch("cuda.upload"))?;
    let Device::Cuda(ordinal) = device else {
        return Ok(host);
    };
    let mut uploaded = std::ptr::null_mut();
    // SAFETY: the tensor and the pointer outlive the call.
    let message = unsafe { oxitron_upload(host.as_ptr(), ordinal as i32, &mut uploaded) };
    outcome("upload", text(message))?;
    // SAFETY: a new handle that nobody else has.
    Ok(unsafe { Tensor::from_ptr(uploaded) })
}

/// A tensor on its way to the host.
#[derive(Debug)]
pub struct Download {
    copy: Tensor,
    /// When it is there; nothing for a tensor that was on the host.
    arrived: Option<Event>,
}

impl Download {
    /// Begins to copy what `tensor` holds once all that was issued before has been done. What is
    /// issued after may overwrite it.
    ///
    /// # Errors
    /// [`Error::Torch`] and [`Error::Shim`] if libtorch cannot allocate or copy.
    pub fn start(tensor: &Tensor) -> Result<Self, Error> {
        let kind = tensor.f_kind().map_err(torch(DOWNLOAD))?;
        // To page-locked memory, as libtorch does for a copy that nobody waits for.
        let copy = tensor.f_to_device_(Device::Cpu, kind, true, true);
        let arrived = match tensor.device() {
            Device::Cuda(ordinal) => {
                let mut event = Event::new(false)?;
                event.record(Stream::current(ordinal)?)?;
                Some(event)
            }
            _ => None,
        };
        Ok(Self {
            copy: copy.map_err(torch(DOWNLOAD))?,
            arrived,
        })
    }

    /// Whether it is there.
    ///
    /// # Errors
    /// [`Error::Shim`], also for a failure of the work before it.
    pub fn is_here(&self) -> Result<bool, Error> {
        self.arrived.as_ref().map_or(Ok(true), Event::is_done)
    }

    /// The copy, once it is there; `None` when `given_up` says so before.
    ///
    /// # Errors
    /// [`Error::Shim`], also for a failure of the work before it.
    pub fn wait(&self, given_up: &dyn Fn() -> bool) -> Result<Option<&Tensor>, Error> {
        while !self.is_here()? {
            if given_up() {
                return Ok(None);
            }
            std::thread::sleep(LOOK);
        }
        Ok(Some(&self.copy))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::cuda::{HostWaits, devices};
    use tch::Kind;

    #[test]
    fn a_download_is_what_the_tensor_held_when_it_began() {
        let x = upload(&[1.0, 2.0, 3.0], Device::Cpu).unwrap();
        let download = Download::start(&x).unwrap();
        let _ = x.shallow_clone().zero_();
        assert!(download.is_here().unwrap());
        let copy = download.wait(&|| true).unwrap().unwrap();
        assert_eq!(Vec::<f64>::try_from(copy).unwrap(), [1.0, 2.0, 3.0]);
    }

    #[test]
    fn nobody_waits_for_a_gpu() {
        if !devices().is_ok_and(|devices| !devices.is_empty()) {
            println!("skipped: this machine has no GPU");
            return;
        }
        let waits = HostWaits::watch().unwrap();
        let busy = Tensor::ones([1 << 13, 1 << 13], (Kind::Float, Device::Cuda(0)));
        let _ = busy.matmul(&busy);
        let x = upload(&[1.0, 2.0, 3.0], Device::Cuda(0)).unwrap();
        let download = Download::start(&x).unwrap();
        let _ = x.shallow_clone().zero_();
        assert_eq!(waits.count(), 0);
        let copy = download.wait(&|| false).unwrap().unwrap();
        assert_eq!(Vec::<f64>::try_from(copy).unwrap(), [1.0, 2.0, 3.0]);
        assert_eq!(waits.count(), 0);
    }
}
