//! Buffers that come and go within a step.
//!
//! A buffer that has been given back is kept for the next unit of the same size: a step allocates
//! nothing once every size has been seen, and the memory in use is what the plan has counted, the
//! most buffers of each size that are held at once.

use tch::{Device, Kind, Tensor};

/// Buffers of a rank, by dtype and length.
#[derive(Debug)]
pub(super) struct Pool {
    device: Device,
    free: Vec<Tensor>,
}

impl Pool {
    pub(super) fn new(device: Device) -> Self {
        Self {
            device,
            free: Vec::new(),
        }
    }

    /// A buffer of `length` elements; what it holds is unspecified.
    pub(super) fn take(&mut self, kind: Kind, length: usize) -> Result<Tensor, tch::TchError> {
        let fits = |buffer: &Tensor| buffer.kind() == kind && buffer.numel() == length;
        match self.free.iter().position(fits) {
            Some(index) => Ok(self.free.swap_remove(index)),
            None => Tensor::f_zeros([length as i64], (kind, self.device)),
        }
    }

    /// Keeps a buffer for later.
    pub(super) fn give(&mut self, buffer: Tensor) {
        self.free.push(buffer);
    }
}
