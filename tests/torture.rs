//! Runs that are killed again and again while they save.
