//! What a lane of one rank does on a GPU: copies, in a stream of its own.
//!
//! Were they to go into the stream that computes, that would stand still for what they come after,
//! and with it all that is issued later, to other lanes too.

use std::sync::Arc;

use oxitron_kernels::cast;
use tch::Tensor;

use super::super::waiters::Label;
use super::pending::{Begun, End};
use super::stream::{Gpu, Queue, flat, words};

/// The stream of a lane of one rank.
#[derive(Debug)]
pub(in super::super) struct Copies {
    gpu: Gpu,
    queue: Queue,
}

impl Copies {
    /// # Errors
    /// Where there is no such GPU.
    pub(in super::super) fn new(gpu: Gpu) -> Result<Self, String> {
        Ok(Self {
            gpu,
            queue: gpu.lane_queue()?,
        })
    }

    pub(in super::super) fn gpu(&self) -> Gpu {
        self.gpu
    }

    pub(in super::super) fn queue(&self) -> &Queue {
        &self.queue
    }

    /// Copies `from` to `to`, or adds it (`add`), as many elements of fp32 each, behind `behind`.
    ///
    /// # Errors
    /// What the kernel or the driver says.
    pub(in super::super) fn copy(
        &self,
        label: Label,
        behind: &[Arc<End>],
        (from, to): (&Tensor, &Tensor),
        add: bool,
    ) -> Result<Arc<End>, String> {
        let begun = Begun::new(self.gpu, &self.queue, behind)?;
        let (from, mut to) = (flat(from)?, flat(to)?);
        self.queue.run(move || {
            let copied = match add {
                true => cast::accumulate(&from, &mut to),
                false => cast::forward(&from, &mut to),
            };
            copied.map_err(words)
        })?;
        begun.end(&self.queue, label, None)
    }
}
