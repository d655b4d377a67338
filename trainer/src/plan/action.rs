//! What a step is made of.

/// A unit's state that is exchanged between ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// In the compute dtype, frozen ones included.
    Weights,
    /// fp32, of the trainable tensors.
    Gradients,
}

/// One thing to do. Layers are those of the [`Units`](super::Units), pieces those of the
/// [`ShardMap`](super::ShardMap).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Run a layer on a micro-batch; the last layer computes the loss and the gradients of its
    /// input and of the head. Gathers of the layer's weights that are still under way are awaited
    /// here, in the other compute actions too.
    Forward {
        /// Which micro-batch of the step.
        micro_batch: usize,
        /// Index of the layer.
        layer: usize,
    },
    /// Run the last layer for its loss alone.
    Evaluate {
        /// Which micro-batch.
        micro_batch: usize,
    },
    /// Run again what of a block's forward its backward needs and the block has not kept.
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
    /// Something between ranks.
    Exchange(Exchange),
    /// Wait for a piece's gradient and add its slice's share to the gradient norm.
    Norm {
        /// Index of the piece.
        piece: usize,
    },
    /// Agree on loss, norm and requests over all ranks; decide to clip or to skip.
    Control,
    /// Apply the optimizer to this rank's slice of a piece and clear its gradient.
    Update {
        /// Index of the piece.
        piece: usize,
    },
}

/// An action of the state that ranks share: what the collectives need, and they themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Exchange {
    /// Take a buffer for the whole of a unit's state that is otherwise held as slices. Gradients
    /// begin at zero.
    Hold {
        /// Index of the unit.
        unit: usize,
        /// Which state.
        role: Role,
    },
    /// Give that buffer back, once no collective uses it any more.
    Drop {
        /// Index of the unit.
        unit: usize,
        /// Which state.
        role: Role,
    },
    /// Start the all-gather of a piece's weights in the shard group.
    Gather {
        /// Index of the piece.
        piece: usize,
    },
    /// Start the reduce-scatter of a piece's gradient over the shard group.
    Reduce {
        /// Index of the piece.
        piece: usize,
        /// Add the sum to what earlier micro-batches have left in the slice, instead of replacing
        /// it. Only where gradients are held as slices.
        accumulate: bool,
    },
    /// Start the all-reduce of the own slice of a piece's gradient over the replica group, once
    /// its reduce-scatter is done.
    Replicate {
        /// Index of the piece.
        piece: usize,
    },
    /// Wait for the collectives on a piece that are under way.
    Await {
        /// Index of the piece.
        piece: usize,
        /// Of which state.
        role: Role,
    },
}
