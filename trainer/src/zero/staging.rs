//! The state of a rank on its way to a checkpoint: copied to host memory, so that training goes on
//! while it is written.
//!
//! Of everything that several ranks hold, each saves an equal share: a range of the owned state of
//! every unit. Shares are cut from whole buffers and not tensor by tensor, so that staging is a few
//! large copies.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::{
    CommClock, StateKind, Zero, ZeroError,
    buffer::slice_of,
    transfer::overlap,
    unit::{UnitState, torch_error},
};
use crate::plan::{BufferKind, share};

/// A run of elements of one tensor's state in a rank's share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StagedPiece {
    /// Canonical name.
    pub tensor: String,
    /// Shape of the whole tensor.
    pub shape: Vec<usize>,
    /// Which state.
    pub state: StateKind,
    /// Row-major elements of the whole tensor.
    pub range: Range<usize>,
    /// Where their values lie in the staged unit, in elements.
    pub at: Range<usize>,
}

/// Host memory for staged state, fp32, allocated once and used for every save.
///
/// Its pages are touched when it is made: a copy into fresh memory takes several times as long.
#[derive(Debug)]
pub struct Staging {
    buffer: Tensor,
    units: Vec<StagedUnit>,
}

/// A unit's share and where it lies in the buffer.
#[derive(Debug)]
struct StagedUnit {
    index: usize,
    at: Range<usize>,
    pieces: Vec<StagedPiece>,
}

impl Staging {
    /// Bytes of the buffer.
    pub fn bytes(&self) -> usize {
        self.buffer.numel() * size_of::<f32>()
    }

    /// All pieces, in the order in which [`Staging::write`] hands out their values.
    pub fn pieces(&self) -> impl Iterator<Item = &StagedPiece> {
        self.units.iter().flat_map(|unit| &unit.pieces)
    }

    /// Hands out the values of all pieces in order, some at a time.
    ///
    /// # Errors
    /// What `write` says; a failing copy.
    pub fn write<E>(&self, mut write: impl FnMut(&[f32]) -> Result<(), E>) -> Result<(), E>
    where
        E: From<ZeroError>,
    {
        let mut values = Vec::new();
        for unit in &self.units {
            for piece in &unit.pieces {
                let from = unit.at.start + piece.at.start;
                for start in (0..piece.at.len()).step_by(CHUNK) {
                    let length = CHUNK.min(piece.at.len() - start);
                    let range = from + start..from + start + length;
                    values.resize(length, 0.0);
                    slice_of(&self.buffer, &range)
                        .and_then(|slice| slice.f_copy_data(&mut values, length))
                        .map_err(torch_error(&piece.tensor))?;
                    write(&values)?;
                }
            }
        }
        Ok(())
    }
}

/// Elements that are handed out at a time: they stay in a second-level cache while they are hashed
/// and written.
const CHUNK: usize = 1 << 18;

impl Zero {
    /// The number of units.
    pub fn units(&self) -> usize {
        self.units.len()
    }

    /// This rank's share of the state of some units, in the order of [`Staging::write`].
    pub fn pieces(&self, of: Range<usize>) -> Vec<StagedPiece> {
        let of_unit = |index| self.shares(index).pieces(&self.units[index]);
        of.flat_map(of_unit).collect()
    }

    /// Allocates memory for this rank's share of the state of some units; for all of them it is at
    /// most [`crate::plan::staging_bytes`].
    ///
    /// # Errors
    /// When there is not that much.
    pub fn staging(&self, of: Range<usize>) -> Result<Staging, ZeroError> {
        let mut units = Vec::with_capacity(of.len());
        let mut end = 0;
        for index in of {
            let shares = self.shares(index);
            let unit = &self.units[index];
            let length = shares.elements();
            units.push(StagedUnit {
                index,
                at: end..end + length,
                pieces: shares.pieces(unit),
            });
            end += length;
        }
        // Zeros are written, so every page is there afterwards.
        let buffer = Tensor::f_zeros([end as i64], (Kind::Float, Device::Cpu))
            .map_err(torch_error("the staging buffer"))?;
        Ok(Staging { buffer, units })
    }

    /// Copies this rank's share of the units, and nothing else: this is the time for which a save
    /// holds up the step loop.
    ///
    /// # Errors
    /// When libtorch fails to copy.
    pub fn stage(&mut self, staging: &mut Staging) -> Result<(), ZeroError> {
        self.rest()?;
        for staged in &staging.units {
            let shares = self.shares(staged.index);
            let unit = &mut self.units[staged.index];
            let mut start = staged.at.start;
            let sources = unit.saved(&shares, &mut self.clock)?;
            for source in sources {
                let end = start + source.numel();
                slice_of(&staging.buffer, &(start..end))
                    .and_then(|mut target| target.f_copy_(&source))
                    .map_err(torch_error(&unit.name))?;
                start = end;
            }
        }
        Ok(())
    }

    /// What of a unit this rank saves: ranks that hold the same divide it equally.
    fn shares(&self, unit: usize) -> Shares {
        let (shard, replica) = (&self.groups.shard, &self.groups.replica);
        let state = &self.units[unit];
        let owned = state.master.numel();
        // Frozen tensors that nobody has split are held by every rank.
        let (index, copies) = if state.frozen.sliced() {
            (replica.index(), replica.size())
        } else {
            (
                replica.index() * shard.size() + shard.index(),
                replica.size() * shard.size(),
            )
        };
        Shares {
            owned: share(owned, replica.index(), replica.size()),
            frozen: share(state.frozen.held_len(), index, copies),
        }
    }
}

/// The ranges of a unit's state that a rank saves.
struct Shares {
    /// Of the owned master weights, and of each moment.
    owned: Range<usize>,
    /// Of the frozen tensors that are held.
    frozen: Range<usize>,
}

const STATES: [StateKind; 3] = [StateKind::Master, StateKind::ExpAvg, StateKind::ExpAvgSq];

impl Shares {
    fn elements(&self) -> usize {
        STATES.len() * self.owned.len() + self.frozen.len()
    }

    /// The runs of elements of tensors in these ranges, by place. Gaps between tensors are left out.
    fn pieces(&self, unit: &UnitState) -> Vec<StagedPiece> {
        let mut pieces = Vec::new();
        for (position, state) in STATES.into_iter().enumerate() {
            let base = position * self.owned.len();
            for (own, local) in unit.weights.owned() {
                self.cut(unit, BufferKind::Trainable, (&own, &local), |piece| {
                    pieces.push(piece.of(state, base));
                });
            }
        }
        let base = STATES.len() * self.owned.len();
        let whole = 0..unit.frozen.held_len();
        let frozen: Vec<_> = if unit.frozen.sliced() {
            unit.frozen.owned().collect()
        } else {
            vec![(whole.clone(), whole)]
        };
        for (own, local) in &frozen {
            self.cut(unit, BufferKind::Frozen, (own, local), |piece| {
                pieces.push(piece.of(StateKind::Master, base));
            });
        }
        pieces
    }

    /// Finds the tensors in one slice of a unit, `own` in the unit's buffer and `local` in what is
    /// held of it.
    fn cut(
        &self,
        unit: &UnitState,
        buffer: BufferKind,
        (own, local): (&Range<usize>, &Range<usize>),
        mut found: impl FnMut(Cut<'_>),
    ) {
        let share = match buffer {
            BufferKind::Trainable => &self.owned,
            BufferKind::Frozen => &self.frozen,
        };
        let from = local.start.max(share.start);
        let to = local.end.min(share.end);
        if from >= to {
            return;
        }
        let mine = own.start + (from - local.start)..own.start + (to - local.start);
        for part in unit.parts.iter().filter(|part| part.buffer == buffer) {
            if let Some((elements, within)) = overlap(part, &mine) {
                let at = from - share.start + within.start;
                found(Cut {
                    tensor: &part.tensor,
                    elements,
                    at,
                });
            }
        }
    }
}

/// A run of elements of a tensor at a place of a share.
struct Cut<'a> {
    tensor: &'a crate::plan::TensorSpec,
    elements: Range<usize>,
    at: usize,
}

impl Cut<'_> {
    fn of(self, state: StateKind, base: usize) -> StagedPiece {
        let at = base + self.at;
        StagedPiece {
            tensor: self.tensor.name.clone(),
            shape: self.tensor.shape.clone(),
            state,
            at: at..at + self.elements.len(),
            range: self.elements,
        }
    }
}

impl UnitState {
    /// Views of what a rank saves of this unit, in the order of its pieces.
    fn saved(&mut self, shares: &Shares, clock: &mut CommClock) -> Result<Vec<Tensor>, ZeroError> {
        let mut views = Vec::with_capacity(STATES.len() + 1);
        for tensor in [&self.master, &self.exp_avg, &self.exp_avg_sq] {
            views.push(slice_of(tensor, &shares.owned).map_err(torch_error(&self.name))?);
        }
        let frozen = self.frozen.held(clock)?;
        views.push(slice_of(&frozen, &shares.frozen).map_err(torch_error(&self.name))?);
        Ok(views)
    }
}
