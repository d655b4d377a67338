//! What a run records: steps, events, curves.
