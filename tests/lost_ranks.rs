//! Ranks that die, hang or are cut off, and runs that go on without them.
