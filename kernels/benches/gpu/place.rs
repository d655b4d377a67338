//! Operands: where they lie, what they hold, and in how many sets.

use oxitron_kernels::Error;
use oxitron_kernels::embedding::TokenIds;
use tch::{Device, Kind, TchError, Tensor};

/// Most sets of operands of one op.
const MOST_SETS: f64 = 64.0;

/// Where operands lie.
#[derive(Clone, Copy)]
pub struct Place {
    device: Device,
    /// Bytes that the sets of an op's operands come to, at least: so many that a cache hardly
    /// helps, as in a step, which touches much more between two looks at the same tensor.
    rotated_bytes: f64,
}

impl Place {
    pub fn new(device: Device, rotated_bytes: f64) -> Self {
        Place {
            device,
            rotated_bytes,
        }
    }

    pub fn device(self) -> Device {
        self.device
    }

    /// Standard normal numbers. What an op reads is random, for zeros draw less power and let a GPU
    /// clock higher than it would.
    ///
    /// # Errors
    /// [`Error::Torch`] if libtorch cannot allocate; so for all others.
    pub fn random(self, shape: &[i64], kind: Kind) -> Result<Tensor, Error> {
        Tensor::f_randn(shape, (kind, self.device)).map_err(torch)
    }

    /// Random numbers brought to a standard deviation.
    pub fn scaled(self, shape: &[i64], kind: Kind, deviation: f64) -> Result<Tensor, Error> {
        let mut numbers = self.random(shape, kind)?;
        numbers.f_mul_scalar_(deviation).map_err(torch)
    }

    /// What an op writes before anybody reads it.
    pub fn output(self, shape: &[i64], kind: Kind) -> Result<Tensor, Error> {
        Tensor::f_empty(shape, (kind, self.device)).map_err(torch)
    }

    /// Numbers from the host.
    pub fn numbers<E: tch::kind::Element>(self, numbers: &[E]) -> Result<Tensor, Error> {
        Tensor::f_from_slice(numbers)
            .and_then(|numbers| numbers.f_to_device(self.device))
            .map_err(torch)
    }

    /// Tokens of a batch.
    pub fn tokens(self, ids: &[i64]) -> Result<TokenIds, Error> {
        TokenIds::new(ids, self.device)
    }

    /// As many sets of operands as it takes where a call moves so many bytes; `make` gets the
    /// number of a set.
    pub fn sets<T>(
        self,
        bytes: f64,
        make: impl FnMut(usize) -> Result<T, Error>,
    ) -> Result<Sets<T>, Error> {
        let count = (self.rotated_bytes / bytes).ceil().clamp(1.0, MOST_SETS) as usize;
        let sets = (0..count).map(make).collect::<Result<_, _>>()?;
        Ok(Sets { sets, at: 0 })
    }
}

/// Sets of operands that calls take in turns.
pub struct Sets<T> {
    sets: Vec<T>,
    at: usize,
}

impl<T> Sets<T> {
    /// The set of this call.
    pub fn advance(&mut self) -> &mut T {
        self.at = (self.at + 1) % self.sets.len();
        &mut self.sets[self.at]
    }
}

/// Names the benchmark in an error of libtorch.
pub fn torch(source: TchError) -> Error {
    Error::Torch {
        op: "operands of the benchmark",
        source,
    }
}
