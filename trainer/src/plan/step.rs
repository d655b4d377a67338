//! A training step as a list of actions.
//!
//! The list is the schedule: the interpreter (`run::step`) walks it in order and knows nothing of
//! ZeRO, accumulation or overlap. Another mode is another list. Every rank walks the same list, so
//! collectives meet in the same order everywhere.

use super::units::Units;

/// One thing to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Run a layer on a micro-batch. The weights of its units are awaited at this point if a
    /// gather is still under way.
    Forward {
        /// Which micro-batch of the step.
        micro_batch: usize,
        /// Index of the layer.
        layer: usize,
    },
    /// Run a layer's forward again to restore what its backward needs.
    Recompute {
        /// Which micro-batch of the step.
        micro_batch: usize,
        /// Index of the layer.
        layer: usize,
    },
    /// Run a layer backwards, adding to the gradients of its units.
    Backward {
        /// Which micro-batch of the step.
        micro_batch: usize,
        /// Index of the layer.
        layer: usize,
    },
    /// Start the reduce-scatter of a unit's gradient over the shard group.
    Reduce {
        /// Index of the unit.
        unit: usize,
    },
    /// Start the all-gather of a unit's weights in the shard group.
    Gather {
        /// Index of the unit.
        unit: usize,
    },
    /// Wait for the collective of a unit that is under way.
    Await {
        /// Index of the unit.
        unit: usize,
    },
    /// Agree on loss, norm and requests over all ranks; decide to clip or to skip.
    Control,
    /// Apply the optimizer to this rank's slice of a unit and clear its gradient.
    Update {
        /// Index of the unit.
        unit: usize,
    },
}

/// What a step consists of, apart from the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepShape {
    /// Micro-batches per rank and step.
    pub accumulation: usize,
    /// Whether each collective runs behind compute. Without overlap the same collectives run at
    /// the same places and are waited for at once.
    pub overlap: bool,
    /// Whether blocks keep only their input and run forward again in the backward pass.
    pub recompute: bool,
}

/// The actions of a ZeRO-1 step: optimizer state is sharded, gradients are reduced on the last
/// micro-batch as soon as they are complete, weights are gathered after their update.
pub fn emit_step(units: &Units, shape: StepShape) -> Vec<Action> {
    let mut actions = Vec::new();
    let trainable: Vec<usize> = (0..units.units.len())
        .filter(|&unit| units.trainable(unit))
        .collect();
    let lowest = units.lowest_trainable_layer().unwrap_or(units.layers.len());
    let last_layer = units.layers.len().saturating_sub(1);

    for micro_batch in 0..shape.accumulation {
        for layer in 0..units.layers.len() {
            actions.push(Action::Forward { micro_batch, layer });
        }
        for layer in (lowest..units.layers.len()).rev() {
            // The embedding saves nothing, and the last layer has just run.
            if shape.recompute && layer != 0 && layer != last_layer {
                actions.push(Action::Recompute { micro_batch, layer });
            }
            actions.push(Action::Backward { micro_batch, layer });
            if micro_batch + 1 < shape.accumulation {
                continue;
            }
            for &unit in trainable
                .iter()
                .filter(|&&unit| units.first_use(unit) == layer)
            {
                actions.push(Action::Reduce { unit });
                if !shape.overlap {
                    actions.push(Action::Await { unit });
                }
            }
        }
    }
    if shape.overlap {
        // In the order in which they were started: the first is the first to arrive.
        actions.extend(trainable.iter().rev().map(|&unit| Action::Await { unit }));
    }
    actions.push(Action::Control);
    for &unit in &trainable {
        actions.push(Action::Update { unit });
        actions.push(Action::Gather { unit });
        if !shape.overlap {
            actions.push(Action::Await { unit });
        }
    }
    actions
}

#[cfg(test)]
mod tests {
    use super::super::units::{Init, Layer, Matrix, TensorSpec, Unit};
    use super::*;

    /// Embedding, two blocks, norm; the head is tied to the embedding.
    fn tied(frozen: &[usize]) -> Units {
        let unit = |index: usize| Unit {
            name: format!("unit.{index}"),
            matrices: vec![Matrix {
                tensors: vec![TensorSpec {
                    name: format!("t{index}"),
                    shape: vec![8],
                    init: Init::Ones,
                    decay: false,
                    trainable: !frozen.contains(&index),
                }],
            }],
        };
        let layer = |units: &[usize]| Layer {
            name: String::new(),
            units: units.into(),
        };
        Units {
            units: (0..4).map(unit).collect(),
            layers: vec![layer(&[0]), layer(&[1]), layer(&[2]), layer(&[3, 0])],
        }
    }

    fn position(actions: &[Action], wanted: Action) -> usize {
        actions
            .iter()
            .position(|&action| action == wanted)
            .unwrap_or(usize::MAX)
    }

    #[test]
    fn a_tied_unit_is_reduced_after_its_last_gradient() {
        let shape = StepShape {
            accumulation: 2,
            overlap: true,
            recompute: false,
        };
        let actions = emit_step(&tied(&[]), shape);
        let reduces = actions
            .iter()
            .filter(|action| matches!(action, Action::Reduce { .. }));
        assert_eq!(reduces.count(), 4);
        let embedding_backward = position(
            &actions,
            Action::Backward {
                micro_batch: 1,
                layer: 0,
            },
        );
        assert_eq!(
            position(&actions, Action::Reduce { unit: 0 }),
            embedding_backward + 1
        );
        let norm = position(&actions, Action::Reduce { unit: 3 });
        assert_eq!(
            norm,
            position(
                &actions,
                Action::Backward {
                    micro_batch: 1,
                    layer: 3
                }
            ) + 1
        );
    }

    #[test]
    fn without_overlap_every_collective_is_awaited_where_it_starts() {
        let overlapped = StepShape {
            accumulation: 1,
            overlap: true,
            recompute: true,
        };
        let serial = StepShape {
            overlap: false,
            ..overlapped
        };
        let collectives = |shape| {
            let actions = emit_step(&tied(&[]), shape);
            let kept: Vec<Action> = actions
                .into_iter()
                .filter(|action| matches!(action, Action::Reduce { .. } | Action::Gather { .. }))
                .collect();
            kept
        };
        assert_eq!(collectives(overlapped), collectives(serial));
        let actions = emit_step(&tied(&[]), serial);
        for (index, action) in actions.iter().enumerate() {
            if let Action::Reduce { unit } | Action::Gather { unit } = *action {
                assert_eq!(actions[index + 1], Action::Await { unit });
            }
        }
    }

    #[test]
    fn backward_stops_above_frozen_layers() {
        let shape = StepShape {
            accumulation: 1,
            overlap: true,
            recompute: false,
        };
        let actions = emit_step(&tied(&[0, 1]), shape);
        assert_eq!(
            position(
                &actions,
                Action::Backward {
                    micro_batch: 0,
                    layer: 1
                }
            ),
            usize::MAX
        );
        assert_ne!(
            position(
                &actions,
                Action::Backward {
                    micro_batch: 0,
                    layer: 2
                }
            ),
            usize::MAX
        );
        assert_eq!(position(&actions, Action::Update { unit: 1 }), usize::MAX);
        assert_ne!(position(&actions, Action::Update { unit: 2 }), usize::MAX);
    }
}
