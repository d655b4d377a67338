//! What a stage needs of memory beside what was planned for it.
//!
//! Buffers are as large as they get once a stage has taken a few steps. Then the peak is said beside
//! the plan's figure, and a peak beyond it is a warning: the plan is what runs are sized by.

use tch::Device;

use super::{RunError, device};
use crate::metrics::units::bytes;

/// Steps of a stage after which its buffers do not grow any more: operations have met every shape,
/// and the optimizer has run.
const STEPS: u32 = 3;

/// How far a peak may exceed the plan.
const TOLERANCE: f64 = 1.05;

/// What libraries may take beside, whatever the plan: small models need little else.
const SLACK: u64 = 64 << 20;

/// Looks at the memory of a rank after the first steps of a stage.
#[derive(Debug)]
pub(super) struct MemoryWatch {
    stage: String,
    device: Device,
    /// Bytes that the plan counts where the rank computes.
    planned: u64,
    steps: u32,
}

impl MemoryWatch {
    /// Lets the peak begin afresh.
    ///
    /// # Errors
    /// When libtorch has no such figures of the device.
    pub(super) fn begin(stage: &str, device: Device, planned: usize) -> Result<Self, RunError> {
        device::reset_peak(device)?;
        Ok(Self {
            stage: stage.to_owned(),
            device,
            planned: planned as u64,
            steps: 0,
        })
    }

    /// Takes note of a step of the stage; after some of them, says what they needed.
    pub(super) fn step(&mut self) {
        self.steps += 1;
        if self.steps != STEPS {
            return;
        }
        let peak = device::peak(self.device);
        let (stage, shown) = (&self.stage, report(self.planned, &peak));
        if exceeds(self.planned, peak.allocated) {
            tracing::warn!(
                "stage {stage}: {shown}: more than was planned; leave that much room where the \
                 plan says what fits"
            );
        } else {
            tracing::info!("stage {stage}: {shown}");
        }
    }
}

/// Most bytes at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Peak {
    /// In tensors.
    pub(super) allocated: u64,
    /// Taken from the driver for them; absent where there is none.
    pub(super) reserved: Option<u64>,
}

fn report(planned: u64, peak: &Peak) -> String {
    let share = 100.0 * peak.allocated as f64 / planned.max(1) as f64;
    let allocated = bytes(peak.allocated);
    let planned = bytes(planned);
    let reserved = match peak.reserved {
        Some(reserved) => format!(", reserved {}", bytes(reserved)),
        None => String::new(),
    };
    format!("memory planned {planned}, peak allocated {allocated} ({share:.1} %){reserved}")
}

fn exceeds(planned: u64, peak: u64) -> bool {
    peak as f64 > planned as f64 * TOLERANCE && peak > planned + SLACK
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peak_beyond_the_plan_is_told_from_one_within() {
        const GIB: u64 = 1 << 30;
        assert!(!exceeds(10 * GIB, 10 * GIB + GIB / 2));
        assert!(exceeds(10 * GIB, 10 * GIB + GIB / 2 + 1));
        assert!(!exceeds(1 << 20, (1 << 20) + SLACK));
        assert!(exceeds(1 << 20, (1 << 20) + SLACK + 1));
    }

    #[test]
    fn the_plan_and_both_peaks_are_said() {
        let mut peak = Peak {
            allocated: 10 << 30,
            reserved: Some(11 << 30),
        };
        assert_eq!(
            report(10 << 30, &peak),
            "memory planned 10.0 GiB, peak allocated 10.0 GiB (100.0 %), reserved 11.0 GiB"
        );
        peak.reserved = None;
        assert!(report(10 << 30, &peak).ends_with("(100.0 %)"));
    }
}
