//! What a run is going to do, before it does any of it.
//!
//! Everything in this room is a pure function of the configuration and the number of ranks: which
//! ranks form which groups ([`Mesh`]), what each holds whole and what as slices ([`Layout`]), how the
//! parameters lie in memory ([`Units`]), which rank owns which slice of them ([`ShardMap`]), and the
//! step as a list of actions ([`Action`]) that one interpreter walks. Nothing here starts a rank, opens a file or touches a tensor, so a plan can
//! be printed, compared and tested for any number of ranks on any machine.

mod action;
mod layout;
mod memory;
mod mesh;
mod offload;
mod shards;
mod staging;
mod step;
#[cfg(test)]
mod tests;
mod traffic;
mod units;

pub use action::{Action, Exchange, Role};
pub use layout::{Holding, Layout};
pub use memory::{ElementBytes, Home, StateBytes, state_bytes};
pub use mesh::Mesh;
pub use offload::{passing_bytes, portion_len, portions};
pub use shards::{GRANULE, Piece, Shard, ShardMap};
pub use staging::{share, staging_bytes};
pub use step::{StepShape, emit_evaluation, emit_opening, emit_step};
pub use traffic::{StepTraffic, WireBytes, step_traffic};
pub use units::{
    ALIGNMENT, BufferKind, Init, Layer, Matrix, Part, Placement, TensorSpec, Unit, Units,
};
