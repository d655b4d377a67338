//! `[parallel]`: how a step is spread over ranks.

use serde::{Deserialize, Serialize};

use super::error::{ConfigError, Problem};
use super::model::Dtype;

/// `[parallel]`: how a step is spread over ranks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParallelConfig {
    /// What is sharded: 0 nothing, 1 fp32 master weights and AdamW moments, 2 also gradients,
    /// 3 also weights.
    pub zero_stage: u8,
    /// Ranks that together hold one copy of the sharded state; [`ParallelConfig::shard_ranks`]
    /// turns it into a number.
    pub shard_size: ShardSize,
    /// Number format of gradients on the wire.
    pub grad_reduce_dtype: Dtype,
    /// Whether to communicate while computing.
    pub overlap: bool,
    /// Stages 2 and 3: units gathered ahead of their use, and units whose gradients may still be
    /// on their way while the next one computes.
    pub prefetch_units: usize,
    /// What backward computes again.
    pub recompute: Recompute,
}

impl ParallelConfig {
    /// Ranks of a shard group in a world of `world` ranks, `local_world` of them on each node. It
    /// divides `world`; with `zero_stage = 0` every rank is a shard group of its own.
    ///
    /// # Errors
    /// When `shard_size` does not divide the world; see [`ShardSize::ranks`].
    pub fn shard_ranks(&self, world: usize, local_world: usize) -> Result<usize, ConfigError> {
        match self.zero_stage {
            0 => Ok(1),
            _ => self.shard_size.ranks(world, local_world),
        }
    }
}

/// Ranks that together hold one copy of the sharded state. In TOML `"node"`, `"world"` or a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ShardSize {
    /// The ranks of a node.
    Node,
    /// All ranks.
    World,
    /// This many neighbours, at least 1.
    #[serde(untagged)]
    Ranks(usize),
}

impl ShardSize {
    /// The number of ranks of a shard group; it divides `world`.
    ///
    /// `world` is the number of all ranks, `local_world` the number on each node. That all nodes
    /// have the same number is for the caller to see to: one node does not know the others.
    ///
    /// # Errors
    /// When the groups would not be equal: [`ConfigError::Invalid`] with what was found and the
    /// sizes that would do.
    pub fn ranks(self, world: usize, local_world: usize) -> Result<usize, ConfigError> {
        let (ranks, found) = match self {
            Self::World => return Ok(world),
            Self::Node => (
                local_world,
                format!("`parallel.shard_size` is \"node\", which has {local_world} ranks here"),
            ),
            Self::Ranks(ranks) => (ranks, format!("`parallel.shard_size` is {ranks}")),
        };
        if ranks > 0 && world.is_multiple_of(ranks) {
            return Ok(ranks);
        }
        let divisors: Vec<String> = (1..=world)
            .filter(|n| world.is_multiple_of(*n))
            .map(|n| n.to_string())
            .collect();
        Err(Problem {
            message: format!("{found}; it must divide the number of all ranks ({world})"),
            place: None,
            help: format!("use one of {}, or \"world\"", divisors.join(", ")),
        }
        .into())
    }
}

/// What backward computes again instead of keeping it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// Nothing.
    None,
    /// Of each block, the attention branch up to the sum with the residual stream.
    Attention,
    /// Of each block, everything but its input.
    Full,
}

impl Recompute {
    /// From the most memory to the least.
    pub const ALL: [Self; 3] = [Self::None, Self::Attention, Self::Full];

    /// The value of `parallel.recompute`.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Attention => "attention",
            Self::Full => "full",
        }
    }
}

impl std::fmt::Display for Recompute {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
