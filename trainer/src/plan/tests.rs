//! The lists of all modes: what must hold whatever the model, the mesh and the mode.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::config::Recompute;

/// Embedding, blocks, norm and head; the head may be tied to the embedding.
fn model(blocks: usize, tied: bool, frozen: &[usize]) -> Units {
    let unit = |index: usize, len: usize| Unit {
        name: format!("unit.{index}"),
        matrices: vec![Matrix {
            tensors: vec![TensorSpec {
                name: format!("t{index}"),
                shape: vec![len],
                init: Init::Ones,
                decay: false,
                trainable: !frozen.contains(&index),
            }],
        }],
    };
    let norm = blocks + 1;
    let mut units: Vec<Unit> = vec![unit(0, 5000)];
    units.extend((1..norm).map(|block| unit(block, 1000)));
    units.push(unit(norm, 10));
    if !tied {
        units.push(unit(norm + 1, 5000));
    }
    let layer = |units: Vec<usize>| Layer {
        name: String::new(),
        units,
    };
    let head = if tied { 0 } else { norm + 1 };
    let mut layers: Vec<Layer> = (0..norm).map(|index| layer(vec![index])).collect();
    layers.push(layer(vec![norm, head]));
    Units { units, layers }
}

#[derive(Clone, Debug)]
struct Case {
    units: Units,
    map: ShardMap,
    layout: Layout,
    shape: StepShape,
}

fn cases() -> impl Strategy<Value = Case> {
    let sizes = (
        1usize..6,
        any::<bool>(),
        prop::collection::vec(0usize..8, 0..3),
    );
    let mesh = (0u8..4, 1usize..4, 1usize..4);
    let recompute = prop::sample::select(&Recompute::ALL[..]);
    let shape = (1usize..4, any::<bool>(), recompute, 0usize..4);
    (sizes, mesh, shape).prop_map(
        |((blocks, tied, frozen), (stage, shard, replicas), shape)| {
            let units = model(blocks, tied, &frozen);
            let layout = Layout::new(stage, shard * replicas, shard);
            let (accumulation, overlap, recompute, prefetch_units) = shape;
            Case {
                map: ShardMap::with_pieces_of(&units, layout.mesh.shard, 2000),
                units,
                layout,
                shape: StepShape {
                    accumulation,
                    overlap,
                    recompute,
                    prefetch_units,
                },
            }
        },
    )
}

impl Case {
    fn step(&self) -> Vec<Action> {
        emit_step(&self.units, &self.map, &self.layout, self.shape)
    }

    fn opening(&self) -> Vec<Action> {
        emit_opening(&self.units, &self.map, &self.layout, self.shape)
    }
}

/// What a rank would see that walks lists: which buffers are whole, which gradients are complete.
#[derive(Default)]
struct Walker {
    /// Buffers held, and those of them that are filled or on their way.
    weights: HashMap<usize, usize>,
    gradients: HashMap<usize, bool>,
    writes: HashMap<(usize, usize), usize>,
    reduced: HashMap<usize, usize>,
    updated: HashMap<usize, usize>,
}

impl Walker {
    fn layer_weights(&self, case: &Case, layer: usize) {
        if case.layout.weights == Holding::Whole {
            return;
        }
        for &unit in &case.units.layers[layer].units {
            let pieces = case.map.pieces_of(unit, BufferKind::Trainable).len()
                + case.map.pieces_of(unit, BufferKind::Frozen).len();
            assert_eq!(
                self.weights.get(&unit),
                Some(&pieces),
                "weights of unit {unit}"
            );
        }
    }

    fn layer_gradients(&mut self, case: &Case, micro_batch: usize, layer: usize) {
        for &unit in &case.units.layers[layer].units {
            if !case.units.trainable(unit) {
                continue;
            }
            if case.layout.gradients == Holding::Slices {
                assert_eq!(
                    self.gradients.get(&unit),
                    Some(&true),
                    "gradients of unit {unit}"
                );
            }
            *self.writes.entry((micro_batch, unit)).or_default() += 1;
        }
    }

    fn walk(&mut self, case: &Case, actions: &[Action]) {
        let last = case.units.layers.len() - 1;
        for &action in actions {
            match action {
                Action::Forward { micro_batch, layer } => {
                    self.layer_weights(case, layer);
                    if layer == last {
                        self.layer_gradients(case, micro_batch, layer);
                    }
                }
                Action::Evaluate { .. } => self.layer_weights(case, last),
                Action::Recompute { layer, .. } => self.layer_weights(case, layer),
                Action::Backward { micro_batch, layer } => {
                    self.layer_weights(case, layer);
                    self.layer_gradients(case, micro_batch, layer);
                }
                Action::Exchange(Exchange::Hold { unit, role }) => {
                    let before = match role {
                        Role::Weights => self.weights.insert(unit, 0).is_some(),
                        Role::Gradients => self.gradients.insert(unit, true).is_some(),
                    };
                    assert!(!before, "unit {unit} is held twice");
                }
                Action::Exchange(Exchange::Drop { unit, role }) => {
                    let before = match role {
                        Role::Weights => self.weights.remove(&unit).is_some(),
                        Role::Gradients => self.gradients.remove(&unit).is_some(),
                    };
                    assert!(before, "unit {unit} is dropped but not held");
                }
                Action::Exchange(Exchange::Gather { piece }) => {
                    let unit = case.map.pieces()[piece].unit;
                    if case.layout.weights == Holding::Slices {
                        *self.weights.get_mut(&unit).unwrap() += 1;
                    }
                }
                Action::Exchange(Exchange::Reduce { piece, .. }) => {
                    *self.reduced.entry(piece).or_default() += 1;
                    if case.layout.gradients == Holding::Slices {
                        let unit = case.map.pieces()[piece].unit;
                        assert!(self.gradients.contains_key(&unit));
                    }
                }
                Action::Update { piece } => *self.updated.entry(piece).or_default() += 1,
                _ => {}
            }
        }
    }
}

proptest! {
    /// Every layer finds its weights and its gradients' buffers, every gradient is reduced after
    /// its last write and updated once, and a step leaves behind what it found.
    #[test]
    fn a_step_holds_what_it_uses_and_updates_everything_once(case in cases()) {
        let mut walker = Walker::default();
        walker.walk(&case, &case.opening());
        let mut held: Vec<usize> = walker.weights.keys().copied().collect();
        held.sort_unstable();
        let evaluation = emit_evaluation(&case.units, &case.map, &case.layout, case.shape);
        for list in [case.step(), evaluation, case.step()] {
            walker.walk(&case, &list);
            let mut now: Vec<usize> = walker.weights.keys().copied().collect();
            now.sort_unstable();
            prop_assert_eq!(&now, &held);
            prop_assert!(walker.gradients.is_empty());
        }
        let sliced = case.layout.gradients == Holding::Slices;
        for (index, piece) in case.map.pieces().iter().enumerate() {
            let trainable = piece.buffer == BufferKind::Trainable;
            let steps = if trainable { 2 } else { 0 };
            prop_assert_eq!(walker.updated.get(&index).copied().unwrap_or(0), steps);
            let per_step = if sliced { case.shape.accumulation } else { 1 };
            let reduces = if case.layout.mesh.shard > 1 { steps * per_step } else { 0 };
            prop_assert_eq!(walker.reduced.get(&index).copied().unwrap_or(0), reduces);
        }
    }

    /// A gradient leaves after its last write, and immediately: nothing is computed in between.
    #[test]
    fn a_gradient_leaves_right_after_its_last_write(case in cases()) {
        let actions = case.step();
        for (index, action) in actions.iter().enumerate() {
            let Action::Exchange(Exchange::Reduce { piece, .. }) = *action else { continue };
            let unit = case.map.pieces()[piece].unit;
            let compute = actions[..index].iter().rev().find_map(|action| match *action {
                Action::Backward { layer, .. } => Some(layer),
                Action::Forward { .. } | Action::Recompute { .. } => Some(usize::MAX),
                _ => None,
            });
            prop_assert_eq!(compute, Some(case.units.first_use(unit)));
        }
    }

    /// What blocks do not keep they share: a block finds its own in its backward pass, and nothing
    /// is computed again that is still there.
    #[test]
    fn a_block_is_computed_again_exactly_where_another_has_run_since(case in cases()) {
        let last = case.units.layers.len() - 1;
        let again = case.shape.recompute != Recompute::None;
        let mut there = None;
        for action in case.step() {
            match action {
                Action::Forward { micro_batch, layer } if layer != 0 && layer != last => {
                    there = Some((micro_batch, layer));
                }
                Action::Recompute { micro_batch, layer } => {
                    prop_assert!(again && there != Some((micro_batch, layer)));
                    there = Some((micro_batch, layer));
                }
                Action::Backward { micro_batch, layer } if layer != 0 && layer != last => {
                    prop_assert!(!again || there == Some((micro_batch, layer)));
                }
                _ => {}
            }
        }
    }

    /// Overlap moves waits, not work: the collectives are the same, at the same places.
    #[test]
    fn without_overlap_every_collective_is_awaited_where_it_starts(case in cases()) {
        let serial = Case {
            shape: StepShape { overlap: false, ..case.shape },
            ..case.clone()
        };
        let overlapped = Case {
            shape: StepShape { overlap: true, ..case.shape },
            ..case
        };
        let essence = |case: &Case| -> Vec<Action> {
            let kept = |action: &Action| !matches!(
                action,
                Action::Exchange(Exchange::Await { .. } | Exchange::Drop { .. })
            );
            case.step().into_iter().filter(kept).collect()
        };
        prop_assert_eq!(essence(&overlapped), essence(&serial));
        let actions = serial.step();
        for (index, action) in actions.iter().enumerate() {
            let Action::Exchange(exchange) = *action else { continue };
            let awaited = |piece, role| Action::Exchange(Exchange::Await { piece, role });
            match exchange {
                Exchange::Gather { piece } => {
                    prop_assert_eq!(actions[index + 1], awaited(piece, Role::Weights));
                }
                Exchange::Reduce { piece, .. } => {
                    let replicate = Action::Exchange(Exchange::Replicate { piece });
                    let next = index + 1 + usize::from(actions[index + 1] == replicate);
                    prop_assert_eq!(actions[next], awaited(piece, Role::Gradients));
                }
                _ => {}
            }
        }
    }

    /// The bytes of a step are those of the formula in the docs, up to padding.
    #[test]
    fn a_step_sends_what_the_formula_says(case in cases()) {
        let wire = WireBytes { weight: 2, gradient: 2 };
        let traffic = step_traffic(&case.map, &case.layout, &case.step(), wire);
        let trainable: usize = (0..case.units.units.len())
            .map(|unit| case.map.padded_len(unit, BufferKind::Trainable))
            .sum();
        let (s, r) = (case.layout.mesh.shard, case.layout.mesh.replicate);
        let sliced = case.layout.gradients == Holding::Slices;
        let a = if sliced { case.shape.accumulation } else { 1 };
        prop_assert_eq!(traffic.reduce, trainable / s * (s - 1) * a * 2);
        if case.layout.weights == Holding::Whole {
            prop_assert_eq!(traffic.gather, trainable / s * (s - 1) * 2);
        } else {
            // At most for each use in each micro-batch: a tied matrix has three, forward at the
            // embedding, at the turn, backward at the embedding; others have two.
            let most: usize = (0..case.units.units.len())
                .map(|unit| {
                    let uses = case.units.layers.iter().filter(|layer| layer.units.contains(&unit));
                    let whole = case.map.padded_len(unit, BufferKind::Trainable)
                        + case.map.padded_len(unit, BufferKind::Frozen);
                    whole * (uses.count() + 1)
                })
                .sum();
            prop_assert!(traffic.gather <= most / s * (s - 1) * 2 * case.shape.accumulation);
        }
        let replicate = 2.0 * (r - 1) as f64 / r as f64 * (trainable / s) as f64 * 2.0;
        prop_assert!((traffic.replicate as f64 - replicate).abs() <= 4.0 * case.map.pieces().len() as f64);
        prop_assert!(traffic.floor_reduce <= traffic.reduce);
        prop_assert!(traffic.floor_replicate <= traffic.replicate);
    }
}

#[test]
fn a_tied_unit_is_reduced_after_its_last_gradient() {
    let units = model(2, true, &[]);
    let layout = Layout::new(1, 2, 2);
    let map = ShardMap::new(&units, 2);
    let shape = StepShape {
        accumulation: 2,
        overlap: true,
        recompute: Recompute::None,
        prefetch_units: 1,
    };
    let actions = emit_step(&units, &map, &layout, shape);
    let position = |wanted: Action| actions.iter().position(|&action| action == wanted).unwrap();
    let layer_0 = position(Action::Backward {
        micro_batch: 1,
        layer: 0,
    });
    let piece = map.pieces_of(0, BufferKind::Trainable).start;
    let reduce = Action::Exchange(Exchange::Reduce {
        piece,
        accumulate: false,
    });
    assert_eq!(position(reduce), layer_0 + 1);
}

#[test]
fn backward_stops_above_frozen_layers() {
    let units = model(2, false, &[0, 1]);
    let layout = Layout::solo();
    let shape = StepShape {
        accumulation: 1,
        overlap: true,
        recompute: Recompute::None,
        prefetch_units: 1,
    };
    let actions = emit_step(&units, &ShardMap::new(&units, 1), &layout, shape);
    let lowest = actions.iter().filter_map(|action| match action {
        Action::Backward { layer, .. } => Some(*layer),
        _ => None,
    });
    assert_eq!(lowest.min(), Some(2));
}

#[test]
fn sliced_state_shrinks_with_the_group_and_buffers_with_the_prefetch() {
    let units = model(6, false, &[]);
    let bytes = |stage: u8, shard: usize, prefetch_units: usize| {
        let layout = Layout::new(stage, shard, shard);
        let map = ShardMap::new(&units, layout.mesh.shard);
        let shape = StepShape {
            accumulation: 1,
            overlap: true,
            recompute: Recompute::None,
            prefetch_units,
        };
        let actions = emit_step(&units, &map, &layout, shape);
        let (weight, moment) = (2, 4);
        state_bytes(
            &units,
            &map,
            &layout,
            &actions,
            ElementBytes { weight, moment },
            Home::Device,
        )
    };
    let whole = bytes(0, 4, 1);
    assert_eq!((whole.buffers, whole.moments), (0, 2 * whole.master));
    assert_eq!(
        (whole.gradients, whole.weights),
        (whole.master, whole.master / 2)
    );
    let (one, two, three) = (bytes(1, 4, 1), bytes(2, 4, 1), bytes(3, 4, 1));
    assert!(one.master < whole.master / 3 && one.gradients >= whole.gradients);
    assert!(two.gradients < whole.gradients / 3 && two.weights >= whole.weights);
    assert!(three.weights < whole.weights / 3);
    assert!(two.buffers > 0 && three.buffers > two.buffers);
    assert!(bytes(3, 4, 3).buffers > three.buffers);
}
