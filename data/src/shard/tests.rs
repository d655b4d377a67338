#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::*;
use crate::error::Error;
use std::path::{Path, PathBuf};

fn header() -> ShardHeader {
    ShardHeader {
        tokenizer: "test".into(),
        vocab_size: 100,
        eos_id: 0,
    }
}

/// Ten documents of 1..=10 tokens in row groups of at least 12.
fn write_shard(folder: &Path) -> PathBuf {
    let path = folder.join("shard.parquet");
    let mut writer = ShardWriter::create(&path, &header(), 12, false).unwrap();
    for n in 1..=10u32 {
        let tokens: Vec<u32> = (0..n).map(|i| (n * 7 + i) % 100).collect();
        let id = format!("doc-{n}");
        let row = DocumentRow {
            doc_id: &id,
            source: "s",
            tokens: &tokens,
            loss_weight: None,
        };
        writer.push(row).unwrap();
    }
    writer.finish().unwrap();
    path
}

#[test]
fn round_trip() {
    let folder = tempfile::tempdir().unwrap();
    let shard = Shard::open(&write_shard(folder.path())).unwrap();
    assert_eq!((shard.documents(), shard.tokens()), (10, 55));
    assert_eq!(shard.header(), &header());
    assert!(shard.row_groups().len() > 2);
    assert!(
        shard
            .row_groups()
            .iter()
            .rev()
            .skip(1)
            .all(|g| g.tokens >= 12)
    );
    let mut n = 0u32;
    for group in 0..shard.row_groups().len() {
        let tokens = shard.read_tokens(group, 100).unwrap();
        let index = shard.read_index(group, true).unwrap();
        assert_eq!(tokens.documents(), index.lengths.len());
        for row in 0..tokens.documents() {
            n += 1;
            let expected: Vec<u32> = (0..n).map(|i| (n * 7 + i) % 100).collect();
            assert_eq!(tokens.document(row), expected);
            assert_eq!(index.lengths[row], n);
            assert_eq!(index.ids.as_ref().unwrap()[row], format!("doc-{n}"));
        }
        assert!(tokens.document(tokens.documents()).is_empty());
    }
    let leftovers: Vec<_> = std::fs::read_dir(folder.path()).unwrap().collect();
    assert_eq!(leftovers.len(), 1, "{leftovers:?}");
}

#[test]
fn weights_round_trip() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("w.parquet");
    let mut writer = ShardWriter::create(&path, &header(), 100, true).unwrap();
    let weights = [half::f16::from_f32(0.5), half::f16::from_f32(0.0)];
    let row = DocumentRow {
        doc_id: "a",
        source: "",
        tokens: &[1, 0],
        loss_weight: Some(&weights),
    };
    writer.push(row).unwrap();
    assert!(
        writer
            .push(DocumentRow {
                loss_weight: None,
                ..row
            })
            .is_err()
    );
    writer.finish().unwrap();
    let group = Shard::open(&path).unwrap().read_tokens(0, 100).unwrap();
    assert_eq!(group.weights(0), Some(&[0.5, 0.0][..]));
}

#[test]
fn a_dropped_writer_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s.parquet");
    drop(ShardWriter::create(&path, &header(), 100, false).unwrap());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn the_writer_refuses_what_the_reader_would() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s.parquet");
    let mut writer = ShardWriter::create(&path, &header(), 100, false).unwrap();
    let row = DocumentRow {
        doc_id: "a",
        source: "",
        tokens: &[],
        loss_weight: None,
    };
    assert!(matches!(writer.push(row), Err(Error::Row { .. })));
    let row = DocumentRow {
        tokens: &[3, 100],
        ..row
    };
    let error = writer.push(row).unwrap_err();
    assert!(
        matches!(
            error,
            Error::TokenOutOfRange {
                position: 1,
                id: 100,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn ids_past_the_vocabulary_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let shard = Shard::open(&write_shard(folder.path())).unwrap();
    // Document 10 holds ids 70..80 and is the only one with ids past 72.
    let last = shard.row_groups().len() - 1;
    assert!(shard.read_tokens(0, 73).is_ok());
    let error = shard.read_tokens(last, 73).unwrap_err();
    let text = error.to_string();
    let Error::TokenOutOfRange { position, id, .. } = error else {
        panic!("{text}")
    };
    assert_eq!((position, id), (3, 73));
    assert!(
        text.contains("shard.parquet") && text.contains("row 0"),
        "{text}"
    );
}

#[test]
fn files_cut_short_are_refused_at_every_length() {
    let folder = tempfile::tempdir().unwrap();
    let whole = std::fs::read(write_shard(folder.path())).unwrap();
    let cut = folder.path().join("cut.parquet");
    for keep in (0..whole.len()).step_by(37) {
        std::fs::write(&cut, &whole[..keep]).unwrap();
        let error = Shard::open(&cut).unwrap_err();
        assert!(matches!(error, Error::Parquet { .. }), "{keep}: {error}");
        assert!(error.to_string().contains("cut.parquet"));
    }
}

/// Any flipped byte either changes nothing that is read or is an error; never a panic that
/// escapes, never other tokens.
#[test]
fn damaged_files_never_yield_other_tokens() {
    let folder = tempfile::tempdir().unwrap();
    let path = write_shard(folder.path());
    let shard = Shard::open(&path).unwrap();
    let read = |shard: &Shard| -> crate::Result<Vec<RowGroupTokens>> {
        (0..shard.row_groups().len())
            .map(|g| shard.read_tokens(g, 100))
            .collect()
    };
    let right = read(&shard).unwrap();
    let whole = std::fs::read(&path).unwrap();
    let broken = folder.path().join("broken.parquet");
    let (mut errors, mut same) = (0, 0);
    for at in (0..whole.len()).step_by(3) {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        std::fs::write(&broken, &bytes).unwrap();
        match Shard::open(&broken).and_then(|shard| read(&shard)) {
            Ok(tokens) => {
                assert_eq!(tokens, right, "byte {at}");
                same += 1;
            }
            Err(_) => errors += 1,
        }
    }
    assert!(errors > 0 && same > 0, "{errors} errors, {same} unchanged");
}

#[test]
fn parquet_that_is_no_shard_is_refused() {
    use arrow_array::{ArrayRef, Int64Array, RecordBatch};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("other.parquet");
    let column: ArrayRef = std::sync::Arc::new(Int64Array::from(vec![1, 2]));
    let batch = RecordBatch::try_from_iter([("tokens", column)]).unwrap();
    let file = std::fs::File::create(&path).unwrap();
    let mut writer = parquet::arrow::ArrowWriter::try_new(file, batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    let text = Shard::open(&path).unwrap_err().to_string();
    assert!(
        text.contains("\"tokens\"") && text.contains("Int64"),
        "{text}"
    );
}
