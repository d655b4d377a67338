//! Bytes of state on each rank.

use std::collections::BTreeMap;

use super::action::{Action, Exchange, Role};
use super::layout::{Holding, Layout};
use super::offload::passing_bytes;
use super::shards::ShardMap;
use super::units::{BufferKind, Units};

const FP32: usize = 4;

/// What a rank holds of the model's state, in bytes. All ranks hold as much.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StateBytes {
    /// Weights in the compute dtype that last from step to step, frozen ones included.
    pub weights: usize,
    /// fp32 gradients that last from step to step.
    pub gradients: usize,
    /// fp32 master weights.
    pub master: usize,
    /// AdamW's two moments.
    pub moments: usize,
    /// Buffers for units that are whole only for a while.
    pub buffers: usize,
    /// Buffers on the device through which master weights and moments pass; 0 where these lie
    /// there themselves.
    pub passing: usize,
}

impl StateBytes {
    /// All of it.
    pub fn total(&self) -> usize {
        self.weights + self.gradients + self.master + self.moments + self.buffers + self.passing
    }

    /// What of it lies in host memory beside a GPU.
    pub fn offloaded(&self) -> usize {
        match self.passing {
            0 => 0,
            _ => self.master + self.moments,
        }
    }
}

/// Bytes of an element of the state whose dtype is a choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ElementBytes {
    /// Of a weight.
    pub weight: usize,
    /// Of a moment.
    pub moment: usize,
}

/// Where the optimizer's state lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Home {
    /// Where the model computes.
    Device,
    /// In host memory, passing through the device when it is updated.
    Host,
}

/// The state of a rank that walks `actions`, with elements of so many `bytes` and the optimizer's
/// state in its `home`.
///
/// Buffers that are held for a while are kept and used again by units of the same size, so each
/// size counts as often as it is held at once.
pub fn state_bytes(
    units: &Units,
    map: &ShardMap,
    layout: &Layout,
    actions: &[Action],
    bytes: ElementBytes,
    home: Home,
) -> StateBytes {
    let elements = |buffer: BufferKind, holding: Holding| -> usize {
        let of_unit = |unit| match holding {
            Holding::Whole => map.padded_len(unit, buffer),
            Holding::Slices => map.owned_len(unit, buffer),
        };
        (0..units.units.len()).map(of_unit).sum()
    };
    let (trainable, frozen) = (BufferKind::Trainable, BufferKind::Frozen);
    let owned = elements(trainable, Holding::Slices);
    StateBytes {
        weights: bytes.weight
            * (elements(trainable, layout.weights) + elements(frozen, layout.weights)),
        gradients: FP32 * elements(trainable, layout.gradients),
        master: FP32 * owned,
        moments: 2 * bytes.moment * owned,
        buffers: held_bytes(map, layout, actions, bytes.weight),
        passing: match home {
            Home::Device => 0,
            Home::Host => passing_bytes(map, bytes.moment),
        },
    }
}

/// The most bytes of buffers that `actions` need, by size of buffer.
fn held_bytes(map: &ShardMap, layout: &Layout, actions: &[Action], weight_bytes: usize) -> usize {
    let sizes = |unit: usize, role: Role| match role {
        Role::Weights => vec![
            (weight_bytes, map.padded_len(unit, BufferKind::Trainable)),
            (weight_bytes, map.padded_len(unit, BufferKind::Frozen)),
        ],
        Role::Gradients => vec![(FP32, map.padded_len(unit, BufferKind::Trainable))],
    };
    // (now, most) by size
    let mut held: BTreeMap<(usize, usize), (usize, usize)> = BTreeMap::new();
    // What the list finds held when it begins is what it leaves held when it ends, so walking it
    // twice sees every moment of a run; before the first time nothing is held.
    let mut open: Vec<(usize, Role)> = Vec::new();
    for action in actions.iter().chain(actions) {
        match *action {
            Action::Exchange(Exchange::Hold { unit, role }) if !open.contains(&(unit, role)) => {
                open.push((unit, role));
                for size in sizes(unit, role) {
                    let (now, most) = held.entry(size).or_default();
                    *now += 1;
                    *most = (*most).max(*now);
                }
            }
            Action::Exchange(Exchange::Drop { unit, role }) => {
                let before = open.len();
                open.retain(|&held| held != (unit, role));
                if open.len() < before {
                    for size in sizes(unit, role) {
                        if let Some((now, _)) = held.get_mut(&size) {
                            *now -= 1;
                        }
                    }
                }
            }
            _ => {}
        }
    }
    debug_assert!(
        layout.weights == Holding::Slices || layout.gradients == Holding::Slices || held.is_empty()
    );
    held.iter()
        .map(|((bytes, elements), (_, most))| bytes * elements * most)
        .sum()
}
