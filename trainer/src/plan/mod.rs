//! What a run is going to do, before it does any of it.
//!
//! Everything in this room is a pure function of the configuration and the number of ranks: which
//! ranks form which groups ([`Mesh`]), how the parameters lie in memory ([`Units`]), which rank
//! owns which slice of them ([`ShardMap`]), and the step as a list of actions ([`Action`]) that one
//! interpreter walks. Nothing here starts a rank, opens a file or touches a tensor, so a plan can
//! be printed, compared and tested for any number of ranks on any machine.

mod mesh;
mod shards;
mod step;
mod units;

pub use mesh::Mesh;
pub use shards::{GRANULE, Shard, ShardMap};
pub use step::{Action, StepShape, emit_step};
pub use units::{
    ALIGNMENT, BufferKind, Init, Layer, Matrix, Part, Placement, TensorSpec, Unit, Units,
};
