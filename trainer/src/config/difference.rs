//! What changed between the configuration a run began with and the one it is resumed with.

use std::collections::BTreeMap;

use toml::Value;

use super::error::ConfigError;
use super::root::Config;
use super::schema::join;

/// A key that differs and changes the result of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Path of the key, `stage.1.batch_tokens`.
    pub key: String,
    /// The value the run began with, as TOML; `None` where the key was absent.
    pub old: Option<String>,
    /// The value asked for now.
    pub new: Option<String>,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = |value: &Option<String>| value.clone().unwrap_or_else(|| "absent".to_owned());
        write!(f, "{}: {} → {}", self.key, text(&self.old), text(&self.new))
    }
}

/// Keys that do not change the result, by path without positions. A name that ends in `.` stands
/// for a whole section.
///
/// Paths of data are here because the dataset lock tells whether the contents changed, and
/// `init_from` because an existing run does not read it again. All of `[guard]` is here although
/// `skip_samples` and the policy for spikes do change the result: leaving out a bad stretch is what
/// a run is stopped and resumed for, and the checkpoint records what was left out.
const FREE: &[&str] = &[
    "run.name",
    "run.dir",
    "run.device",
    "run.deterministic",
    "run.threads",
    "run.peak_tflops",
    "run.trace_steps",
    "run.time_limit",
    "model.preset",
    "model.init_from",
    // Stages hold the value that counts.
    "model.rope_base",
    "parallel.",
    "data.tokenizer",
    "data.lock",
    "data.source.path",
    "data.source.weight",
    "validation.every_steps",
    "optimizer.lr",
    "optimizer.offload",
    "optimizer.warmup_steps",
    "optimizer.schedule",
    "optimizer.min_lr_ratio",
    "optimizer.decay_steps",
    "optimizer.decay_shape",
    "checkpoint.",
    "guard.",
    "stage.micro_batch",
];

impl Config {
    /// The keys in which `other` (the configuration asked for now) differs from `self` (the one
    /// the run began with) and that change the result of the stages up to `current_stage`
    /// (counted from 0), in the order of their paths.
    ///
    /// Stages after the current one may change, come and go. A `dtype` of `auto` on either side
    /// equals whatever the other side has, because a recorded choice is kept on resume.
    ///
    /// # Errors
    /// When a configuration cannot be written as TOML (a path is not UTF-8).
    pub fn result_affecting_difference(
        &self,
        other: &Self,
        current_stage: usize,
    ) -> Result<Vec<Difference>, ConfigError> {
        let old = self.result_affecting_keys(current_stage)?;
        let new = other.result_affecting_keys(current_stage)?;
        let mut differences = Vec::new();
        let mut keys: Vec<&String> = old.keys().chain(new.keys()).collect();
        keys.sort();
        keys.dedup();
        for key in keys {
            let (before, after) = (old.get(key), new.get(key));
            let auto = |value: Option<&Value>| value.and_then(Value::as_str) == Some("auto");
            let undecided = key == "model.dtype" && (auto(before) || auto(after));
            if before != after && !undecided {
                differences.push(Difference {
                    key: key.clone(),
                    old: before.map(Value::to_string),
                    new: after.map(Value::to_string),
                });
            }
        }
        Ok(differences)
    }

    fn result_affecting_keys(
        &self,
        current_stage: usize,
    ) -> Result<BTreeMap<String, Value>, ConfigError> {
        let mut begun = self.clone();
        begun.stages.truncate(current_stage.saturating_add(1));
        let tree = begun.to_toml_value()?;
        let mut leaves = BTreeMap::new();
        collect("", "", &tree, &mut leaves);
        Ok(leaves)
    }
}

/// Collects the leaves that are not free. `path` has positions in it, `name` has none.
fn collect(path: &str, name: &str, value: &Value, leaves: &mut BTreeMap<String, Value>) {
    match value {
        Value::Table(table) => {
            for (key, value) in table {
                collect(&join(path, key), &join(name, key), value, leaves);
            }
        }
        Value::Array(list) if list.iter().any(Value::is_table) => {
            for (index, value) in list.iter().enumerate() {
                collect(&join(path, &index.to_string()), name, value, leaves);
            }
        }
        _ => {
            let free = |free: &&str| match free.strip_suffix('.') {
                Some(section) => name.split('.').next() == Some(section),
                None => name == *free,
            };
            if !FREE.iter().any(free) {
                leaves.insert(path.to_owned(), value.clone());
            }
        }
    }
}
