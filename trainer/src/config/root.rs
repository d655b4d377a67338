//! The whole configuration: how it is loaded and written out.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::data::DataConfig;
use super::error::{ConfigError, Problem};
use super::guard::GuardConfig;
use super::model::{Dtype, ModelConfig};
use super::optimizer::OptimizerConfig;
use super::parallel::ParallelConfig;
use super::run::{CheckpointConfig, RunConfig, ValidationConfig};
use super::source::{Layer, Sources};
use super::stage::StageConfig;
use super::{keys, overrides, resolve, schema, tree, validate};

/// A configuration in which every default is filled in and every check has passed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// `[run]`
    pub run: RunConfig,
    /// `[model]`
    pub model: ModelConfig,
    /// `[parallel]`
    pub parallel: ParallelConfig,
    /// `[data]`
    pub data: DataConfig,
    /// `[validation]`
    pub validation: ValidationConfig,
    /// `[optimizer]`
    pub optimizer: OptimizerConfig,
    /// `[checkpoint]`
    pub checkpoint: CheckpointConfig,
    /// `[guard]`
    pub guard: GuardConfig,
    /// `[[stage]]`, in order, at least one, with different names.
    #[serde(rename = "stage")]
    pub stages: Vec<StageConfig>,
}

impl Config {
    /// Reads a config file and applies `--set`s in order. Only the config file itself is read.
    ///
    /// # Errors
    /// [`ConfigError`] when the file cannot be read or anything in it is refused.
    pub fn load(path: &Path, sets: &[String]) -> Result<Self, ConfigError> {
        let unreadable = |reason| ConfigError::Read {
            path: path.to_owned(),
            reason,
        };
        let bytes = std::fs::read(path).map_err(unreadable)?;
        let folder = match path.parent() {
            Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
            Some(parent) => parent,
            None => Path::new("/"),
        };
        let folder = std::fs::canonicalize(folder).map_err(unreadable)?;
        let name = path.display().to_string();
        let text = String::from_utf8(bytes).map_err(|error| not_utf8(&name, &error))?;
        Self::from_text(&text, &name, &folder, sets)
    }

    /// What [`Config::load`] does with the text of a file. `name` is what messages call the text
    /// (and what the run is called by default), `folder` is what relative paths start from.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] when anything is refused.
    pub fn from_text(
        text: &str,
        name: &str,
        folder: &Path,
        sets: &[String],
    ) -> Result<Self, ConfigError> {
        let mut sources = Sources::default();
        let file = sources.add(name, text, Layer::File);
        let mut root = tree::parse_document(text, file, &sources)?;
        for set in sets {
            overrides::apply(&mut root, set, &mut sources)?;
        }
        schema::check(&root, keys::ROOT, &sources)?;
        resolve::resolve(&mut root, Path::new(name), folder, &mut sources)?;
        let config: Self = root
            .to_toml()
            .try_into()
            .map_err(|error: toml::de::Error| {
                let message = format!("{name}: the key table and the types disagree: {error}");
                ConfigError::from(defect(message))
            })?;
        validate::validate(&config, &root, &sources)?;
        Ok(config)
    }

    /// The configuration as TOML with every default written out and every path absolute; loading
    /// it gives an equal [`Config`]. This is what a run directory keeps.
    ///
    /// # Errors
    /// When a path is not UTF-8.
    pub fn resolved_toml(&self) -> Result<String, ConfigError> {
        toml::to_string(self).map_err(|error| {
            defect(format!(
                "the resolved config cannot be written as TOML: {error}"
            ))
            .into()
        })
    }

    /// The same as a TOML tree.
    pub(super) fn to_toml_value(&self) -> Result<toml::Value, ConfigError> {
        toml::Value::try_from(self).map_err(|error| {
            defect(format!(
                "the resolved config cannot be written as TOML: {error}"
            ))
            .into()
        })
    }

    /// Writes the number format that was chosen for `dtype = "auto"` into the configuration, so
    /// that [`Config::resolved_toml`] records it.
    pub fn record_dtype(&mut self, dtype: Dtype) {
        self.model.dtype = dtype.into();
    }

    /// The mixture of a stage: one share per source, in the order of `data.sources`.
    pub fn source_weights(&self, stage: &StageConfig) -> Vec<f64> {
        let share = |name: &String| stage.weights.get(name).copied().unwrap_or(0.0);
        self.data
            .sources
            .iter()
            .map(|source| share(&source.name))
            .collect()
    }

    /// Where the resolved configuration of the run is kept.
    pub fn resolved_path(&self) -> PathBuf {
        self.run.dir.join("config.toml")
    }
}

fn defect(message: String) -> Problem {
    let help = "this is a defect of Oxitron; please report it together with the config";
    Problem {
        message,
        place: None,
        help: help.to_owned(),
    }
}

fn not_utf8(name: &str, error: &std::string::FromUtf8Error) -> Problem {
    let valid = error.utf8_error().valid_up_to();
    let line = error.as_bytes()[..valid]
        .iter()
        .filter(|byte| **byte == b'\n')
        .count()
        + 1;
    Problem {
        message: format!("{name} is not UTF-8 text: wrong byte at offset {valid}, line {line}"),
        place: None,
        help: "save the file as UTF-8".to_owned(),
    }
}
