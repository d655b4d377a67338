//! Where the weights of a run come from.

use super::{RunError, ranks::Ranks, trainer::Options};
use crate::checkpoint::{self, Checkpoint, Scrutiny};
use crate::config::Config;
use crate::convert::HfFolder;
use crate::model::tensor_names;
use crate::plan::Units;
use crate::zero::StateKind;

/// Where the weights of a run come from.
pub(super) enum Origin {
    /// The run's own checkpoint: weights, moments and progress.
    Resume(Checkpoint),
    /// Another checkpoint: weights alone.
    Checkpoint(Checkpoint),
    /// A Hugging Face folder: weights alone.
    HuggingFace(HfFolder),
    /// The seed.
    Seed,
}

impl Origin {
    /// The newest checkpoint of the run from before step `before`, or else what the configuration
    /// says. The leader looks, the others open the same. On the leader also what has changed in the
    /// configuration since, if that is allowed.
    pub(super) fn find(
        config: &Config,
        ranks: &Ranks,
        options: &Options,
        before: u64,
    ) -> Result<(Self, Option<String>), RunError> {
        let checkpoints = &config.checkpoint.dir;
        let mut changed = None;
        let [found, step] = ranks.leaders_choice(|| {
            let newest = checkpoint::newest_valid_before(checkpoints, before, Scrutiny::Structure)?;
            for rejected in &newest.rejected {
                tracing::warn!(
                    "{} cannot be used: {}",
                    rejected.dir.display(),
                    rejected.reason
                );
            }
            let Some(checkpoint) = newest.checkpoint else {
                // A save that did not finish is no checkpoint; one that did and cannot be read is a
                // loss, over which the run must not begin anew in silence.
                let unfinished =
                    |reason: &_| matches!(reason, checkpoint::Error::NotACheckpoint { .. });
                let lost = newest
                    .rejected
                    .into_iter()
                    .find(|lost| !unfinished(&lost.reason));
                return match lost {
                    Some(lost) => Err(RunError::NoneUsable {
                        dir: checkpoints.clone(),
                        reason: lost.reason.to_string(),
                    }),
                    None => Ok([0, 0]),
                };
            };
            changed = check_config(config, &checkpoint, options)?;
            Ok([1, checkpoint.meta().step])
        })?;
        let open = || {
            if found == 1 {
                if config.model.init_from.is_some() {
                    tracing::info!("the run has begun, so model.init_from is not used");
                }
                let dir = checkpoints.join(checkpoint::folder_name(step));
                let checkpoint = Checkpoint::open(dir)?;
                return Ok(Origin::Resume(if options.no_verify {
                    checkpoint.without_verification()
                } else {
                    checkpoint
                }));
            }
            Ok(match &config.model.init_from {
                None => Origin::Seed,
                Some(path) if path.join("config.json").is_file() => {
                    Origin::HuggingFace(HfFolder::open(path)?)
                }
                Some(path) => Origin::Checkpoint(checkpoint::find(path)?),
            })
        };
        Ok((ranks.together(open())?, changed))
    }

    /// Refuses weights of another model.
    pub(super) fn check(&self, units: &Units) -> Result<(), RunError> {
        let names = tensor_names(units);
        let expected = names
            .iter()
            .map(|(name, shape)| (name.as_str(), shape.as_slice()));
        match self {
            Origin::Seed => Ok(()),
            Origin::Resume(checkpoint) | Origin::Checkpoint(checkpoint) => {
                Ok(checkpoint.check_model(expected, &[StateKind::Master])?)
            }
            Origin::HuggingFace(folder) => check_shapes(folder, expected),
        }
    }

    /// The choice of this name that the checkpoint records.
    pub(super) fn recorded(&self, choice: &str) -> Option<String> {
        let Self::Resume(checkpoint) = self else {
            return None;
        };
        checkpoint
            .meta()
            .choices
            .get(choice)?
            .as_str()
            .map(str::to_owned)
    }
}

/// Refuses a Hugging Face folder that holds another model than the configured one.
fn check_shapes<'t>(
    folder: &HfFolder,
    expected: impl Iterator<Item = (&'t str, &'t [usize])>,
) -> Result<(), RunError> {
    for (name, shape) in expected {
        let found = folder.shape(name);
        if found != Some(shape) {
            let found = found.map_or("absent".to_owned(), |shape| format!("of shape {shape:?}"));
            return Err(RunError::Plan(format!(
                "{}: tensor {name} is {found}, but the configured model has shape {shape:?}; make \
                 [model] agree with its config.json",
                folder.dir().display()
            )));
        }
    }
    Ok(())
}

/// Compares the configuration with the one that the checkpoint was written under; what differs and
/// is allowed to, one line per key.
fn check_config(
    config: &Config,
    checkpoint: &Checkpoint,
    options: &Options,
) -> Result<Option<String>, RunError> {
    let name = format!("the configuration in {}", checkpoint.dir().display());
    let before = Config::from_text(&checkpoint.meta().config, &name, &config.run.dir, &[])?;
    let begun = checkpoint.meta().last_stage_begun();
    let differences = before.result_affecting_difference(config, begun)?;
    if differences.is_empty() {
        return Ok(None);
    }
    let listed: Vec<String> = differences
        .iter()
        .map(|difference| format!("  {difference}"))
        .collect();
    let differences = listed.join("\n");
    if options.allow_config_change {
        tracing::warn!("going on with a changed configuration:\n{differences}");
        return Ok(Some(differences));
    }
    Err(RunError::ConfigChanged {
        run_dir: config.run.dir.clone(),
        differences,
    })
}
