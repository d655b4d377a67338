//! A hash of a tensor's bits, to tell whether two ranks hold the same values.

use half::bf16;
use tch::{Device, Kind, Tensor};
use xxhash_rust::xxh3::Xxh3Default;

use crate::Error;
use crate::error::torch;
use crate::sys::operands::{Operands, sizes};

const OP: &str = "fingerprint";

/// Hashes flat tensors one after the other (XXH3, 64 bits). Tensors of the same bits in the same
/// order give the same number; values that are equal but not identical (0 and −0) do not.
#[derive(Default)]
pub struct Fingerprint(Xxh3Default);

impl Fingerprint {
    /// Adds the elements of `x: [n]`, fp32 or bf16; those on a GPU are fetched, which waits for it.
    ///
    /// # Errors
    /// The argument errors of [`Error`].
    pub fn update(&mut self, x: &Tensor) -> Result<(), Error> {
        let [n] = sizes(OP, "x", x)?;
        let x = &x.f_to_device(Device::Cpu).map_err(torch(OP))?;
        let mut operands = Operands::new(OP);
        match x.kind() {
            Kind::BFloat16 => {
                let x = operands.read::<bf16>("x", x, &[n])?;
                self.0.update(bytemuck::cast_slice(x));
            }
            _ => {
                let x = operands.read::<f32>("x", x, &[n])?;
                self.0.update(bytemuck::cast_slice(x));
            }
        }
        Ok(())
    }

    /// The hash of everything so far.
    pub fn finish(&self) -> u64 {
        self.0.digest()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use tch::Device;

    use super::*;

    fn of(tensors: &[&Tensor]) -> u64 {
        let mut fingerprint = Fingerprint::default();
        for tensor in tensors {
            fingerprint.update(tensor).unwrap();
        }
        fingerprint.finish()
    }

    #[test]
    fn one_bit_makes_the_difference() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let x = Tensor::arange(1000, (Kind::Float, Device::Cpu)).to_kind(kind);
            let y = x.copy();
            assert_eq!(of(&[&x]), of(&[&y]));
            assert_eq!(of(&[&x.narrow(0, 0, 10), &x.narrow(0, 10, 990)]), of(&[&x]));
            let _ = y.get(999).fill_(77.0);
            assert_ne!(of(&[&x]), of(&[&y]), "{kind:?}");
            let _ = y.narrow(0, 0, 1).fill_(-0.0);
            assert_ne!(of(&[&x.narrow(0, 0, 1)]), of(&[&y.narrow(0, 0, 1)]));
        }
    }

    #[test]
    fn other_dtypes_are_refused() {
        let error = Fingerprint::default()
            .update(&Tensor::zeros([4], (Kind::Int64, Device::Cpu)))
            .unwrap_err();
        assert!(error.to_string().contains("fingerprint"), "{error}");
    }
}
