//! Scratch memory that ops reuse instead of allocating, and how much of it they will need.

use std::collections::HashMap;

use tch::{Device, Kind, Tensor};

use crate::error::torch;
use crate::{Error, cuda};

const OP: &str = "workspace";

/// Named scratch tensors of one rank. A name's buffer grows to the largest request and stays.
#[derive(Debug)]
pub struct Workspace {
    device: Device,
    buffers: HashMap<(&'static str, Kind), Tensor>,
}

impl Workspace {
    /// An empty workspace; memory is taken at the first request of each name.
    pub fn new(device: Device) -> Self {
        Workspace {
            device,
            buffers: HashMap::new(),
        }
    }

    /// A contiguous tensor of this shape and dtype with unspecified contents.
    ///
    /// Two requests of one name and dtype share memory: a caller that needs two tensors at once
    /// gives them two names.
    ///
    /// # Errors
    /// [`Error::Torch`] if libtorch cannot allocate.
    pub fn take(
        &mut self,
        name: &'static str,
        shape: &[usize],
        kind: Kind,
    ) -> Result<Tensor, Error> {
        let shape: Vec<i64> = shape.iter().map(|&size| size as i64).collect();
        let len: i64 = shape.iter().product();
        let key = (name, kind);
        if self
            .buffers
            .get(&key)
            .is_none_or(|buffer| (buffer.numel() as i64) < len)
        {
            // The old buffer goes first, so that both never exist together.
            self.buffers.remove(&key);
            let fresh = Tensor::f_empty([len], (kind, self.device)).map_err(torch(OP))?;
            self.buffers.insert(key, fresh);
        }
        self.buffers
            .get(&key)
            .ok_or_else(|| Error::Argument {
                op: OP,
                message: format!("no buffer `{name}`"),
            })?
            .f_narrow(0, 0, len)
            .and_then(|flat| flat.f_view(shape.as_slice()))
            .map_err(torch(OP))
    }

    /// Bytes held by all buffers.
    pub fn bytes(&self) -> u64 {
        self.buffers
            .iter()
            .map(|((_, kind), buffer)| (buffer.numel() * kind.elt_size_in_bytes()) as u64)
            .sum()
    }
}

/// What a [`Workspace`] grows to: requests are noted as it would serve them, and nothing is
/// allocated.
#[derive(Clone, Debug)]
pub struct WorkspacePlan {
    device: Device,
    bytes: HashMap<(&'static str, Kind), usize>,
}

impl WorkspacePlan {
    /// No requests yet, of ops on tensors of `device`.
    pub fn new(device: Device) -> Self {
        WorkspacePlan {
            device,
            bytes: HashMap::new(),
        }
    }

    /// Whether the ops are those of a GPU, which need other scratch than a processor.
    pub(crate) fn on_gpu(&self) -> bool {
        cuda::is_gpu(self.device)
    }

    /// Where the tensors lie.
    pub(crate) fn device(&self) -> Device {
        self.device
    }

    /// A request, as [`Workspace::take`]. Requests of one name and dtype share memory.
    pub fn take(&mut self, name: &'static str, shape: &[usize], kind: Kind) {
        let bytes = shape.iter().product::<usize>() * kind.elt_size_in_bytes();
        let largest = self.bytes.entry((name, kind)).or_default();
        *largest = bytes.max(*largest);
    }

    /// Bytes of all buffers.
    pub fn bytes(&self) -> usize {
        self.bytes.values().sum()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn a_name_keeps_its_memory_until_it_must_grow() {
        let mut workspace = Workspace::new(Device::Cpu);
        let first = workspace.take("a", &[4, 8], Kind::Float).unwrap();
        let smaller = workspace.take("a", &[3], Kind::Float).unwrap();
        assert_eq!(first.data_ptr(), smaller.data_ptr());
        assert_eq!(smaller.size(), [3]);
        assert_eq!(workspace.bytes(), 4 * 8 * 4);
        let other = workspace.take("a", &[3], Kind::BFloat16).unwrap();
        assert_ne!(first.data_ptr(), other.data_ptr());
        drop((first, smaller));
        assert_eq!(
            workspace.take("a", &[100], Kind::Float).unwrap().size(),
            [100]
        );
        assert_eq!(workspace.bytes(), 400 + 6);
        let mut plan = WorkspacePlan::new(Device::Cpu);
        for (shape, kind) in [
            ([4, 8], Kind::Float),
            ([3, 1], Kind::Float),
            ([3, 1], Kind::BFloat16),
            ([100, 1], Kind::Float),
        ] {
            plan.take("a", &shape, kind);
        }
        assert_eq!(plan.bytes() as u64, workspace.bytes());
        assert_eq!(
            workspace
                .take("empty", &[0, 5], Kind::Float)
                .unwrap()
                .numel(),
            0
        );
    }
}
