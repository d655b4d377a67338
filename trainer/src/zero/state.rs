//! All units of a model as a rank holds them.

use oxitron_kernels::{adamw::AdamW, norm::SumOfSquares};
use tch::{Device, Kind, Tensor};

use super::{CommClock, ZeroError, unit::UnitState};
use crate::comm::{Lane, Wire};
use crate::model::{LayerGradients, LayerWeights};
use crate::plan::{ShardMap, Units};

/// Weights, gradients and sharded optimizer state.
#[derive(Debug)]
pub struct Zero {
    pub(super) units: Vec<UnitState>,
    layers: Vec<Vec<usize>>,
    /// Position in the shard group.
    pub(super) index: usize,
    /// Members of the shard group.
    pub(super) members: usize,
    lane: Lane,
    wire: Wire,
    /// What the collectives have cost since [`Zero::take_clock`].
    pub(super) clock: CommClock,
}

impl Zero {
    /// Allocates the state of `units`, all zeros, sharded over the ranks of `lane`.
    ///
    /// `compute` is the dtype of the weights, `wire` the dtype in which gradients travel.
    ///
    /// # Errors
    /// When libtorch cannot allocate it.
    pub fn new(
        units: &Units,
        lane: Lane,
        compute: Kind,
        wire: Wire,
        device: Device,
    ) -> Result<Self, ZeroError> {
        let (index, members) = (lane.index(), lane.size());
        let map = ShardMap::equal_slices(units, members);
        let states = units.units.iter().enumerate().map(|(unit, spec)| {
            UnitState::new(
                spec,
                map.slice(unit, index),
                map.padded_len(unit),
                compute,
                device,
            )
        });
        Ok(Self {
            units: states.collect::<Result<_, _>>()?,
            layers: units
                .layers
                .iter()
                .map(|layer| layer.units.clone())
                .collect(),
            index,
            members,
            lane,
            wire,
            clock: CommClock::default(),
        })
    }

    /// Views of the weights of a layer's units, waiting for gathers that are under way.
    ///
    /// # Errors
    /// When a gather failed.
    pub fn weights(&mut self, layer: usize) -> Result<LayerWeights, ZeroError> {
        let Self {
            units,
            layers,
            clock,
            ..
        } = self;
        layers[layer]
            .iter()
            .map(|&unit| units[unit].weight_views(clock))
            .collect()
    }

    /// Views of the gradients of a layer's units.
    ///
    /// # Errors
    /// When a reduction failed.
    pub fn gradients(&mut self, layer: usize) -> Result<LayerGradients, ZeroError> {
        let Self {
            units,
            layers,
            clock,
            ..
        } = self;
        layers[layer]
            .iter()
            .map(|&unit| units[unit].gradient_views(clock))
            .collect()
    }

    /// Starts to reduce the gradient of `unit`: its slice arrives summed at the owner.
    ///
    /// # Errors
    /// When the lane refuses it or has failed.
    pub fn reduce(&mut self, unit: usize) -> Result<(), ZeroError> {
        let Self {
            units,
            lane,
            wire,
            clock,
            ..
        } = self;
        units[unit]
            .gradients
            .start(clock, |buffer| lane.reduce_scatter(buffer, *wire))
    }

    /// Starts to gather the weights of `unit` from their owners.
    ///
    /// # Errors
    /// When the lane refuses it or has failed.
    pub fn gather(&mut self, unit: usize) -> Result<(), ZeroError> {
        let Self {
            units, lane, clock, ..
        } = self;
        units[unit]
            .weights
            .start(clock, |buffer| lane.all_gather(buffer))
    }

    /// Waits for whatever of `unit` is under way.
    ///
    /// # Errors
    /// When it failed.
    pub fn settle(&mut self, unit: usize) -> Result<(), ZeroError> {
        let state = &mut self.units[unit];
        state.gradients.ready(&mut self.clock)?;
        state.weights.ready(&mut self.clock)?;
        Ok(())
    }

    /// Σ g² over this rank's slices of the reduced gradients, unscaled.
    ///
    /// # Errors
    /// When a reduction failed.
    pub fn sum_of_squares(&mut self) -> Result<SumOfSquares, ZeroError> {
        let mut total = SumOfSquares::default();
        for unit in &mut self.units {
            total += unit.sum_of_squares(&mut self.clock)?;
        }
        Ok(total)
    }

    /// Applies the optimizer to this rank's slice of `unit` and clears its gradient. Weight decay
    /// acts on the tensors that decay.
    ///
    /// # Errors
    /// When a kernel fails.
    pub fn update(&mut self, unit: usize, adamw: &AdamW) -> Result<(), ZeroError> {
        let Self { units, clock, .. } = self;
        units[unit].update(adamw, clock)?;
        units[unit].clear_gradients(clock)
    }

    /// Clears the gradient of `unit` without an update: the step is skipped.
    ///
    /// # Errors
    /// When a reduction failed.
    pub fn skip(&mut self, unit: usize) -> Result<(), ZeroError> {
        self.units[unit].clear_gradients(&mut self.clock)
    }

    /// What the collectives have cost since the last call.
    pub fn take_clock(&mut self) -> CommClock {
        std::mem::take(&mut self.clock)
    }

    /// Bytes of fp32 optimizer state (master weights and two moments) on this rank.
    pub fn optimizer_bytes(&self) -> usize {
        let bytes = |tensor: &Tensor| tensor.numel() * 4;
        let of_unit =
            |unit: &UnitState| bytes(&unit.master) + bytes(&unit.exp_avg) + bytes(&unit.exp_avg_sq);
        self.units.iter().map(of_unit).sum()
    }
}
