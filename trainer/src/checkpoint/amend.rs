//! Changing what a checkpoint says about its run, without touching its tensors.

use std::path::Path;

use super::manifest::{FormatLimits, ManifestMeta};
use super::save::write_manifest;
use super::{Checkpoint, Error};

/// Rewrites the manifest of the valid checkpoint in `dir` with what `change` makes of the state of
/// the run; tensors and files stay as they are. The new manifest takes the place of the old one in
/// the way it does in a commit: after a crash there is either, whole. Returns the checkpoint as
/// amended.
///
/// Only the process that owns the run directory may call this.
///
/// # Errors
/// The checkpoint is not valid, `change` has changed its step (the folder is named for it), or the
/// manifest cannot be written. The old one then stays.
pub fn amend(dir: &Path, change: impl FnOnce(&mut ManifestMeta)) -> Result<Checkpoint, Error> {
    // Opened for its checks of the files: a manifest is not renewed for what is no checkpoint.
    let mut manifest = Checkpoint::open(dir)?.into_manifest();
    let step = manifest.run.step;
    change(&mut manifest.run);
    if manifest.run.step != step {
        return Err(Error::Save {
            dir: dir.to_owned(),
            detail: format!(
                "an amendment would make the checkpoint of step {step} one of step {}",
                manifest.run.step
            ),
        });
    }
    manifest.format_version = FormatLimits::VERSION;
    write_manifest(dir, &manifest)?;
    Checkpoint::open(dir)
}
