//! One rank's part of a save.

use std::collections::HashSet;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::disk::{self, create_folder, sync_folder};
use super::dtype::Dtype;
use super::durable::{DurableFile, write_file};
use super::geometry::{MAX_DIMS, element_count};
use super::manifest::{FileEntry, FileKind, Piece};
use super::payload::{Slot, header};
use super::{Error, Region, StateKind};

/// Elements of one tensor that a rank hands over to be saved.
#[derive(Clone, Debug)]
pub struct PieceData<'a> {
    /// Canonical (Hugging Face) name.
    pub tensor: &'a str,
    /// Which of the parameter's tensors.
    pub state: StateKind,
    /// Shape of the whole tensor.
    pub shape: &'a [usize],
    /// Which of its elements, row-major. May be empty.
    pub range: Range<usize>,
    /// Their values, `range.len()` of them.
    pub data: &'a [f32],
}

/// Elements of one tensor that a [`PartWriter`] will be given.
#[derive(Clone, Debug, PartialEq)]
pub struct PieceSpec {
    /// Canonical (Hugging Face) name.
    pub tensor: String,
    /// Which of the parameter's tensors.
    pub state: StateKind,
    /// Shape of the whole tensor.
    pub shape: Vec<usize>,
    /// Which of its elements.
    pub region: Region,
}

impl PieceSpec {
    /// The row-major range `range` of a tensor.
    pub fn flat(tensor: &str, state: StateKind, shape: &[usize], range: Range<usize>) -> Self {
        Self {
            tensor: tensor.to_owned(),
            state,
            shape: shape.to_vec(),
            region: Region::flat(shape, range),
        }
    }
}

/// What a rank has written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartSummary {
    /// The payload file.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
}

/// What a rank tells the committing rank: the content of its done file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Done {
    pub save_id: String,
    pub rank: usize,
    pub world: usize,
    pub pieces: Vec<DonePiece>,
    pub file: FileEntry,
}

/// A piece in a done file. `file` of the piece is always 0, the part itself.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct DonePiece {
    pub tensor: String,
    pub state: StateKind,
    pub shape: Vec<usize>,
    pub piece: Piece,
}

/// Name of a rank's payload file. The save id keeps unfinished saves apart.
pub(super) fn part_name(rank: usize, save_id: &str) -> String {
    format!("part-{rank:05}.{save_id}.safetensors")
}

/// Name of a rank's done file.
pub(super) fn done_name(rank: usize, save_id: &str) -> String {
    format!("part-{rank:05}.{save_id}.done")
}

/// Refuses save ids that cannot be a part of a file name.
pub(super) fn check_save_id(dir: &Path, save_id: &str) -> Result<(), Error> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    if save_id.is_empty() || save_id.len() > 64 || !save_id.bytes().all(plain) {
        return Err(Error::Save {
            dir: dir.to_owned(),
            detail: format!("save id {save_id:?} is not 1 to 64 letters, digits, `-` and `_`"),
        });
    }
    Ok(())
}

/// Writes one rank's part of a save piece by piece, with constant memory.
///
/// The pieces are declared when the file is created and then written in the same order, in slices
/// of any length.
pub struct PartWriter {
    dir: PathBuf,
    rank: usize,
    world: usize,
    save_id: String,
    pieces: Vec<DonePiece>,
    /// Elements still to come.
    missing: usize,
    file: DurableFile,
}

impl PartWriter {
    /// Starts rank `rank`'s payload file of the save `save_id` in the folder `dir`, which is created
    /// if need be. Empty pieces are dropped.
    ///
    /// `save_id` is the same on all ranks and never used twice for a folder; the attempt and the
    /// step make a good one.
    ///
    /// # Errors
    /// A bad save id, rank or piece, or a folder that cannot be written.
    pub fn create(
        dir: &Path,
        rank: usize,
        world: usize,
        save_id: &str,
        pieces: impl IntoIterator<Item = PieceSpec>,
    ) -> Result<Self, Error> {
        check_save_id(dir, save_id)?;
        if rank >= world {
            let detail = format!("rank {rank} of {world} does not exist");
            return Err(Error::Save {
                dir: dir.to_owned(),
                detail,
            });
        }
        let pieces: Vec<PieceSpec> = pieces
            .into_iter()
            .filter(|piece| !piece.region.is_empty())
            .collect();
        let mut slots = Vec::with_capacity(pieces.len());
        let mut names = HashSet::new();
        for piece in &pieces {
            let name = check_piece(piece)?;
            if !names.insert(name.clone()) {
                let detail = "the same elements are given twice".to_owned();
                return Err(Error::Request {
                    tensor: piece.tensor.clone(),
                    detail,
                });
            }
            slots.push((name, [piece.region.len()]));
        }
        let bytes_of = |elements: usize| (elements * Dtype::F32.bytes()) as u64;
        let head = header(
            &[("format", "oxitron")],
            slots.iter().map(|(name, shape)| Slot {
                name,
                shape,
                dtype: Dtype::F32,
                bytes: bytes_of(shape[0]),
            }),
        )
        .map_err(|error| Error::Save {
            dir: dir.to_owned(),
            detail: error.to_string(),
        })?;

        let mut file = start(dir, &part_name(rank, save_id))?;
        file.write(&head)?;
        let mut offset = head.len() as u64;
        let mut missing = 0;
        let pieces = pieces
            .into_iter()
            .map(
                |PieceSpec {
                     tensor,
                     state,
                     shape,
                     region,
                 }| {
                    let elements = region.len();
                    let piece = Piece {
                        region,
                        file: 0,
                        offset,
                    };
                    offset += bytes_of(elements);
                    missing += elements;
                    DonePiece {
                        tensor,
                        state,
                        shape,
                        piece,
                    }
                },
            )
            .collect();
        let (dir, save_id) = (dir.to_owned(), save_id.to_owned());
        Ok(Self {
            dir,
            rank,
            world,
            save_id,
            pieces,
            missing,
            file,
        })
    }

    /// Writes the next elements, in the order in which the pieces were declared.
    ///
    /// # Errors
    /// More elements than declared, or a failed write.
    pub fn write(&mut self, values: &[f32]) -> Result<(), Error> {
        let Some(missing) = self.missing.checked_sub(values.len()) else {
            let detail = format!(
                "{} elements were written where {} were declared to come",
                values.len(),
                self.missing
            );
            return Err(Error::Save {
                dir: self.dir.clone(),
                detail,
            });
        };
        self.missing = missing;
        self.file.write(bytemuck::cast_slice(values))
    }

    /// Makes the payload durable and announces it with a done file.
    ///
    /// # Errors
    /// Declared elements that were not written, or a failed write. Then the part is not announced
    /// and nothing of it stays behind. (If the system fails only after the done file can be seen,
    /// both stay, because the committing rank may have begun to rely on them.)
    pub fn finish(self) -> Result<PartSummary, Error> {
        let Self {
            dir,
            rank,
            world,
            save_id,
            pieces,
            missing,
            file,
        } = self;
        if missing != 0 {
            let detail = format!("{missing} declared elements were not written");
            return Err(Error::Save { dir, detail });
        }
        let part = dir.join(part_name(rank, &save_id));
        let announced = dir.join(done_name(rank, &save_id));
        let finish = || {
            let file = file.finish(FileKind::Payload)?;
            // The payload's name must be durable before the done file that vouches for it.
            sync_folder(&dir)?;
            let summary = PartSummary {
                path: part.clone(),
                bytes: file.bytes,
            };
            let name = done_name(rank, &save_id);
            let done = Done {
                save_id,
                rank,
                world,
                pieces,
                file,
            };
            let json = serde_json::to_vec(&done).map_err(|error| Error::Save {
                dir: dir.clone(),
                detail: error.to_string(),
            })?;
            write_file(&dir, &name, &json)?;
            Ok(summary)
        };
        let result = finish();
        // Once the done file can be seen the committing rank may be relying on the part.
        if result.is_err() && matches!(announced.try_exists(), Ok(false)) {
            // Nothing to report to: the error that ended the save is on its way already.
            let _ = disk::remove_file(&part);
        }
        result
    }
}

/// Starts a file in a folder that is created if need be. An earlier save into the same folder that
/// failed may be discarded at this moment, and the empty folder with it; then it is created again.
fn start(dir: &Path, name: &str) -> Result<DurableFile, Error> {
    let mut tries = 10;
    loop {
        create_folder(dir)?;
        tries -= 1;
        match DurableFile::create(dir, name) {
            Err(error) if error.is_not_found() && tries > 0 => {}
            other => return other,
        }
    }
}

/// Checks a piece and gives its name in the payload file.
fn check_piece(piece: &PieceSpec) -> Result<String, Error> {
    let PieceSpec {
        tensor,
        state,
        shape,
        region,
    } = piece;
    let refuse = |detail| {
        Err(Error::Request {
            tensor: tensor.clone(),
            detail,
        })
    };
    if tensor.is_empty() || shape.len() > MAX_DIMS || element_count(shape).is_none() {
        return refuse(format!(
            "a tensor of shape {shape:?} and this name cannot be saved"
        ));
    }
    if let Err(detail) = region.check(shape) {
        return refuse(detail);
    }
    let first = region.tensor_index(shape, region.range[0]);
    let last = region.tensor_index(shape, region.range[1] - 1);
    Ok(format!("{state}:{tensor}[{first}..={last}]"))
}
