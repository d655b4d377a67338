//! Mesh-free checkpoints: saved on any mesh, loaded on any other, without a tool in between.
//!
//! # What a checkpoint is
//!
//! A folder is a checkpoint exactly when it holds a `manifest.json` whose own checksum is right.
//! Nothing else commits: payload files without a manifest are rubbish of a save that did not
//! finish, and a folder whose manifest was removed is being deleted.
//!
//! ```text
//! step-00000500/
//!   part-00000.1-500.safetensors     what rank 0 owned: slices of fp32 master weights and moments
//!   part-00001.1-500.safetensors     what rank 1 owned
//!   tokenizer.json                   attachments: files that export needs
//!   manifest.json                    what the tensors are, where their elements lie, checksums
//! ```
//!
//! Tensors are named and oriented as in a Hugging Face folder, without padding or kernel layout. A
//! *piece* is a box of such a tensor, and a row-major range inside the box, at an offset of a file
//! ([`Piece`], [`Region`]). Every (tensor, [`StateKind`]) is covered exactly once, which is checked
//! both when a save is committed and when a checkpoint is opened. A reader asks for elements of a
//! tensor and never learns how many ranks wrote them.
//!
//! # Saving
//!
//! Each rank calls [`save_part`] (or drives a [`PartWriter`] piece by piece when the whole does not
//! fit into memory), which ends with a small *done file* that carries the *save id*. Rank 0 calls
//! [`commit`], which waits for the done files of this save id, checks that together they make a
//! complete checkpoint, and writes the manifest last. There are no collectives: the folder is the
//! only meeting place, so a save can run beside training and a dead rank costs a time-out that
//! names it. File names carry the save id, so an unfinished earlier save into the same folder can
//! neither be mistaken for this one nor be damaged by it.
//!
//! Every file is written, fsynced and renamed into place, then the folder is fsynced. A crash at
//! any point leaves either the checkpoint that was there before, or the new one; the tests look at
//! every such state. [`amend()`] replaces the manifest alone in the same way. A save that fails leaves
//! nothing that counts, and [`discard`] removes what it does leave.
//!
//! All changes on disk are made by `disk.rs`, where tests let them fail ([`crate::faults`]).
//!
//! # Reading
//!
//! [`Checkpoint::open`] reads and checks the manifest and the sizes of the files;
//! [`Checkpoint::read`] fetches only the chunks that hold the elements asked for, and compares each
//! chunk's xxh3-128 before a byte of it is used. [`Checkpoint::verify_rest`] compares the chunks that
//! no reader of the tensors touches, so that a resume looks at every byte. A manifest is treated as hostile input: names,
//! sizes, boxes and offsets are checked before anything is allocated or opened by them.
//!
//! # Deleting
//!
//! A manifest says what its checkpoint was saved for ([`Purpose`]); [`Retention`] says which stay.
//! The manifest goes first, and the newest valid checkpoint never goes. [`retire`] takes a run back.
//!
//! # What it refuses
//!
//! Pieces that overlap or leave a hole, names with a path in them, chunks above 16 MiB, unknown
//! keys, an unknown format version. It never repairs and never guesses: [`newest_valid`] passes
//! over a bad checkpoint and says why.

mod amend;
mod catalogue;
mod coverage;
pub(crate) mod disk;
mod dtype;
pub(crate) mod durable;
mod error;
mod geometry;
mod leftovers;
mod manifest;
mod open;
pub(crate) mod payload;
mod read;
mod retention;
mod save;
mod seal;
mod validate;
mod verify;
mod write;

#[cfg(test)]
mod tests;

pub(crate) use geometry::element_count;
pub(crate) use manifest::is_plain_name;

pub use crate::zero::StateKind;
pub use amend::amend;
pub use catalogue::{
    Newest, Rejected, Scrutiny, find, folder_name, newest_valid, newest_valid_before,
};
pub use dtype::Dtype;
pub use error::Error;
pub use geometry::Region;
pub use leftovers::{discard, remove_stale};
pub use manifest::{
    FileEntry, FileKind, FormatLimits, GuardState, Manifest, ManifestMeta, Piece, Purpose,
    ScheduleState, SkippedRange, SpecialTokens, StageMark, StateEntry, TensorEntry,
};
pub use open::Checkpoint;
pub use retention::{Retention, delete, retain, retire, set_aside};
pub use save::{Attachment, Committed, Waiting, commit, missing_parts, save_part};
pub use write::{PartSummary, PartWriter, PieceData, PieceSpec};
