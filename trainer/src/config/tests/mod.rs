//! Tests of the configuration as a whole.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod damaged;
mod difference;
mod examples;
mod messages;
mod overrides;
mod parallel;
mod reference;
mod resolved;
mod schedule;
mod stages;

use std::path::Path;

use super::{Config, ConfigError};

/// A config with only what is required, on lines that tests count on.
const MINIMAL: &str = r#"[model]
preset = "tiny"

[[data.source]]
name = "web"
path = "shards/*.parquet"

[optimizer]
lr = 1e-3

[[stage]]
name = "4k"
seq_len = 4096
steps = 100
batch_tokens = 65536
"#;

fn load(text: &str) -> Result<Config, ConfigError> {
    load_with(text, &[])
}

fn load_with(text: &str, sets: &[&str]) -> Result<Config, ConfigError> {
    let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
    Config::from_text(text, "run.toml", Path::new("/home/me/configs"), &sets)
}

/// The minimal config with one piece replaced; the piece must be there.
fn minimal_with(piece: &str, other: &str) -> String {
    assert!(
        MINIMAL.contains(piece),
        "{piece:?} is not in the minimal config"
    );
    MINIMAL.replacen(piece, other, 1)
}

fn refusal(text: &str) -> String {
    load(text)
        .expect_err("the config should be refused")
        .to_string()
}
