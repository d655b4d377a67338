//! Saving a run: each rank its own slices, the leader the manifest.

use std::path::Path;
use std::time::{Duration, Instant};

use super::{RunError, trainer::Trainer};
use crate::checkpoint::{self, PieceData, Retention, Scrutiny};
use crate::convert::tokenizer_attachments;
use crate::metrics::Event;
use crate::zero::Staged;

/// How long the leader waits for the other ranks' parts of a save.
const PARTS_TIMEOUT: Duration = Duration::from_secs(600);

impl Trainer<'_> {
    /// Saves the state of now as a checkpoint and applies the retention policy.
    pub(super) fn save(&mut self) -> Result<(), RunError> {
        let began = Instant::now();
        let staged = self.zero.stage()?;
        let step = self.progress.step;
        self.event(Event::SaveStaged {
            step,
            seconds: began.elapsed().as_secs_f64(),
        })?;

        let folder = self
            .config
            .checkpoint
            .dir
            .join(checkpoint::folder_name(step));
        // An attempt takes a step at most once, so no two saves share an id.
        let save_id = format!("{}-{step}", self.attempt);
        let pieces: Vec<PieceData<'_>> = staged.iter().map(piece).collect();
        let (rank, ranks) = (self.ranks.rank, self.ranks.ranks);
        checkpoint::save_part(&folder, rank, ranks, &save_id, &pieces)?;
        if !self.ranks.leads() {
            return Ok(());
        }

        let meta = self.manifest_meta()?;
        let tokenizer = self.config.data.tokenizer.as_deref().and_then(Path::parent);
        let attachments = tokenizer.map(tokenizer_attachments).unwrap_or_default();
        let committed =
            checkpoint::commit(&folder, ranks, &save_id, &meta, &attachments, PARTS_TIMEOUT)?;
        self.event(Event::SaveDurable {
            step,
            checkpoint: self.shown(&folder),
            bytes: committed.bytes,
            seconds: began.elapsed().as_secs_f64(),
        })?;
        if let Some(metrics) = &self.metrics {
            metrics.sync()?;
        }
        tracing::info!(
            "saved {} ({:.1} MB in {:.2} s)",
            folder.display(),
            committed.bytes as f64 / 1e6,
            began.elapsed().as_secs_f64()
        );
        self.parent = Some(self.shown(&folder));
        let policy = &self.config.checkpoint;
        let retention = Retention {
            keep: policy.keep,
            keep_every: None,
        };
        checkpoint::retain(&policy.dir, &retention, Scrutiny::Structure)?;
        Ok(())
    }
}

fn piece(staged: &Staged) -> PieceData<'_> {
    PieceData {
        tensor: &staged.tensor,
        state: staged.state,
        shape: &staged.shape,
        range: staged.range.clone(),
        data: &staged.data,
    }
}
