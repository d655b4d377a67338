//! Steps that must not be applied, in real runs.
