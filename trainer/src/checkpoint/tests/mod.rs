//! Tests of the format as a whole. Those of its parts are beside them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod catalogue;
mod crash_states;
mod damage;
mod failures;
mod hostile;
#[cfg(feature = "faults")]
mod kills;
mod retention;
mod round_trip;
mod save;
pub(crate) mod trace;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::*;

/// A value that depends on everything an element is known by.
pub(super) fn value(tensor: usize, state: StateKind, index: usize) -> f32 {
    let mixed = (tensor * 31 + state as usize * 7 + index).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (mixed >> 40) as f32 / 1e6 - 8.0
}

/// All values of a tensor.
pub(super) fn values(tensor: usize, state: StateKind, count: usize) -> Vec<f32> {
    (0..count)
        .map(|index| value(tensor, state, index))
        .collect()
}

/// The metadata of a step.
pub(super) fn meta(step: u64) -> ManifestMeta {
    ManifestMeta {
        run_id: "run".to_owned(),
        attempt: 1,
        step,
        tokens: step * 64,
        stage: Some(StageMark {
            index: 0,
            name: "4k".into(),
            seq_len: 64,
            rope_base: 1e4,
        }),
        next_stage: Some(0),
        cursor: serde_json::json!({"a": {"epoch": 0, "window": 3, "offset": 17}}),
        config: "[model]\nvocab_size = 4\n".to_owned(),
        ..ManifestMeta::default()
    }
}

pub(super) const STATES: [StateKind; 3] =
    [StateKind::Master, StateKind::ExpAvg, StateKind::ExpAvgSq];
pub(super) const NO_WAIT: Duration = Duration::ZERO;

/// Saves a small checkpoint of one tensor `w` [6, 5] by two ranks, as step `step` in `root`.
pub(super) fn save_small(root: &Path, step: u64) -> PathBuf {
    save_small_as(root, step, &format!("1-{step}"))
}

/// As [`save_small`], with a save id.
pub(super) fn save_small_as(root: &Path, step: u64, save_id: &str) -> PathBuf {
    let dir = root.join(folder_name(step));
    save_parts(&dir, save_id);
    commit(&dir, 2, save_id, &meta(step), &[], NO_WAIT).unwrap();
    dir
}

/// The parts of [`save_small`] without the commit.
pub(super) fn save_parts(dir: &Path, save_id: &str) {
    for rank in 0..2 {
        save_rank(dir, rank, save_id).unwrap();
    }
}

/// One of the two parts of [`save_small`].
pub(super) fn save_rank(dir: &Path, rank: usize, save_id: &str) -> Result<PartSummary, Error> {
    let range = [0..13, 13..30][rank].clone();
    let data: Vec<Vec<f32>> = STATES
        .iter()
        .map(|state| values(0, *state, 30)[range.clone()].to_vec())
        .collect();
    let pieces: Vec<PieceData<'_>> = STATES
        .iter()
        .zip(&data)
        .map(|(state, data)| PieceData {
            tensor: "w",
            state: *state,
            shape: &[6, 5],
            range: range.clone(),
            data,
        })
        .collect();
    save_part(dir, rank, 2, save_id, &pieces)
}

/// Opens and reads everything: what must fail if any byte is wrong.
pub(super) fn read_all(dir: &Path) -> Result<(), Error> {
    let checkpoint = Checkpoint::open(dir)?;
    checkpoint.verify(&mut |_, _| {})?;
    for tensor in checkpoint.tensors() {
        for stored in &tensor.states {
            checkpoint.read_whole(&tensor.name, stored.state)?;
        }
    }
    Ok(())
}

/// The names of the files in a folder, sorted.
pub(super) fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}
