//! Writing one rank's part of a checkpoint, and on the leader the whole, beside training.
//!
//! A save is staged by the step loop and then belongs to a thread of its own until it is durable or
//! has failed. That thread calls no collective. Ranks meet in the checkpoint's folder: each leaves a
//! done file or, when it fails, a note; the leader's thread waits for those files. What the step
//! loop must know, it asks for when it is there anyway ([`Saver::poll`]).

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::time::{Duration, Instant};

use crate::checkpoint::{
    self, Attachment, ManifestMeta, PartSummary, PartWriter, PieceSpec, Retention, Scrutiny,
    Waiting,
};
use crate::zero::{StagedPiece, Staging, ZeroError};

/// How long the leader waits for the other ranks' parts of a save.
const PARTS_TIMEOUT: Duration = Duration::from_secs(1800);

/// How often someone who waits for a save looks whether another rank has failed.
const LOOK: Duration = Duration::from_millis(100);

/// A save, as far as every rank knows it.
#[derive(Clone, Debug)]
pub(super) struct SaveJob {
    pub(super) step: u64,
    /// The checkpoint's folder.
    pub(super) folder: PathBuf,
    pub(super) save_id: String,
    pub(super) rank: usize,
    pub(super) ranks: usize,
    /// When the step loop was asked for it.
    pub(super) requested: Instant,
    /// The leader's share of the work.
    pub(super) commit: Option<CommitJob>,
}

/// What makes the parts a checkpoint.
#[derive(Clone, Debug)]
pub(super) struct CommitJob {
    pub(super) meta: ManifestMeta,
    pub(super) attachments: Vec<Attachment>,
    pub(super) retention: Retention,
}

/// How a save ended on this rank.
#[derive(Debug)]
pub(super) struct Saved {
    pub(super) step: u64,
    pub(super) folder: PathBuf,
    /// From the request to the end.
    pub(super) seconds: f64,
    /// Bytes of the whole checkpoint on the leader, of its own part on another rank.
    pub(super) result: Result<u64, checkpoint::Error>,
}

/// The writer of a rank's checkpoints: one at a time.
#[derive(Debug)]
pub(super) struct Saver {
    /// Where saves are staged; away while one is being written.
    staging: Option<Staging>,
    jobs: Sender<(SaveJob, Staging, Link)>,
    ends: Receiver<(Staging, Saved)>,
    under_way: Option<UnderWay>,
    /// A save that has ended and was not asked for yet.
    ended: Option<Saved>,
    /// Bytes written by all saves so far, for those who watch over progress.
    written: Arc<AtomicU64>,
}

/// The save under way, as the step loop sees it.
#[derive(Debug)]
struct UnderWay {
    job: SaveJob,
    /// Tells whether this rank's part is on disk, once.
    part: Receiver<bool>,
    /// What it has told.
    part_is_there: Option<bool>,
    given_up: Arc<AtomicBool>,
}

/// The same as its writer sees it.
#[derive(Debug)]
struct Link {
    part: Sender<bool>,
    given_up: Arc<AtomicBool>,
}

impl Saver {
    /// Starts a writer that stages in `staging`; without one, saves are written by the step loop
    /// itself. The thread ends when this is dropped and its work is done.
    pub(super) fn new(staging: Option<Staging>) -> std::io::Result<Self> {
        let (jobs, received) = channel::<(SaveJob, Staging, Link)>();
        let (report, ends) = channel();
        let written = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&written);
        let work = move || {
            if let Err(error) = oxitron_kernels::sys::priority::give_way() {
                tracing::debug!("checkpoints are written with normal priority: {error}");
            }
            // What saves have left that could not be cleared away: they failed, and so, perhaps, did
            // removing; or another rank has completed its part since.
            let mut failed: Vec<SaveJob> = Vec::new();
            for (job, staging, link) in received {
                let result = job.write(&staging, &counter, &link);
                if result.is_ok() {
                    failed.drain(..).for_each(|job| job.discard());
                } else if job.commit.is_some() {
                    job.discard();
                    failed.push(job.clone());
                }
                if report.send((staging, job.end(result))).is_err() {
                    return;
                }
            }
        };
        std::thread::Builder::new()
            .name("checkpoint".to_owned())
            .spawn(work)?;
        Ok(Self {
            staging,
            jobs,
            ends,
            under_way: None,
            ended: None,
            written,
        })
    }

    /// Whether a save is under way.
    pub(super) fn busy(&mut self) -> bool {
        if self.under_way.is_some() {
            match self.ends.try_recv() {
                Ok((staging, saved)) => self.end(staging, saved),
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => self.lose(),
            }
        }
        self.under_way.is_some()
    }

    /// The memory to stage the next save in; `None` while a save is under way, or when saves are
    /// not written in the background.
    pub(super) fn take_staging(&mut self) -> Option<Staging> {
        self.staging.take()
    }

    /// Begins to write what has been staged.
    pub(super) fn start(&mut self, job: SaveJob, staging: Staging) {
        let (report, part) = channel();
        let given_up = Arc::new(AtomicBool::new(false));
        let link = Link {
            part: report,
            given_up: Arc::clone(&given_up),
        };
        // If the writer is gone, waiting for the end of this save says so.
        let _ = self.jobs.send((job.clone(), staging, link));
        self.under_way = Some(UnderWay {
            job,
            part,
            part_is_there: None,
            given_up,
        });
    }

    /// The end of a save, if it has come.
    pub(super) fn poll(&mut self) -> Option<Saved> {
        self.busy();
        self.ended.take()
    }

    /// Waits for the end of the save under way, if there is one. `alive` is called while it makes
    /// progress.
    pub(super) fn wait(&mut self, alive: impl Fn()) -> Option<Saved> {
        self.wait_for_part(&alive);
        let began = Instant::now();
        while let Some(under_way) = &self.under_way {
            // How long the leader waits for the others has a limit of its own.
            if began.elapsed() < PARTS_TIMEOUT {
                alive();
            }
            match self.ends.recv_timeout(LOOK) {
                Ok((staging, saved)) => self.end(staging, saved),
                // Another rank, with nothing to wait for, may be steps ahead, where the step loop
                // of this one cannot hear of its failure.
                Err(RecvTimeoutError::Timeout) => {
                    if under_way.job.has_failed_elsewhere() {
                        self.give_up();
                    }
                }
                Err(RecvTimeoutError::Disconnected) => self.lose(),
            }
        }
        self.ended.take()
    }

    /// The writer is gone, with what it was writing.
    fn lose(&mut self) {
        if let Some(UnderWay { job, .. }) = self.under_way.take() {
            self.ended = Some(job.end(Err(job.writer_is_gone())));
        }
    }

    fn end(&mut self, staging: Staging, saved: Saved) {
        self.staging = Some(staging);
        self.under_way = None;
        self.ended = Some(saved);
    }

    /// Waits until this rank's part of the save under way is on disk; false when it cannot be.
    /// `alive` is called while it makes progress.
    pub(super) fn wait_for_part(&mut self, alive: impl Fn()) -> bool {
        let Some(under_way) = &mut self.under_way else {
            return true;
        };
        let mut written = 0;
        while under_way.part_is_there.is_none() {
            match under_way.part.recv_timeout(LOOK) {
                Ok(there) => under_way.part_is_there = Some(there),
                Err(RecvTimeoutError::Timeout) => {
                    let now = self.written.load(Ordering::Relaxed);
                    if now != written {
                        written = now;
                        alive();
                    }
                }
                Err(RecvTimeoutError::Disconnected) => under_way.part_is_there = Some(false),
            }
        }
        under_way.part_is_there == Some(true)
    }

    /// Gives the save under way up, on the leader: a part of it will never be there.
    pub(super) fn give_up(&self) {
        if let Some(under_way) = &self.under_way {
            under_way.given_up.store(true, Ordering::Relaxed);
        }
    }
}

impl SaveJob {
    /// Writes this rank's part and, on the leader, makes the parts a checkpoint.
    fn write(
        &self,
        staging: &Staging,
        written: &AtomicU64,
        link: &Link,
    ) -> Result<u64, checkpoint::Error> {
        let part = self.write_staged(staging, written);
        // Nobody may be listening: only the last save of a run is waited for.
        let _ = link.part.send(part.is_ok());
        self.conclude(part, &link.given_up)
    }

    /// What follows this rank's part: on the leader the commit, or the end of the whole save.
    pub(super) fn conclude(
        &self,
        part: Result<u64, checkpoint::Error>,
        given_up: &AtomicBool,
    ) -> Result<u64, checkpoint::Error> {
        let Some(commit) = &self.commit else {
            return part;
        };
        let whole = part.and_then(|_| self.commit(commit, given_up));
        match &whole {
            Ok(_) => self.retain(commit),
            Err(_) => self.discard(),
        }
        whole
    }

    fn write_staged(
        &self,
        staging: &Staging,
        written: &AtomicU64,
    ) -> Result<u64, checkpoint::Error> {
        let write_part = || {
            let mut writer = self.part(staging.pieces().map(spec))?;
            let write = |values: &[f32]| {
                written.fetch_add(size_of_val(values) as u64, Ordering::Relaxed);
                writer.write(values).map_err(PartError::Checkpoint)
            };
            staging.write(write).map_err(|error| error.of(self))?;
            writer.finish()
        };
        self.finish_part(write_part())
    }

    /// Starts this rank's part.
    pub(super) fn part(
        &self,
        pieces: impl IntoIterator<Item = PieceSpec>,
    ) -> Result<PartWriter, checkpoint::Error> {
        PartWriter::create(&self.folder, self.rank, self.ranks, &self.save_id, pieces)
    }

    /// Leaves a note for the leader when a part could not be written.
    pub(super) fn finish_part(
        &self,
        part: Result<PartSummary, checkpoint::Error>,
    ) -> Result<u64, checkpoint::Error> {
        if part.is_err() {
            // Best effort: where even this cannot be written, the next step's control tells.
            let _ = std::fs::write(self.note_of_failure(self.rank), "");
        }
        Ok(part?.bytes)
    }

    fn note_of_failure(&self, rank: usize) -> PathBuf {
        let name = format!("part-{rank:05}.{}.failed", self.save_id);
        self.folder.join(name)
    }

    /// Whether another rank has left a note.
    fn has_failed_elsewhere(&self) -> bool {
        self.failed_ranks().next().is_some()
    }

    /// The ranks that have left a note.
    fn failed_ranks(&self) -> impl Iterator<Item = usize> {
        (0..self.ranks).filter(|&rank| self.note_of_failure(rank).exists())
    }

    /// Why a save was given up, where notes tell.
    fn naming_ranks(&self, error: checkpoint::Error) -> checkpoint::Error {
        let failed: Vec<String> = self.failed_ranks().map(|rank| rank.to_string()).collect();
        if failed.is_empty() || !matches!(error, checkpoint::Error::Cancelled { .. }) {
            return error;
        }
        checkpoint::Error::Save {
            dir: self.folder.clone(),
            detail: format!(
                "rank {} could not write its part, its log says why",
                failed.join(", rank ")
            ),
        }
    }

    /// Makes the parts a checkpoint.
    pub(super) fn commit(
        &self,
        commit: &CommitJob,
        given_up: &AtomicBool,
    ) -> Result<u64, checkpoint::Error> {
        let committed = checkpoint::commit(
            &self.folder,
            self.ranks,
            &self.save_id,
            &commit.meta,
            &commit.attachments,
            Waiting::until_cancelled(PARTS_TIMEOUT, given_up),
        );
        Ok(committed.map_err(|error| self.naming_ranks(error))?.bytes)
    }

    /// Lets old checkpoints go, now that there is this one.
    pub(super) fn retain(&self, commit: &CommitJob) {
        let checkpoints = self.folder.parent().unwrap_or(&self.folder);
        let kept = checkpoint::retain(checkpoints, &commit.retention, Scrutiny::Structure);
        if let Err(error) = kept {
            // The new checkpoint is there all the same.
            tracing::warn!("old checkpoints cannot be removed: {error}");
        }
    }

    /// Why a save fails that has nobody to write it.
    pub(super) fn writer_is_gone(&self) -> checkpoint::Error {
        let panicked = "the thread that writes checkpoints has panicked; please report the message \
                        on standard error";
        checkpoint::Error::Save {
            dir: self.folder.clone(),
            detail: panicked.to_owned(),
        }
    }

    /// Clears away, on the leader, what a save that has failed has left.
    pub(super) fn discard(&self) {
        checkpoint::discard(&self.folder, &self.save_id);
    }

    /// The end of the save.
    pub(super) fn end(&self, result: Result<u64, checkpoint::Error>) -> Saved {
        Saved {
            step: self.step,
            folder: self.folder.clone(),
            seconds: self.requested.elapsed().as_secs_f64(),
            result,
        }
    }
}

/// What the part's file holds.
pub(super) fn spec(piece: &StagedPiece) -> PieceSpec {
    PieceSpec::flat(
        &piece.tensor,
        piece.state,
        &piece.shape,
        piece.range.clone(),
    )
}

/// Why a part was not written: its file, or the memory it comes from.
#[derive(Debug)]
pub(super) enum PartError {
    Checkpoint(checkpoint::Error),
    Zero(ZeroError),
}

impl From<ZeroError> for PartError {
    fn from(error: ZeroError) -> Self {
        Self::Zero(error)
    }
}

impl PartError {
    pub(super) fn of(self, job: &SaveJob) -> checkpoint::Error {
        match self {
            Self::Checkpoint(error) => error,
            Self::Zero(error) => checkpoint::Error::Save {
                dir: job.folder.clone(),
                detail: error.to_string(),
            },
        }
    }
}
