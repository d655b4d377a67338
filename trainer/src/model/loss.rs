//! The loss of micro-batches, summed where it is computed.

use tch::{Device, Kind, Tensor};

use super::{ModelError, TorchContext};

/// Sum of token losses, and how many tokens had a target.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Loss {
    /// Σ −log p(target), in nats.
    pub sum: f64,
    /// Tokens with a target.
    pub targets: u64,
}

impl Loss {
    /// Mean loss per target token; 0 when there is none.
    pub fn mean(&self) -> f64 {
        if self.targets == 0 {
            0.0
        } else {
            self.sum / self.targets as f64
        }
    }
}

impl std::ops::AddAssign for Loss {
    fn add_assign(&mut self, other: Self) {
        self.sum += other.sum;
        self.targets += other.targets;
    }
}

/// A [`Loss`] that micro-batches add to, on the device that computes them: nothing waits for it
/// until it is read.
#[derive(Debug)]
pub struct LossSum {
    /// `[1]` fp64.
    sum: Tensor,
    targets: u64,
}

impl LossSum {
    pub(super) fn new(device: Device) -> Result<Self, ModelError> {
        let sum = Tensor::f_zeros([1], (Kind::Double, device)).during("allocating activations")?;
        Ok(Self { sum, targets: 0 })
    }

    /// What micro-batches would have come to.
    #[cfg(test)]
    pub(crate) fn of(sum: f64, targets: u64) -> Self {
        let sum = Tensor::from_slice(&[sum]);
        Self { sum, targets }
    }

    /// Forgets what has been added.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn clear(&mut self) -> Result<(), ModelError> {
        let _ = self.sum.f_zero_().during("clearing the loss")?;
        self.targets = 0;
        Ok(())
    }

    /// For a micro-batch with so many targets to add its losses to, `[1]` fp64.
    pub(super) fn add(&mut self, targets: u64) -> &mut Tensor {
        self.targets += targets;
        &mut self.sum
    }

    /// The sum, `[1]` fp64.
    pub fn sum(&self) -> &Tensor {
        &self.sum
    }

    /// Tokens with a target.
    pub fn targets(&self) -> u64 {
        self.targets
    }

    /// What has been added. On a GPU this waits for the micro-batches that were issued.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn read(&self) -> Result<Loss, ModelError> {
        Ok(Loss {
            sum: self.sum.f_double_value(&[0]).during("reading the loss")?,
            targets: self.targets,
        })
    }
}
