//! Optimizer state in host memory, and its way through the device.
//!
//! Master weights and moments of all units lie in one block of host memory, page-locked where a GPU
//! reads it. An update passes them through two buffers on the device, portion by portion
//! ([`Relay`]): the kernels and their arithmetic are those of state that lies there, on other ranges
//! of elements, so the bits are the same. Nothing waits on the host, which therefore asks
//! [`Offload::rest`] before it touches the block itself.

use std::ops::Range;

use oxitron_kernels::{
    Error,
    cuda::{PageLock, Relay, Way},
};
use tch::{Device, Kind, TchError, Tensor};

use super::{
    ZeroError,
    buffer::slice_of,
    unit::{kernel_error, torch_error},
};
use crate::plan::{BufferKind, ShardMap, portion_len, portions};

/// What messages call it.
const STATE: &str = "the optimizer's state in host memory";

/// Every tensor in the block begins at a multiple of this many bytes.
const ALIGNMENT: usize = 256;

/// The way of a rank's optimizer state through its device.
///
/// The relay is dropped before the lock, and waits for its copies.
#[derive(Debug)]
pub(super) struct Offload {
    relay: Relay,
    _lock: Option<PageLock>,
    /// Elements of a portion at most.
    most: usize,
}

impl Offload {
    /// Host memory for all of a rank's state, and the buffers on `device` through which it passes.
    pub(super) fn new(
        map: &ShardMap,
        moments: Kind,
        device: Device,
    ) -> Result<(Self, HostMemory), ZeroError> {
        let memory = HostMemory::new(map, moments).map_err(torch_error(STATE))?;
        let lock = match device {
            Device::Cuda(ordinal) => Some(PageLock::new(&memory.block, ordinal)),
            _ => None,
        };
        let lock = lock.transpose().map_err(kernel_error(STATE))?;
        let most = portion_len(map);
        let relay = Relay::new(device, most, &[Kind::Float, moments, moments]);
        let offload = Self {
            relay: relay.map_err(kernel_error(STATE))?,
            _lock: lock,
            most,
        };
        Ok((offload, memory))
    }

    #[cfg(test)]
    pub(super) fn cut_portions(&mut self, most: usize) {
        self.most = self.most.min(most);
    }

    /// Waits until all of it is back in host memory.
    pub(super) fn rest(&self) -> Result<(), ZeroError> {
        self.relay.finish().map_err(kernel_error(STATE))
    }
}

/// Issues `work` on the elements `range` of `state`, flat tensors: where they lie, or portion by
/// portion where that is host memory. It gets the elements of a portion, and tensors on the device
/// that hold them.
pub(super) fn each_portion<const N: usize>(
    offload: Option<&mut Offload>,
    state: [&Tensor; N],
    range: Range<usize>,
    way: Way,
    mut work: impl FnMut(Range<usize>, &mut [Tensor; N]) -> Result<(), Error>,
) -> Result<(), Error> {
    let Some(Offload { relay, most, .. }) = offload else {
        return work(range.clone(), &mut slices(state, &range)?);
    };
    for portion in portions(range, *most) {
        let mut host = slices(state, &portion)?;
        relay.pass(&mut host, way, |parts| work(portion.clone(), parts))?;
    }
    Ok(())
}

/// The elements `range` of flat tensors.
fn slices<const N: usize>(
    tensors: [&Tensor; N],
    range: &Range<usize>,
) -> Result<[Tensor; N], Error> {
    let mut slices = tensors.map(Tensor::shallow_clone);
    for slice in &mut slices {
        *slice = slice_of(slice, range).map_err(torch)?;
    }
    Ok(slices)
}

/// One block of host memory, handed out from the front.
#[derive(Debug)]
pub(super) struct HostMemory {
    /// `[bytes]`, zeros.
    block: Tensor,
    given: usize,
}

impl HostMemory {
    fn new(map: &ShardMap, moments: Kind) -> Result<Self, TchError> {
        let units = map.pieces().iter().map(|piece| piece.unit + 1).max();
        let of_unit = |unit| {
            let owned = map.owned_len(unit, BufferKind::Trainable);
            bytes(Kind::Float, owned) + 2 * bytes(moments, owned)
        };
        let all: usize = (0..units.unwrap_or(0)).map(of_unit).sum();
        // Zeros are written, so every page is there afterwards.
        let block = Tensor::f_zeros([all as i64], (Kind::Uint8, Device::Cpu))?;
        Ok(Self { block, given: 0 })
    }

    /// `[length]` zeros.
    pub(super) fn take(&mut self, kind: Kind, length: usize) -> Result<Tensor, TchError> {
        let start = self.given;
        self.given += bytes(kind, length);
        let end = start + length * kind.elt_size_in_bytes();
        slice_of(&self.block, &(start..end))?.f_view_dtype(kind)
    }
}

/// Bytes of a tensor, rounded up to where the next one begins.
fn bytes(kind: Kind, length: usize) -> usize {
    (length * kind.elt_size_in_bytes()).next_multiple_of(ALIGNMENT)
}

/// As a failure of an update.
pub(super) fn torch(source: TchError) -> Error {
    Error::Torch {
        op: "update",
        source,
    }
}
