//! Bad input: every refusal names the place and the remedy, and leaves nothing half-written.

#![allow(clippy::unwrap_used)]

#[path = "support/mod.rs"]
mod support;

use support::{Fixture, ONE_STAGE, train};

#[test]
fn a_fixture_trains() {
    let fixture = Fixture::new();
    train(&fixture.config(ONE_STAGE), &[]).done();
    assert_eq!(fixture.metrics().len(), 6);
}
