//! The `oxitron` command.

fn main() {}
