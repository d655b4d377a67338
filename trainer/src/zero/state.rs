//! All units of a model as a rank holds them.

use oxitron_kernels::{Workspace, adamw::AdamW, decision::Decision};
use tch::{Device, Kind, Tensor};

use super::{
    CommClock, ZeroError,
    offload::Offload,
    pool::Pool,
    unit::{UnitState, torch_error},
};
use crate::comm::{self, Comm, Lane, Wire};
use crate::model::{LayerGradients, LayerWeights};
use crate::plan::{Exchange, Home, Layout, Mesh, Piece, Role, ShardMap, Units};

/// The lanes on which state is exchanged.
#[derive(Clone, Debug)]
pub struct Groups {
    /// The ranks that together hold one copy of the sharded state.
    pub shard: Lane,
    /// The ranks that hold the same slices.
    pub replica: Lane,
}

impl Groups {
    /// The groups of this rank. Every rank makes them at the same point of its start.
    ///
    /// # Errors
    /// When the mesh is not one of this world.
    pub fn new(comm: &Comm, mesh: &Mesh) -> Result<Self, comm::Error> {
        Ok(Self {
            shard: comm.lane(&mesh.shard_group(comm.rank()))?,
            replica: comm.lane(&mesh.replica_group(comm.rank()))?,
        })
    }
}

/// What is a choice of state: dtypes, and where the optimizer's lies.
#[derive(Clone, Copy, Debug)]
pub struct StateForm {
    /// Of the weights that layers compute with.
    pub compute: Kind,
    /// Of both moments, fp32 or bf16.
    pub moments: Kind,
    /// In which gradients travel.
    pub wire: Wire,
    /// Of master weights and moments.
    pub home: Home,
}

/// Weights, gradients and sharded optimizer state.
#[derive(Debug)]
pub struct Zero {
    pub(super) units: Vec<UnitState>,
    layers: Vec<Vec<usize>>,
    pub(super) map: ShardMap,
    pub(super) groups: Groups,
    /// The dtype in which gradients travel.
    wire: Wire,
    pool: Pool,
    /// Where master weights and moments lie in host memory.
    pub(super) offload: Option<Offload>,
    /// Scratch of the norm.
    workspace: Workspace,
    /// What the collectives have cost since it was last taken.
    pub clock: CommClock,
}

impl Zero {
    /// Allocates the state of `units`, all zeros, as `layout` and `map` spread it over `groups`.
    ///
    /// # Errors
    /// When libtorch cannot allocate it, or host memory cannot be page-locked.
    pub fn new(
        units: &Units,
        map: &ShardMap,
        layout: &Layout,
        groups: Groups,
        form: StateForm,
        device: Device,
    ) -> Result<Self, ZeroError> {
        let member = groups.shard.index();
        let (offload, mut memory) = match form.home {
            Home::Device => (None, None),
            Home::Host => {
                let (offload, memory) = Offload::new(map, form.moments, device)?;
                (Some(offload), Some(memory))
            }
        };
        let states = units.units.iter().enumerate().map(|(index, unit)| {
            let state = |kind: Kind, length: usize| match &mut memory {
                Some(memory) => memory.take(kind, length),
                None => Tensor::f_zeros([length as i64], (kind, device)),
            };
            UnitState::new((index, unit), map, layout, member, (form, device), state)
        });
        Ok(Self {
            units: states.collect::<Result<_, _>>()?,
            layers: units
                .layers
                .iter()
                .map(|layer| layer.units.clone())
                .collect(),
            map: map.clone(),
            groups,
            wire: form.wire,
            pool: Pool::new(device),
            offload,
            workspace: Workspace::new(device),
            clock: CommClock::default(),
        })
    }

    /// The state of a single rank, which holds everything; moments in fp32.
    ///
    /// # Errors
    /// When libtorch cannot allocate it.
    pub fn solo(units: &Units, compute: Kind, device: Device) -> Result<Self, ZeroError> {
        let layout = Layout::solo();
        let groups = Groups::new(&Comm::solo(), &layout.mesh)?;
        let map = ShardMap::new(units, 1);
        let form = StateForm {
            compute,
            moments: Kind::Float,
            wire: Wire::F32,
            home: Home::Device,
        };
        Self::new(units, &map, &layout, groups, form, device)
    }

    /// Views of the weights of a layer's units, waiting for gathers that are under way.
    ///
    /// # Errors
    /// When a gather failed, or the plan does not hold the weights here.
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
    /// When a reduction failed, or the plan does not hold the gradients here.
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

    /// Does what an action of the plan says.
    ///
    /// # Errors
    /// When libtorch cannot allocate a buffer, a lane has failed, or the plan asks for a buffer
    /// that it does not hold.
    pub fn exchange(&mut self, exchange: Exchange) -> Result<(), ZeroError> {
        match exchange {
            Exchange::Hold { unit, role } => self.hold(unit, role),
            Exchange::Drop { unit, role } => {
                let Self {
                    units, pool, clock, ..
                } = self;
                let mut buffers = units[unit].buffers(role).into_iter();
                buffers.try_for_each(|buffer| buffer.release(pool, clock))
            }
            Exchange::Gather { piece } => self.gather(piece),
            Exchange::Reduce { piece, accumulate } => self.reduce(piece, accumulate),
            Exchange::Replicate { piece } => self.replicate(piece),
            Exchange::Await { piece, role } => {
                let Piece { unit, position, .. } = self.map.pieces()[piece];
                let state = &mut self.units[unit];
                let buffer = match role {
                    Role::Weights => state.weights_buffer(self.map.pieces()[piece].buffer),
                    Role::Gradients => &mut state.gradients,
                };
                buffer.settle(position, &mut self.clock)
            }
        }
    }

    fn hold(&mut self, unit: usize, role: Role) -> Result<(), ZeroError> {
        let Self { units, pool, .. } = self;
        let state = &mut units[unit];
        let name = state.name.clone();
        for buffer in state.buffers(role) {
            buffer.hold(pool).map_err(torch_error(&name))?;
            if role == Role::Gradients {
                buffer.zero().map_err(torch_error(&name))?;
            }
        }
        Ok(())
    }

    fn gather(&mut self, piece: usize) -> Result<(), ZeroError> {
        let Piece {
            unit,
            position,
            buffer,
            ..
        } = self.map.pieces()[piece];
        let (state, lane) = (&mut self.units[unit], &self.groups.shard);
        let name = state.name.clone();
        let gather = |views: super::buffer::Views| {
            let super::buffer::Views {
                piece,
                mut own,
                slice,
            } = views;
            if let Some(slice) = slice {
                own.f_copy_(&slice)?;
            }
            Ok(lane.all_gather(piece))
        };
        let buffer = state.weights_buffer(buffer);
        buffer.start(position, "gather", gather, torch_error(&name))
    }

    fn reduce(&mut self, piece: usize, accumulate: bool) -> Result<(), ZeroError> {
        let Piece { unit, position, .. } = self.map.pieces()[piece];
        let (state, lane, wire) = (&mut self.units[unit], &self.groups.shard, self.wire);
        let reduce = |views: super::buffer::Views| {
            Ok(match views.slice {
                Some(slice) => lane.reduce_scatter_into(views.piece, wire, slice, accumulate),
                None => lane.reduce_scatter(views.piece, wire),
            })
        };
        let torch = torch_error(&state.name);
        state.gradients.start(position, "reduce", reduce, torch)
    }

    fn replicate(&mut self, piece: usize) -> Result<(), ZeroError> {
        let Piece { unit, position, .. } = self.map.pieces()[piece];
        let (lane, wire) = (&self.groups.replica, self.wire);
        let replicate = |own: Tensor, reduced: Option<&comm::Ticket>| match reduced {
            Some(reduced) => lane.after(reduced).all_reduce_as(own, wire),
            None => lane.all_reduce_as(own, wire),
        };
        let gradients = &mut self.units[unit].gradients;
        gradients.start_on_own(position, "replicate", replicate)
    }

    /// Whether weights are held as slices, so that no other rank of the shard group has them.
    pub fn holds_slices(&self) -> bool {
        self.units.iter().any(|unit| unit.weights.sliced())
    }

    /// Adds Σ g² over this rank's slice of a piece of the reduced gradient, unscaled, to `total[0]`,
    /// and how many elements are not finite to `total[1]`; `total: [2]` fp64. Adds nothing on ranks
    /// other than the first of each replica group, so that the sum over all ranks counts every
    /// element once.
    ///
    /// # Errors
    /// When a reduction failed, or the kernel does.
    pub fn add_sum_of_squares(
        &mut self,
        piece: usize,
        total: &mut Tensor,
    ) -> Result<(), ZeroError> {
        let Piece { unit, position, .. } = self.map.pieces()[piece];
        let Self {
            units,
            groups,
            workspace,
            clock,
            ..
        } = self;
        let state = &mut units[unit];
        if groups.replica.index() > 0 {
            return state.gradients.settle(position, clock);
        }
        state.add_sum_of_squares(position, total, workspace, clock)
    }

    /// Applies the optimizer to this rank's slice of a piece, unless the `decision` is to skip the
    /// step, and clears its gradient. Weight decay acts on the tensors that decay.
    ///
    /// # Errors
    /// When a kernel fails.
    pub fn update(
        &mut self,
        piece: usize,
        adamw: &AdamW,
        decision: &Decision,
    ) -> Result<(), ZeroError> {
        let Piece { unit, position, .. } = self.map.pieces()[piece];
        let Self {
            units,
            clock,
            offload,
            ..
        } = self;
        let state = &mut units[unit];
        state.update(position, adamw, decision, offload.as_mut(), clock)?;
        state.clear_gradients(position, clock)
    }

    /// Waits until master weights and moments are where the host may touch them.
    pub(super) fn rest(&self) -> Result<(), ZeroError> {
        self.offload.iter().try_for_each(Offload::rest)
    }
}
