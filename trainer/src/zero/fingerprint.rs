//! Hashes by which ranks find out whether they still hold the same values.

use oxitron_kernels::fingerprint::Fingerprint;

use super::{
    Zero, ZeroError,
    buffer::slice_of,
    unit::{kernel_error, torch_error},
};
use crate::plan::BufferKind;

/// Hashes of what a rank holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fingerprints {
    /// Of the slices that this rank owns: master weights, and weights where they are held as
    /// slices. The same on all ranks of a replica group.
    pub owned: u64,
    /// Of the gathered weights, by the member of the shard group that owns them: the same on all
    /// ranks. Empty where weights are held as slices.
    pub gathered: Vec<u64>,
}

impl Zero {
    /// Hashes the weights, waiting for gathers that are under way.
    ///
    /// # Errors
    /// When a gather failed.
    pub fn fingerprints(&mut self) -> Result<Fingerprints, ZeroError> {
        self.rest()?;
        let mut owned = Fingerprint::default();
        let mut gathered: Vec<Fingerprint> = (0..self.map.members())
            .map(|_| Fingerprint::default())
            .collect();
        let mut sliced = false;
        for (index, unit) in self.units.iter_mut().enumerate() {
            let name = unit.name.clone();
            owned.update(&unit.master).map_err(kernel_error(&name))?;
            for kind in [BufferKind::Trainable, BufferKind::Frozen] {
                let buffer = unit.weights_buffer(kind);
                for (position, piece) in self.map.pieces_of(index, kind).enumerate() {
                    if buffer.sliced() {
                        sliced = true;
                        let own = buffer.own(position, &mut self.clock)?;
                        owned.update(&own).map_err(kernel_error(&name))?;
                        continue;
                    }
                    for (owner, fingerprint) in gathered.iter_mut().enumerate() {
                        let whole = buffer.whole(&mut self.clock)?;
                        let slice = slice_of(whole, &self.map.slice(piece, owner))
                            .map_err(torch_error(&name))?;
                        fingerprint.update(&slice).map_err(kernel_error(&name))?;
                    }
                }
            }
        }
        if sliced {
            gathered.clear();
        }
        Ok(Fingerprints {
            owned: owned.finish(),
            gathered: gathered.iter().map(Fingerprint::finish).collect(),
        })
    }
}
