//! The memory behind a tensor, as the communication thread sees it.

use tch::{Device, Kind, Tensor};

/// Element types that lanes carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Element {
    F32,
    F64,
    Bf16,
    I64,
    U8,
}

impl Element {
    /// Bytes of one element.
    pub(super) fn bytes(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::Bf16 => 2,
            Self::F32 => 4,
            Self::F64 | Self::I64 => 8,
        }
    }

    fn of(kind: Kind) -> Option<Self> {
        match kind {
            Kind::Float => Some(Self::F32),
            Kind::Double => Some(Self::F64),
            Kind::BFloat16 => Some(Self::Bf16),
            Kind::Int64 => Some(Self::I64),
            Kind::Uint8 => Some(Self::U8),
            _ => None,
        }
    }
}

/// Address, length and element type of a checked tensor's memory.
///
/// It borrows nothing: whoever holds one also holds the tensor (see [`checked`]).
#[derive(Debug, Clone, Copy)]
pub(super) struct Buffer {
    address: *mut u8,
    elements: usize,
    element: Element,
    device: Device,
}

// SAFETY: a buffer is an address with a length. It travels with the tensor it was taken from
// (`tch::Tensor` is `Send` too) and is only dereferenced by the one thread that runs its operation.
unsafe impl Send for Buffer {}

impl Buffer {
    pub(super) fn element(&self) -> Element {
        self.element
    }

    /// Where the memory is.
    pub(super) fn device(&self) -> Device {
        self.device
    }

    pub(super) fn elements(&self) -> usize {
        self.elements
    }

    pub(super) fn bytes(&self) -> usize {
        self.elements * self.element.bytes()
    }

    /// Whether a byte belongs to both.
    pub(super) fn overlaps(&self, other: &Self) -> bool {
        let (start, other_start) = (self.address as usize, other.address as usize);
        let (bytes, other_bytes) = (self.bytes(), other.bytes());
        // An empty one lies nowhere.
        bytes > 0
            && other_bytes > 0
            && start < other_start + other_bytes
            && other_start < start + bytes
    }

    /// The address of the element at `index`, which must lie within the buffer or at its end.
    pub(super) fn at(&self, index: usize) -> *mut u8 {
        debug_assert!(index <= self.elements);
        self.address.wrapping_add(index * self.element.bytes())
    }
}

/// Checks that `tensor` is one contiguous run of memory of a type that lanes carry. Whether a lane
/// reaches the device that it lies on is the lane's to say.
///
/// The buffer is valid as long as the tensor lives. Its memory must not be read or written through
/// another handle on the same storage (a view made earlier) while an operation works on it.
///
/// # Errors
/// A sentence that says what was expected and what was found.
pub(super) fn checked(tensor: &Tensor) -> Result<Buffer, String> {
    if !tensor.defined() {
        return Err("expected a tensor, found an undefined one".to_owned());
    }
    if !tensor.is_contiguous() {
        let (shape, strides) = (tensor.size(), tensor.stride());
        return Err(format!(
            "expected a contiguous tensor, found shape {shape:?} with strides {strides:?}"
        ));
    }
    let kind = tensor
        .f_kind()
        .map_err(|error| format!("unknown element type: {error}"))?;
    let element = Element::of(kind).ok_or_else(|| {
        format!("expected elements of type f32, f64, bf16, i64 or u8, found {kind:?}")
    })?;
    let address = tensor.data_ptr().cast::<u8>();
    Ok(Buffer {
        address,
        elements: tensor.numel(),
        element,
        device: tensor.device(),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_strided_view_is_refused_with_its_strides() {
        let tensor = Tensor::zeros([4, 6], (Kind::Float, Device::Cpu));
        let error = checked(&tensor.narrow(1, 0, 3)).unwrap_err();
        assert!(error.contains("strides [6, 1]"), "{error}");
        assert!(checked(&tensor.narrow(0, 1, 2)).is_ok());
    }

    #[test]
    fn views_overlap_where_they_share_bytes() {
        let tensor = Tensor::zeros([8], (Kind::Float, Device::Cpu));
        let view = |start, length| checked(&tensor.narrow(0, start, length)).unwrap();
        assert!(view(0, 4).overlaps(&view(3, 2)));
        assert!(view(3, 2).overlaps(&view(0, 4)));
        assert!(view(0, 8).overlaps(&view(2, 1)));
        assert!(!view(0, 4).overlaps(&view(4, 4)));
        assert!(!view(0, 8).overlaps(&view(3, 0)));
        assert!(!view(0, 8).overlaps(&checked(&tensor.copy()).unwrap()));
    }

    #[test]
    fn a_type_that_lanes_do_not_carry_is_refused_by_name() {
        let error = checked(&Tensor::zeros([2], (Kind::Bool, Device::Cpu))).unwrap_err();
        assert!(error.contains("Bool"), "{error}");
    }
}
