//! The typed, validated configuration of a run.
