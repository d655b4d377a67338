//! A training step as a list of actions.
//!
//! The list is the schedule: the interpreter (`run::step`) walks it in order and knows nothing of
//! ZeRO, accumulation or overlap. Another mode is another list. Every rank walks the same list, so
//! collectives meet in the same order everywhere.
//!
//! ```text
//! micro-batch   Forward 0 … L-1 ▶ ◀ Backward L-1 … 0     Reduce as soon as a gradient is complete
//! norm          every piece, in the order of its reduction
//! Control
//! update        every piece, in the order of the next forward, followed by its Gather
//! ```
//!
//! Where weights are held as slices, a unit is gathered `prefetch_units` layers before its use and
//! dropped after it, unless it is used again that soon. The weights that a list needs first are
//! held and on their way when it begins ([`emit_opening`]), and it leaves those of the next list in
//! the same state: the gathers at the seam run behind the optimizer.

use std::collections::VecDeque;
use std::ops::Range;

use super::action::{Action, Exchange, Role};
use super::layout::{Holding, Layout};
use super::shards::ShardMap;
use super::units::{BufferKind, Units};
use crate::config::Recompute;

/// What a step consists of, apart from the model and the layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepShape {
    /// Micro-batches per rank and step.
    pub accumulation: usize,
    /// Whether each collective runs behind compute. Without overlap the same collectives run at
    /// the same places and are waited for at once.
    pub overlap: bool,
    /// What blocks do not keep, and compute again in the backward pass.
    pub recompute: Recompute,
    /// Layers ahead of the one that computes whose sliced weights are being gathered, and units
    /// behind it whose gradients may still be on their way into slices.
    pub prefetch_units: usize,
}

/// The actions of a training step.
pub fn emit_step(units: &Units, map: &ShardMap, layout: &Layout, shape: StepShape) -> Vec<Action> {
    let mut emitter = Emitter::new(units, map, layout, shape);
    let stops = training_stops(units, shape);
    emitter.walk(&stops);
    emitter.finish_gradients();
    emitter.actions.push(Action::Control);
    emitter.updates();
    emitter.actions
}

/// The actions that measure the loss of one micro-batch.
pub fn emit_evaluation(
    units: &Units,
    map: &ShardMap,
    layout: &Layout,
    shape: StepShape,
) -> Vec<Action> {
    let mut emitter = Emitter::new(units, map, layout, shape);
    let last = units.layers.len() - 1;
    let mut stops: Vec<Stop> = (0..last).map(|layer| forward_stop(0, layer)).collect();
    stops.push(Stop {
        layer: last,
        computes: vec![Action::Evaluate { micro_batch: 0 }],
    });
    emitter.walk(&stops);
    emitter.open();
    emitter.actions
}

/// What must be under way before the first list of a run: the gathers of the weights that the
/// forward pass uses first, or of all where every rank holds them whole.
pub fn emit_opening(
    units: &Units,
    map: &ShardMap,
    layout: &Layout,
    shape: StepShape,
) -> Vec<Action> {
    let mut emitter = Emitter::new(units, map, layout, shape);
    match layout.weights {
        Holding::Slices => emitter.open(),
        Holding::Whole => {
            for unit in 0..units.units.len() {
                emitter.gather(map.pieces_of(unit, BufferKind::Trainable));
            }
        }
    }
    emitter.actions
}

/// What happens at one layer before the next layer is turned to.
struct Stop {
    layer: usize,
    computes: Vec<Action>,
}

fn forward_stop(micro_batch: usize, layer: usize) -> Stop {
    Stop {
        layer,
        computes: vec![Action::Forward { micro_batch, layer }],
    }
}

fn training_stops(units: &Units, shape: StepShape) -> Vec<Stop> {
    let last = units.layers.len() - 1;
    let lowest = units.lowest_trainable_layer().unwrap_or(last + 1);
    let mut stops = Vec::new();
    for micro_batch in 0..shape.accumulation {
        stops.extend((0..last).map(|layer| forward_stop(micro_batch, layer)));
        // The last layer turns around on the spot.
        let mut turn = forward_stop(micro_batch, last);
        if lowest <= last {
            turn.computes.push(Action::Backward {
                micro_batch,
                layer: last,
            });
        }
        stops.push(turn);
        for layer in (lowest..last).rev() {
            let mut computes = vec![Action::Backward { micro_batch, layer }];
            // The embedding saves nothing; nothing has run since the last block's forward but the
            // head, so what blocks share is still its own.
            if shape.recompute != Recompute::None && layer != 0 && layer + 1 != last {
                computes.insert(0, Action::Recompute { micro_batch, layer });
            }
            stops.push(Stop { layer, computes });
        }
    }
    stops
}

struct Emitter<'a> {
    units: &'a Units,
    map: &'a ShardMap,
    layout: &'a Layout,
    shape: StepShape,
    actions: Vec<Action>,
    /// Units whose sliced weights are held whole at the moment.
    weights_held: Vec<bool>,
    /// Units whose sliced gradients are held whole and still grow.
    gradients_held: Vec<bool>,
    /// Units whose gradients are on their way into slices, the oldest first.
    reducing: VecDeque<usize>,
    /// Pieces in the order of their last reduction.
    reduced: Vec<usize>,
}

impl<'a> Emitter<'a> {
    fn new(units: &'a Units, map: &'a ShardMap, layout: &'a Layout, shape: StepShape) -> Self {
        let mut emitter = Self {
            units,
            map,
            layout,
            shape,
            actions: Vec::new(),
            weights_held: vec![false; units.units.len()],
            gradients_held: vec![false; units.units.len()],
            reducing: VecDeque::new(),
            reduced: Vec::new(),
        };
        if layout.weights == Holding::Slices {
            for unit in emitter.opening_units() {
                emitter.weights_held[unit] = true;
            }
        }
        emitter
    }

    /// Emits the computation of `stops` with what has to surround it.
    fn walk(&mut self, stops: &[Stop]) {
        let prefetch = self.shape.prefetch_units;
        for (index, stop) in stops.iter().enumerate() {
            let window = &stops[index..stops.len().min(index + prefetch + 1)];
            self.hold_weights(window);
            for &compute in &stop.computes {
                self.hold_gradients(compute);
                self.actions.push(compute);
                if let Action::Backward { micro_batch, layer } = compute {
                    self.reduce_complete(micro_batch, layer);
                }
            }
            let next = index + 1;
            let soon = &stops[next..stops.len().min(next + prefetch + 1)];
            self.drop_weights(stop.layer, soon);
        }
    }

    /// Gathers what the layers of `window` use and is not there.
    fn hold_weights(&mut self, window: &[Stop]) {
        if self.layout.weights == Holding::Whole {
            return;
        }
        for stop in window {
            for &unit in &self.units.layers[stop.layer].units {
                self.hold_weights_of(unit);
            }
        }
    }

    fn hold_weights_of(&mut self, unit: usize) {
        if std::mem::replace(&mut self.weights_held[unit], true) {
            return;
        }
        let role = Role::Weights;
        self.exchange(Exchange::Hold { unit, role });
        for buffer in [BufferKind::Trainable, BufferKind::Frozen] {
            self.gather(self.map.pieces_of(unit, buffer));
        }
    }

    /// Drops the weights of `layer` unless a layer of `soon` uses them again.
    fn drop_weights(&mut self, layer: usize, soon: &[Stop]) {
        if self.layout.weights == Holding::Whole {
            return;
        }
        for &unit in &self.units.layers[layer].units {
            let uses = |stop: &Stop| self.units.layers[stop.layer].units.contains(&unit);
            if self.weights_held[unit] && !soon.iter().any(uses) {
                self.weights_held[unit] = false;
                let role = Role::Weights;
                self.exchange(Exchange::Drop { unit, role });
            }
        }
    }

    /// Makes room for the gradients that `compute` writes.
    fn hold_gradients(&mut self, compute: Action) {
        if self.layout.gradients == Holding::Whole {
            return;
        }
        let last = self.units.layers.len() - 1;
        let layer = match compute {
            Action::Backward { layer, .. } => layer,
            Action::Forward { layer, .. } if layer == last => layer,
            _ => return,
        };
        let trainable = |&unit: &usize| self.units.trainable(unit);
        let writes: Vec<usize> = self.units.layers[layer]
            .units
            .iter()
            .copied()
            .filter(trainable)
            .collect();
        for unit in writes {
            if std::mem::replace(&mut self.gradients_held[unit], true) {
                continue;
            }
            // The unit's own last reduction, and all but the youngest of the others, must be over.
            while self.reducing.contains(&unit) || self.reducing.len() > self.shape.prefetch_units {
                self.drop_oldest_gradients();
            }
            let role = Role::Gradients;
            self.exchange(Exchange::Hold { unit, role });
        }
    }

    fn drop_oldest_gradients(&mut self) {
        if let Some(unit) = self.reducing.pop_front() {
            let role = Role::Gradients;
            self.exchange(Exchange::Drop { unit, role });
        }
    }

    /// Starts the reductions of the units whose gradients `layer` has completed.
    fn reduce_complete(&mut self, micro_batch: usize, layer: usize) {
        let sliced = self.layout.gradients == Holding::Slices;
        let last_micro_batch = micro_batch + 1 == self.shape.accumulation;
        if !sliced && !last_micro_batch {
            return;
        }
        for unit in 0..self.units.units.len() {
            if !self.units.trainable(unit) || self.units.first_use(unit) != layer {
                continue;
            }
            for piece in self.map.pieces_of(unit, BufferKind::Trainable) {
                let role = Role::Gradients;
                let mut started = false;
                if self.layout.mesh.shard > 1 {
                    let accumulate = sliced && micro_batch > 0;
                    self.exchange(Exchange::Reduce { piece, accumulate });
                    started = true;
                }
                if self.layout.mesh.replicate > 1 && last_micro_batch {
                    self.exchange(Exchange::Replicate { piece });
                    started = true;
                }
                if started && !self.shape.overlap {
                    self.exchange(Exchange::Await { piece, role });
                }
                if last_micro_batch {
                    self.reduced.push(piece);
                }
            }
            if sliced {
                self.gradients_held[unit] = false;
                self.reducing.push_back(unit);
                if !self.shape.overlap {
                    self.drop_oldest_gradients();
                }
            }
        }
    }

    /// Sums the norm in the order in which the reductions were started: the first to leave is the
    /// first to arrive.
    fn finish_gradients(&mut self) {
        for piece in std::mem::take(&mut self.reduced) {
            self.actions.push(Action::Norm { piece });
        }
        while !self.reducing.is_empty() {
            self.drop_oldest_gradients();
        }
    }

    /// Updates every unit in the order of the next forward pass and sends its weights on.
    fn updates(&mut self) {
        let opening = self.opening_units();
        for unit in 0..self.units.units.len() {
            let pieces = self.map.pieces_of(unit, BufferKind::Trainable);
            for piece in pieces {
                self.actions.push(Action::Update { piece });
                if self.layout.weights == Holding::Whole {
                    self.gather(piece..piece + 1);
                }
            }
            if self.layout.weights == Holding::Slices && opening.contains(&unit) {
                self.hold_weights_of(unit);
            }
        }
    }

    /// Holds what the next list uses first.
    fn open(&mut self) {
        self.weights_held.fill(false);
        if self.layout.weights == Holding::Slices {
            for unit in self.opening_units() {
                self.hold_weights_of(unit);
            }
        }
    }

    /// Units of the first layers of the forward pass, in order.
    fn opening_units(&self) -> Vec<usize> {
        let layers = &self.units.layers;
        let window = &layers[..layers.len().min(self.shape.prefetch_units + 1)];
        let mut opening: Vec<usize> = Vec::new();
        for &unit in window.iter().flat_map(|layer| &layer.units) {
            if !opening.contains(&unit) {
                opening.push(unit);
            }
        }
        opening
    }

    fn exchange(&mut self, exchange: Exchange) {
        self.actions.push(Action::Exchange(exchange));
    }

    fn gather(&mut self, pieces: Range<usize>) {
        if self.layout.mesh.shard == 1 {
            return;
        }
        for piece in pieces {
            self.exchange(Exchange::Gather { piece });
            if !self.shape.overlap {
                let role = Role::Weights;
                self.exchange(Exchange::Await { piece, role });
            }
        }
    }
}
