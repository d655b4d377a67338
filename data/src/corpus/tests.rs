#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::*;
use crate::error::Error;
use std::path::Path;

fn write(folder: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, bytes).unwrap();
    path
}

fn read(options: &CorpusOptions) -> crate::Result<(Vec<Document>, ReadCounts)> {
    let corpus = Corpus::scan(options)?;
    let mut documents = corpus.documents();
    let all = documents.by_ref().collect::<crate::Result<Vec<_>>>()?;
    Ok((all, documents.counts()))
}

#[test]
fn a_tree_is_read_in_order_and_repaired() {
    let folder = tempfile::tempdir().unwrap();
    let tree = folder.path().join("tree");
    write(&tree, "b/two.md", "zwei äö".as_bytes());
    write(&tree, "a.rs", b"fn one() {}");
    write(&tree, "a-copy.rs", b"fn one() {}");
    write(&tree, ".git/config.rs", b"hidden");
    write(&tree, "image.rs", b"\x89PNG\0\0");
    write(&tree, "latin.rs", b"caf\xe9");
    write(&tree, "blank.rs", b" \n");
    write(&tree, "large.rs", &[b'x'; 200]);
    write(&tree, "other.xyz", b"no");
    let mut options = CorpusOptions::new(vec![tree.clone()]);
    options.extensions = vec!["rs".into(), ".md".into()];
    options.max_file_bytes = Some(100);
    let (documents, counts) = read(&options).unwrap();
    let origins: Vec<_> = documents.iter().map(|d| d.origin.as_str()).collect();
    assert_eq!(
        origins,
        [
            "tree/a-copy.rs",
            "tree/a.rs",
            "tree/b/two.md",
            "tree/latin.rs"
        ]
    );
    assert_eq!(documents[0].id, documents[1].id, "copies share an id");
    assert_ne!(documents[1].id, documents[2].id);
    assert_eq!(documents[3].text, "caf\u{fffd}");
    let ReadCounts {
        documents: n,
        repaired,
        binary,
        empty,
        ..
    } = counts;
    assert_eq!((n, repaired, binary, empty), (4, 1, 1, 1));
    let left_out = Corpus::scan(&options).unwrap().left_out();
    assert_eq!((left_out.other_extension, left_out.too_large), (1, 1));
    // The order of the arguments and doubled inputs change nothing.
    let twice = CorpusOptions {
        inputs: vec![tree.clone(), tree],
        ..options
    };
    assert_eq!(read(&twice).unwrap().0, documents);
}

#[test]
fn jsonl_lines() {
    let folder = tempfile::tempdir().unwrap();
    let path = write(
        folder.path(),
        "x.jsonl",
        b"{\"body\": \"one\", \"key\": 7}\n\n{\"key\": \"k\", \"body\": \"tw\xff\"}\n{\"body\":\"\",\"key\":1}",
    );
    let mut options = CorpusOptions::new(vec![path]);
    options.text_field = "body".into();
    options.id_field = Some("key".into());
    let (documents, counts) = read(&options).unwrap();
    let ids: Vec<_> = documents
        .iter()
        .map(|d| (d.id.as_str(), d.origin.as_str()))
        .collect();
    assert_eq!(ids, [("7", "x.jsonl:1"), ("k", "x.jsonl:3")]);
    assert_eq!(documents[1].text, "tw\u{fffd}");
    assert_eq!(counts.empty, 1);

    options.text_field = "text".into();
    let text = read(&options).unwrap_err().to_string();
    assert!(
        text.contains("line 1") && text.contains("fields: body, key"),
        "{text}"
    );
    let broken = write(folder.path(), "y.jsonl", b"{\"text\": \"a\"}\n{\"text\": ");
    let error = read(&CorpusOptions::new(vec![broken])).unwrap_err();
    assert!(
        matches!(&error, Error::Record { place, .. } if place == "line 2"),
        "{error}"
    );
}

#[test]
fn parquet_rows() {
    use arrow_array::{ArrayRef, Int32Array, LargeStringArray, RecordBatch, StringArray};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.parquet");
    let text: ArrayRef = std::sync::Arc::new(LargeStringArray::from(vec![
        Some("one"),
        None,
        Some("three"),
    ]));
    let id: ArrayRef = std::sync::Arc::new(StringArray::from(vec!["a", "b", "c"]));
    let number: ArrayRef = std::sync::Arc::new(Int32Array::from(vec![1, 2, 3]));
    let columns = [
        ("content", text, true),
        ("id", id, false),
        ("n", number, false),
    ];
    let batch = RecordBatch::try_from_iter_with_nullable(columns).unwrap();
    let file = std::fs::File::create(&path).unwrap();
    let mut writer = ::parquet::arrow::ArrowWriter::try_new(file, batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    let mut options = CorpusOptions::new(vec![path.clone()]);
    options.text_field = "content".into();
    options.id_field = Some("id".into());
    let (documents, counts) = read(&options).unwrap();
    let found: Vec<_> = documents
        .iter()
        .map(|d| (&*d.id, &*d.origin, &*d.text))
        .collect();
    assert_eq!(
        found,
        [("a", "x.parquet:0", "one"), ("c", "x.parquet:2", "three")]
    );
    assert_eq!(counts.empty, 1);

    options.text_field = "n".into();
    let text = read(&options).unwrap_err().to_string();
    assert!(
        text.contains("\"n\"") && text.contains("content (LargeUtf8)"),
        "{text}"
    );
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    assert!(matches!(read(&options), Err(Error::Parquet { .. })));
}

#[test]
fn nothing_to_read_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let error = read(&CorpusOptions::new(vec![folder.path().into()])).unwrap_err();
    assert!(matches!(error, Error::EmptyCorpus(_)), "{error}");
    let missing = CorpusOptions::new(vec![folder.path().join("none")]);
    assert!(matches!(read(&missing), Err(Error::Io { .. })));
}
