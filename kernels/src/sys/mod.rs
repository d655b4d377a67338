//! Where the crate touches the operating system, OpenMP and raw memory.
//!
//! * [`parallel`]: a fixed-partition parallel loop on the very threads that libtorch computes with;
//! * [`split`]: how one mutable buffer becomes disjoint parts for such a loop, so that kernels
//!   themselves need no `unsafe`;
//! * [`operands`]: tensors become slices here, after their device, dtype, shape, layout and overlap
//!   have been checked;
//! * `scratch`: one buffer cut into typed areas by a plan that needs no memory;
//! * [`caches`]: how large they are;
//! * [`stacks`]: how a thread is made to tell where it is, whatever it is doing;
//! * [`priority`]: threads that give way to those that compute;
//! * [`symbol`]: functions that a build of libtorch may or may not export.

pub mod caches;
pub mod operands;
pub mod parallel;
pub mod priority;
pub(crate) mod scratch;
pub mod split;
pub mod stacks;
pub mod symbol;
