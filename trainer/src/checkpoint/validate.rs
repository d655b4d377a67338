//! Checks everything a manifest says that can be checked without its files.

use std::collections::HashSet;

use super::coverage;
use super::geometry::{MAX_DIMS, element_count};
use super::manifest::{
    FileEntry, FileKind, FormatLimits, MANIFEST, Manifest, TensorEntry, is_plain_name,
};

/// Says what is wrong with a manifest, if anything is. After this check all sizes, offsets and
/// boxes are consistent with each other, and no sum of them overflows.
pub(super) fn check(manifest: &Manifest) -> Result<(), String> {
    let mut names = HashSet::new();
    for file in &manifest.files {
        check_file(file)?;
        if !names.insert(file.name.as_str()) {
            return Err(format!("file `{}` is listed twice", file.name));
        }
    }
    let mut names = HashSet::new();
    let mut spans = vec![Vec::new(); manifest.files.len()];
    for tensor in &manifest.tensors {
        if !names.insert(tensor.name.as_str()) {
            return Err(format!("tensor `{}` is listed twice", tensor.name));
        }
        check_tensor(tensor, &manifest.files, &mut spans)
            .map_err(|detail| format!("tensor `{}`: {detail}", tensor.name))?;
    }
    for (file, spans) in manifest.files.iter().zip(&mut spans) {
        spans.sort_unstable();
        if let Some(pair) = spans.windows(2).find(|pair| pair[1].0 < pair[0].1) {
            return Err(format!(
                "file `{}`: two pieces share bytes {}..{}",
                file.name,
                pair[1].0,
                pair[0].1.min(pair[1].1)
            ));
        }
    }
    Ok(())
}

fn check_file(file: &FileEntry) -> Result<(), String> {
    let name = &file.name;
    if !is_plain_name(name) || name == MANIFEST {
        return Err(format!(
            "file name {name:?} is not a plain name of a file beside the manifest"
        ));
    }
    if file.chunk_bytes == 0 || file.chunk_bytes > FormatLimits::MAX_CHUNK_BYTES {
        return Err(format!(
            "file `{name}`: chunks of {} bytes, 1 to {} are allowed",
            file.chunk_bytes,
            FormatLimits::MAX_CHUNK_BYTES
        ));
    }
    let chunks = file.bytes.div_ceil(file.chunk_bytes);
    if chunks != file.chunks.len() as u64 {
        return Err(format!(
            "file `{name}`: {} checksums for {chunks} chunks of {} bytes",
            file.chunks.len(),
            file.chunk_bytes
        ));
    }
    Ok(())
}

/// Checks one tensor and adds the bytes of its pieces to `spans`, per file.
fn check_tensor(
    tensor: &TensorEntry,
    files: &[FileEntry],
    spans: &mut [Vec<(u64, u64)>],
) -> Result<(), String> {
    let shape = &tensor.shape;
    if shape.len() > MAX_DIMS {
        return Err(format!(
            "{} dimensions, at most {MAX_DIMS} are supported",
            shape.len()
        ));
    }
    let count = element_count(shape)
        .ok_or_else(|| format!("shape {shape:?} has no element or too many to count"))?;
    let mut kinds = HashSet::new();
    for state in &tensor.states {
        let kind = state.state;
        if !kinds.insert(kind) {
            return Err(format!("state {kind} is listed twice"));
        }
        for piece in &state.pieces {
            piece
                .region
                .check(shape)
                .map_err(|detail| format!("state {kind}: {detail}"))?;
            let file = files
                .get(piece.file)
                .filter(|file| file.kind == FileKind::Payload);
            let Some(file) = file else {
                return Err(format!(
                    "state {kind}: a piece points to file {}, which is not a payload file",
                    piece.file
                ));
            };
            let bytes = (piece.region.len() * state.dtype.bytes()) as u64;
            match piece.offset.checked_add(bytes) {
                Some(end) if end <= file.bytes => spans[piece.file].push((piece.offset, end)),
                _ => {
                    return Err(format!(
                        "state {kind}: a piece of {bytes} bytes at offset {} leaves file `{}` of \
                         {} bytes",
                        piece.offset, file.name, file.bytes
                    ));
                }
            }
        }
        let regions: Vec<_> = state.pieces.iter().map(|piece| &piece.region).collect();
        coverage::check(shape, count, &regions)
            .map_err(|detail| format!("state {kind}: {detail}"))?;
    }
    Ok(())
}
