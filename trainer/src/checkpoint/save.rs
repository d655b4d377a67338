//! From the parts of all ranks to one checkpoint.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::disk::{self, sync_folder, sync_parent};
use super::dtype::Dtype;
use super::durable::{DurableFile, read_small_file, write_file};
use super::leftovers::remove_unlisted;
use super::manifest::{
    FORMAT, FileEntry, FileKind, FormatLimits, MANIFEST, Manifest, ManifestMeta, StateEntry,
    TensorEntry, is_plain_name,
};
use super::write::{Done, PartSummary, PartWriter, PieceData, PieceSpec, check_save_id, done_name};
use super::{Error, seal, validate};

/// A file to carry along in a checkpoint, as the tokenizer is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// Its plain name in the checkpoint folder.
    pub name: String,
    /// Where it is copied from.
    pub source: PathBuf,
}

/// What a commit has made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Committed {
    /// The checkpoint folder.
    pub dir: PathBuf,
    /// Bytes of all its files, the manifest included.
    pub bytes: u64,
}

/// Writes all of a rank's elements of a save and announces them. See [`PartWriter::create`] for
/// `dir` and `save_id`; a rank without elements calls it with no pieces.
///
/// # Errors
/// Pieces that do not fit their tensor, or a folder that cannot be written.
pub fn save_part(
    dir: &Path,
    rank: usize,
    world: usize,
    save_id: &str,
    pieces: &[PieceData<'_>],
) -> Result<PartSummary, Error> {
    for piece in pieces {
        if piece.data.len() != piece.range.len() {
            let detail = format!("{} values for range {:?}", piece.data.len(), piece.range);
            return Err(Error::Request {
                tensor: piece.tensor.to_owned(),
                detail,
            });
        }
    }
    let specs = pieces
        .iter()
        .map(|piece| PieceSpec::flat(piece.tensor, piece.state, piece.shape, piece.range.clone()));
    let mut writer = PartWriter::create(dir, rank, world, save_id, specs)?;
    for piece in pieces {
        writer.write(piece.data)?;
    }
    writer.finish()
}

/// How long a commit waits for the parts of the other ranks. A [`Duration`] is one that nobody can
/// cut short.
#[derive(Clone, Copy, Debug)]
pub struct Waiting<'a> {
    timeout: Duration,
    cancelled: Option<&'a AtomicBool>,
}

impl<'a> Waiting<'a> {
    /// Waits as long, and gives up at once when `cancelled` becomes true: when the committing rank
    /// has heard that another rank's part failed.
    pub fn until_cancelled(timeout: Duration, cancelled: &'a AtomicBool) -> Self {
        Self {
            timeout,
            cancelled: Some(cancelled),
        }
    }

    fn is_cancelled(&self) -> bool {
        self.cancelled
            .is_some_and(|flag| flag.load(Ordering::Relaxed))
    }

    /// Sleeps for `pause`, less if the wait is cancelled meanwhile.
    fn sleep(&self, mut pause: Duration) {
        let slice = Duration::from_millis(10);
        while !pause.is_zero() && !self.is_cancelled() {
            let now = pause.min(slice);
            thread::sleep(now);
            pause -= now;
        }
    }
}

impl From<Duration> for Waiting<'_> {
    fn from(timeout: Duration) -> Self {
        Self {
            timeout,
            cancelled: None,
        }
    }
}

/// The ranks that have not finished their part of the save yet.
pub fn missing_parts(dir: &Path, world: usize, save_id: &str) -> Vec<usize> {
    (0..world)
        .filter(|rank| !dir.join(done_name(*rank, save_id)).is_file())
        .collect()
}

/// Turns the parts of the save `save_id` into a checkpoint. Called by one rank.
///
/// Waits until all `world` ranks have finished their part, copies the attachments, checks that the
/// pieces are complete tensors, and writes the manifest. An older checkpoint in the same folder
/// stays valid until that moment and is replaced by it (if its attachments have the same content,
/// as those of one run do: they are renamed into place a moment earlier). Afterwards whatever else
/// lies in the folder (done files, leftovers of unfinished saves) is removed.
///
/// # Errors
/// [`Error::CommitTimeout`] if a part is missing after the time to wait; [`Error::Cancelled`]; pieces
/// that overlap, leave holes or disagree about a shape; a failed read or write. Then no manifest is
/// written and no attachment stays behind; the parts do, for [`discard`](super::discard). (If the system fails only
/// after the manifest has its name, the checkpoint is there and complete, but a power cut may undo
/// it.)
pub fn commit<'a>(
    dir: &Path,
    world: usize,
    save_id: &str,
    meta: &ManifestMeta,
    attachments: &[Attachment],
    waiting: impl Into<Waiting<'a>>,
) -> Result<Committed, Error> {
    let waiting = waiting.into();
    check_save_id(dir, save_id)?;
    wait_for_parts(dir, world, save_id, &waiting)?;
    let mut files = Vec::with_capacity(world + attachments.len());
    let mut tensors = Tensors::default();
    for rank in 0..world {
        let done = read_done(dir, rank, world, save_id)?;
        tensors.add(dir, done.pieces, files.len())?;
        files.push(done.file);
    }
    let mut attached = Vec::new();
    let result = publish(
        dir,
        save_id,
        meta,
        (files, tensors.list),
        attachments,
        (&waiting, &mut attached),
    );
    if result.is_err() && matches!(dir.join(MANIFEST).try_exists(), Ok(false)) {
        for name in attached {
            // Nothing to report to: the error that ended the commit is on its way already.
            let _ = disk::remove_file(&dir.join(name));
        }
    }
    result
}

/// The second half of a commit: copies the attachments and writes the manifest.
fn publish(
    dir: &Path,
    save_id: &str,
    meta: &ManifestMeta,
    (mut files, tensors): (Vec<FileEntry>, Vec<TensorEntry>),
    attachments: &[Attachment],
    (waiting, attached): (&Waiting<'_>, &mut Vec<String>),
) -> Result<Committed, Error> {
    for attachment in attachments {
        attached.push(attachment.name.clone());
        files.push(attach(dir, attachment)?);
    }
    let manifest = Manifest {
        format: FORMAT.to_owned(),
        format_version: FormatLimits::VERSION,
        save_id: save_id.to_owned(),
        run: meta.clone(),
        tensors,
        files,
        checksum: String::new(),
    };
    // The names of the attachments must be durable before the manifest that lists them.
    sync_folder(dir)?;
    if waiting.is_cancelled() {
        return Err(cancelled(dir, save_id));
    }
    let bytes = write_manifest(dir, &manifest)?;
    // The folder is new, perhaps, and another rank may have created it.
    sync_parent(dir)?;
    remove_unlisted(dir, &manifest);
    let payload: u64 = manifest.files.iter().map(|file| file.bytes).sum();
    Ok(Committed {
        dir: dir.to_owned(),
        bytes: payload + bytes,
    })
}

/// Checks a manifest and puts it into place of the one that is there, durably. The files that it
/// lists must be durable already. Returns its size.
pub(super) fn write_manifest(dir: &Path, manifest: &Manifest) -> Result<u64, Error> {
    let refuse = |detail: String| Error::Save {
        dir: dir.to_owned(),
        detail,
    };
    validate::check(manifest).map_err(refuse)?;
    let bytes = seal::encode(manifest).map_err(|error| refuse(error.to_string()))?;
    write_file(dir, MANIFEST, &bytes)?;
    Ok(bytes.len() as u64)
}

/// Waits until every rank has a done file of this save.
fn wait_for_parts(
    dir: &Path,
    world: usize,
    save_id: &str,
    waiting: &Waiting<'_>,
) -> Result<(), Error> {
    let began = Instant::now();
    let mut pause = Duration::from_millis(2);
    loop {
        if waiting.is_cancelled() {
            return Err(cancelled(dir, save_id));
        }
        let missing = missing_parts(dir, world, save_id);
        if missing.is_empty() {
            return Ok(());
        }
        let waited = began.elapsed();
        if waited >= waiting.timeout {
            let (dir, save_id) = (dir.to_owned(), save_id.to_owned());
            return Err(Error::CommitTimeout {
                dir,
                save_id,
                missing,
                waited,
            });
        }
        waiting.sleep(pause.min(waiting.timeout - waited));
        // Large parts take minutes; a shared file system should not be asked 500 times a second.
        pause = (pause * 2).min(Duration::from_millis(250));
    }
}

fn cancelled(dir: &Path, save_id: &str) -> Error {
    Error::Cancelled {
        dir: dir.to_owned(),
        save_id: save_id.to_owned(),
    }
}

/// Reads a rank's done file and checks that it belongs to this save and that its payload is there.
fn read_done(dir: &Path, rank: usize, world: usize, save_id: &str) -> Result<Done, Error> {
    let path = dir.join(done_name(rank, save_id));
    let bytes = read_small_file(&path, FormatLimits::MAX_MANIFEST_BYTES)?;
    let invalid = |detail: String| Error::ManifestInvalid {
        path: path.clone(),
        detail,
    };
    let done: Done = serde_json::from_slice(&bytes)
        .map_err(|error| invalid(format!("not a done file: {error}")))?;
    if (done.save_id.as_str(), done.rank, done.world) != (save_id, rank, world) {
        return Err(invalid(format!(
            "written for save `{}`, rank {} of {}; expected save `{save_id}`, rank {rank} of \
             {world}: the ranks do not agree about the run",
            done.save_id, done.rank, done.world
        )));
    }
    if !is_plain_name(&done.file.name) {
        return Err(invalid(format!(
            "{:?} is not a plain file name",
            done.file.name
        )));
    }
    let part = dir.join(&done.file.name);
    let found = fs::metadata(&part).map_err(Error::io("find", &part))?.len();
    if found != done.file.bytes {
        return Err(Error::FileSize {
            path: part,
            expected: done.file.bytes,
            found,
        });
    }
    Ok(done)
}

/// The tensors of a save, in order of first mention.
#[derive(Default)]
struct Tensors {
    list: Vec<TensorEntry>,
    by_name: HashMap<String, usize>,
}

impl Tensors {
    /// Adds the pieces of the part that is file number `file`.
    fn add(
        &mut self,
        dir: &Path,
        pieces: Vec<super::write::DonePiece>,
        file: usize,
    ) -> Result<(), Error> {
        for mut done in pieces {
            done.piece.file = file;
            let index = *self.by_name.entry(done.tensor.clone()).or_insert_with(|| {
                self.list.push(TensorEntry {
                    name: done.tensor.clone(),
                    shape: done.shape.clone(),
                    states: Vec::new(),
                });
                self.list.len() - 1
            });
            let entry = &mut self.list[index];
            if entry.shape != done.shape {
                let detail = format!(
                    "tensor `{}` has shape {:?} in one part and {:?} in another",
                    entry.name, entry.shape, done.shape
                );
                return Err(Error::Save {
                    dir: dir.to_owned(),
                    detail,
                });
            }
            match entry
                .states
                .iter_mut()
                .find(|state| state.state == done.state)
            {
                Some(state) => state.pieces.push(done.piece),
                None => entry.states.push(StateEntry {
                    state: done.state,
                    dtype: Dtype::F32,
                    pieces: vec![done.piece],
                }),
            }
        }
        Ok(())
    }
}

/// Copies a file into the checkpoint folder.
fn attach(dir: &Path, attachment: &Attachment) -> Result<FileEntry, Error> {
    use std::io::Read;
    let Attachment { name, source } = attachment;
    if !is_plain_name(name) {
        let detail = format!("{name:?} is not a plain file name");
        return Err(Error::Save {
            dir: dir.to_owned(),
            detail,
        });
    }
    let mut from = fs::File::open(source).map_err(Error::io("open", source))?;
    let mut to = DurableFile::create(dir, name)?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = from.read(&mut buffer).map_err(Error::io("read", source))?;
        if count == 0 {
            return to.finish(FileKind::Attachment);
        }
        to.write(&buffer[..count])?;
    }
}
