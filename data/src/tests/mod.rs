//! Tests of the whole reading side on small datasets made here.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod locking;
mod ordering;
mod reading;
mod skipping;

use crate::shard::{DocumentRow, ShardHeader, ShardWriter};
use crate::{
    BatchIndex, Cursor, Dataset, DatasetSpec, Loader, Next, Piece, RankBatch, SampleIndex,
    SourceSpec,
};
use std::path::{Path, PathBuf};

/// Ids of the made datasets are below this.
const VOCAB: usize = 1000;

/// What a loader has next, where it has something.
fn next_batch(loader: &mut Loader) -> RankBatch {
    match loader.next_batch(&|| false).unwrap() {
        Next::Batch(batch, _) => batch,
        none => panic!("{none:?}"),
    }
}

/// Document `number` of a source has a length of 1 to 40 and tokens that tell it from others; the
/// last is the end-of-text id 0.
fn document(source: &str, number: u32) -> Vec<u32> {
    let word = crate::mix::key(&[crate::mix::name_word(source), u64::from(number)]);
    let length = 1 + word % 40;
    (1..length)
        .map(|i| 1 + (crate::mix::key(&[word, i]) % (VOCAB as u64 - 1)) as u32)
        .chain([0])
        .collect()
}

/// Writes documents `numbers` of a source as one shard with row groups of about 100 tokens.
fn write_shard(path: &Path, source: &str, numbers: std::ops::Range<u32>) {
    let header = ShardHeader {
        tokenizer: "made".into(),
        vocab_size: VOCAB,
        eos_id: 0,
    };
    let mut writer = ShardWriter::create(path, &header, 100, false).unwrap();
    for number in numbers {
        let doc_id = format!("{source}-{number}");
        let tokens = document(source, number);
        writer
            .push(DocumentRow {
                doc_id: &doc_id,
                source: "",
                tokens: &tokens,
                loss_weight: None,
            })
            .unwrap();
    }
    writer.finish().unwrap();
}

/// A folder with sources "a" (two shards, 150 documents) and "b" (one shard, 60 documents).
struct Made {
    folder: tempfile::TempDir,
}

impl Made {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        write_shard(&folder.path().join("a/0.parquet"), "a", 0..80);
        write_shard(&folder.path().join("a/1.parquet"), "a", 80..150);
        write_shard(&folder.path().join("b/0.parquet"), "b", 0..60);
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Both sources, windows of at least 300 tokens, a tenth for validation.
    fn spec(&self, seed: u64) -> DatasetSpec {
        let source = |name: &str| SourceSpec {
            name: name.to_string(),
            paths: vec![self.path(name)],
            weight: 1.0,
            max_epochs: None,
        };
        DatasetSpec {
            sources: vec![source("a"), source("b")],
            seed,
            window_tokens: 300,
            validation_fraction: 0.1,
            vocab_size: VOCAB,
            lock: self.path("dataset.lock"),
        }
    }

    fn open(&self, seed: u64) -> Dataset {
        Dataset::open(&self.spec(seed)).unwrap()
    }
}

/// The tokens of one source's pieces as (shard, row group, row, position), in order.
fn positions(samples: &[SampleIndex], source: u32) -> Vec<(u32, u32, u32, u32)> {
    let of_piece = |piece: &Piece| {
        let Piece {
            shard,
            row_group,
            row,
            start,
            length,
            ..
        } = *piece;
        (start..start + length)
            .map(move |at| (shard, row_group, row, at))
            .collect::<Vec<_>>()
    };
    samples
        .iter()
        .filter(|s| s.source == source)
        .flat_map(|s| &s.pieces)
        .flat_map(of_piece)
        .collect()
}

/// Batches of `size` until the data end, and the cursors after each.
fn drain(
    dataset: &Dataset,
    cursor: &Cursor,
    seq_len: usize,
    weights: &[f64],
    size: usize,
) -> Vec<(BatchIndex, Cursor)> {
    let mut stream = dataset.stream(cursor, seq_len, weights).unwrap();
    let mut batches = Vec::new();
    while let Ok(batch) = stream.next_batch(size) {
        batches.push((batch, stream.cursor()));
        assert!(batches.len() < 10_000, "the data never end");
    }
    batches
}

/// The samples of batches.
fn samples(batches: Vec<(BatchIndex, Cursor)>) -> Vec<SampleIndex> {
    batches
        .into_iter()
        .flat_map(|(batch, _)| batch.samples)
        .collect()
}
