//! What the tests of several rooms share: golden references and models small enough to check.

#[path = "../../../tests/support/counter_hash.rs"]
pub mod counter_hash;
pub mod golden;
pub mod tiny;
