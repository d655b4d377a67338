//! The lock, and everything that opening a dataset refuses.

use super::*;
use crate::Error;

#[test]
fn the_lock_is_built_once_and_outlives_a_move() {
    let made = Made::new();
    let first = made.open(1);
    let bytes = std::fs::read(made.path("dataset.lock")).unwrap();
    let again = made.open(2);
    assert_eq!(first.fingerprint(), again.fingerprint());
    assert_eq!(bytes, std::fs::read(made.path("dataset.lock")).unwrap());
    // Files renamed and the whole moved: the contents decide.
    std::fs::rename(made.path("a/0.parquet"), made.path("a/zero.parquet")).unwrap();
    let order = |dataset: &Dataset| {
        let mut stream = dataset.stream(&dataset.start(), 20, &[1.0, 1.0]).unwrap();
        let batch = stream.next_batch(20).unwrap();
        batch
            .samples
            .iter()
            .map(|s| dataset.read(s).unwrap().tokens)
            .collect::<Vec<_>>()
    };
    let moved = made.open(1);
    assert_eq!(moved.fingerprint(), first.fingerprint());
    std::fs::rename(made.path("a/zero.parquet"), made.path("a/0.parquet")).unwrap();
    let back = made.open(1);
    std::fs::rename(made.path("a/0.parquet"), made.path("a/zero.parquet")).unwrap();
    assert_eq!(order(&moved), order(&made.open(1)));
    drop(back);
}

#[test]
fn a_changed_file_is_refused_with_the_difference() {
    let made = Made::new();
    made.open(1);
    write_shard(&made.path("a/1.parquet"), "a", 80..151);
    let error = Dataset::open(&made.spec(1)).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, Error::LockMismatch { .. }), "{text}");
    assert!(
        text.contains("1.parquet changed") && text.contains("documents 70 → 71"),
        "{text}"
    );

    std::fs::remove_file(made.path("a/1.parquet")).unwrap();
    let text = Dataset::open(&made.spec(1)).unwrap_err().to_string();
    assert!(text.contains("1.parquet is missing"), "{text}");
}

#[test]
fn other_parameters_and_an_edited_lock_are_refused() {
    let made = Made::new();
    made.open(1);
    let mut spec = made.spec(1);
    spec.window_tokens = 400;
    spec.validation_fraction = 0.2;
    let text = Dataset::open(&spec).unwrap_err().to_string();
    assert!(text.contains("data.window_tokens 300 → 400"), "{text}");
    assert!(text.contains("validation.fraction 0.1 → 0.2"), "{text}");

    let lock = made.path("dataset.lock");
    let edited = std::fs::read_to_string(&lock)
        .unwrap()
        .replace("\"size_bytes\":", "\"size_bytes\":1");
    std::fs::write(&lock, edited).unwrap();
    assert!(matches!(
        Dataset::open(&made.spec(1)),
        Err(Error::Lock { .. })
    ));
    std::fs::write(&lock, "{").unwrap();
    assert!(matches!(
        Dataset::open(&made.spec(1)),
        Err(Error::Lock { .. })
    ));
}

#[test]
fn new_files_enter_when_admitted_and_move_nothing() {
    let made = Made::new();
    let before = made.open(1);
    let mut stream = before.stream(&before.start(), 25, &[1.0, 1.0]).unwrap();
    stream.next_batch(10).unwrap();
    let cursor = stream.cursor();
    write_shard(&made.path("a/0-earlier.parquet"), "a", 150..200);

    let waiting = made.open(1);
    assert_eq!(waiting.fingerprint(), before.fingerprint());
    assert_eq!(waiting.new_files(), [made.path("a/0-earlier.parquet")]);
    let admitted = waiting.admit_new_files().unwrap();
    assert!(admitted.new_files().is_empty());
    assert_ne!(admitted.fingerprint(), before.fingerprint());
    assert!(admitted.summary()[0].tokens > before.summary()[0].tokens);

    // What was in the epoch stays where it was; the new documents follow.
    let tokens = |dataset: &Dataset| {
        let mut spec = dataset.inner.spec.clone();
        spec.sources
            .iter_mut()
            .for_each(|s| s.max_epochs = Some(1.0));
        let limited = Dataset::open_at(&spec, dataset.fingerprint()).unwrap();
        let all = samples(drain(&limited, &cursor, 25, &[1.0, 0.0], 1));
        all.iter()
            .map(|index| limited.read(index).unwrap().tokens)
            .collect::<Vec<_>>()
    };
    let (old, new) = (tokens(&before), tokens(&admitted));
    assert!(new.len() > old.len());
    assert_eq!(new[..old.len()], old[..]);
    // A run that stopped before the admission finds its own dataset again.
    let resumed = Dataset::open_at(&made.spec(1), before.fingerprint()).unwrap();
    assert_eq!(resumed.summary(), before.summary());
    assert!(Dataset::open_at(&made.spec(1), "0").is_err());
}

#[test]
fn what_cannot_train_is_refused_with_a_remedy() {
    let made = Made::new();
    let dataset = made.open(1);
    let error = dataset
        .stream(&dataset.start(), 5000, &[1.0, 1.0])
        .unwrap_err();
    assert!(
        matches!(error, Error::SequenceTooLong { seq_len: 5000, .. }),
        "{error}"
    );
    for weights in [&[1.0][..], &[0.0, 0.0], &[-1.0, 2.0], &[f64::NAN, 1.0]] {
        assert!(
            dataset.stream(&dataset.start(), 10, weights).is_err(),
            "{weights:?}"
        );
    }
    let mut foreign = dataset.start();
    foreign.sources[0].name = "c".into();
    assert!(matches!(
        dataset.stream(&foreign, 10, &[1.0, 1.0]),
        Err(Error::Cursor(_))
    ));
    let mut far = dataset.start();
    far.sources[0].window = 1_000_000;
    assert!(matches!(
        dataset.stream(&far, 10, &[1.0, 1.0]),
        Err(Error::Cursor(_))
    ));

    let mut small = made.spec(1);
    small.vocab_size = 500;
    let text = Dataset::open(&small).unwrap_err().to_string();
    assert!(text.contains("1000") && text.contains("500"), "{text}");
    let mut nowhere = made.spec(1);
    nowhere.sources[0].paths = vec![made.path("none/*.parquet")];
    assert!(matches!(
        Dataset::open(&nowhere),
        Err(Error::EmptyCorpus(_))
    ));
}

#[test]
fn shards_of_two_tokenizers_are_refused() {
    let made = Made::new();
    let header = ShardHeader {
        tokenizer: "other".into(),
        vocab_size: VOCAB,
        eos_id: 0,
    };
    let path = made.path("b/1.parquet");
    let mut writer = ShardWriter::create(&path, &header, 100, false).unwrap();
    let row = DocumentRow {
        doc_id: "x",
        source: "",
        tokens: &[1, 0],
        loss_weight: None,
    };
    writer.push(row).unwrap();
    writer.finish().unwrap();
    let error = Dataset::open(&made.spec(1)).unwrap_err();
    assert!(matches!(error, Error::TokenizerMismatch { .. }), "{error}");
}

/// The vocabulary that a shard states may be a lie; ids are checked all the same.
#[test]
fn ids_past_the_model_s_vocabulary_are_found_when_read() {
    let made = Made::new();
    let dataset = made.open(1);
    let shard = dataset.inner.shards[0].clone();
    let largest = (0..shard.row_groups().len())
        .map(|group| shard.read_tokens(group, VOCAB).unwrap())
        .flat_map(|tokens| {
            (0..tokens.documents())
                .flat_map(move |row| tokens.document(row).to_vec())
                .collect::<Vec<_>>()
        })
        .max()
        .unwrap();
    let found = (0..shard.row_groups().len())
        .filter_map(|group| shard.read_tokens(group, largest as usize).err())
        .collect::<Vec<_>>();
    assert!(matches!(found[..], [Error::TokenOutOfRange { id, .. }, ..] if id == largest));
}

#[test]
fn verify_names_what_is_wrong_and_goes_on() {
    let made = Made::new();
    made.open(1);
    let lock = made.path("dataset.lock");
    let progress = crate::Progress::silent();
    let right = crate::verify(std::slice::from_ref(&lock), &progress).unwrap();
    assert_eq!(
        (right.files, right.documents, right.problems.len()),
        (3, 210, 0)
    );

    write_shard(&made.path("a/1.parquet"), "a", 80..140);
    let path = made.path("b/0.parquet");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[60] ^= 0xff;
    std::fs::write(&path, bytes).unwrap();
    let wrong = crate::verify(&[lock], &progress).unwrap();
    let text = wrong.problems.join("\n");
    assert!(
        text.contains("a/1.parquet differs") && text.contains("documents 70 → 60"),
        "{text}"
    );
    assert!(text.contains("b/0.parquet, row group 0"), "{text}");

    let figures = crate::inspect(&[made.path("a")], None).unwrap();
    assert_eq!(figures.documents_by_length.iter().sum::<u64>(), 140);
    assert!(figures.to_string().contains("140 documents"));
    let figures = crate::inspect(&[made.path("dataset.lock")], None);
    assert!(figures.is_ok_and(|f| {
        f.to_string()
            .contains("source \"b\": 1 files, 60 documents")
    }));
}

/// Every line that tells how the data differ from those of a run, without the first.
fn refusal(made: &Made, fingerprint: &str) -> String {
    let error = Dataset::open_at(&made.spec(1), fingerprint).unwrap_err();
    assert!(matches!(error, Error::LockMismatch { .. }), "{error}");
    error.to_string()
}

#[test]
fn changed_data_are_opened_when_that_is_allowed() {
    let made = Made::new();
    let before = made.open(1);
    let known = before.fingerprint().to_owned();
    let unchanged = Dataset::open_changed(&made.spec(1), Some(&known)).unwrap();
    assert_eq!(unchanged.0.fingerprint(), known);
    assert_eq!(unchanged.1, [""; 0]);
    assert!(!made.path("dataset.lock.replaced-1").exists());

    write_shard(&made.path("a/1.parquet"), "a", 80..120);
    std::fs::remove_file(made.path("b/0.parquet")).unwrap();
    write_shard(&made.path("b/1.parquet"), "b", 0..50);
    let lines = [
        "source \"a\": a/1.parquet changed: bytes",
        "documents 70 → 40",
        "source \"b\": b/0.parquet is missing",
    ];
    let text = refusal(&made, &known);
    for line in lines.iter().chain(&["--allow-data-change"]) {
        assert!(text.contains(line), "no {line:?} in {text}");
    }

    let old = std::fs::read(made.path("dataset.lock")).unwrap();
    let (changed, differences) = Dataset::open_changed(&made.spec(1), Some(&known)).unwrap();
    let text = differences.join("\n");
    assert!(lines.iter().all(|line| text.contains(line)), "{text}");
    assert_eq!(changed.summary()[1].files, 1);
    assert!(changed.new_files().is_empty());
    assert_eq!(
        std::fs::read(made.path("dataset.lock.replaced-1")).unwrap(),
        old
    );
    // From now on the data are those of the new lock.
    let reopened = Dataset::open_at(&made.spec(1), changed.fingerprint()).unwrap();
    assert_eq!(reopened.summary(), changed.summary());

    // A run that knew them otherwise is told what has changed, by the lock that was set aside.
    let text = refusal(&made, &known);
    let aside = [
        "dataset.lock.replaced-1; since then:",
        "b/1.parquet was added",
    ];
    for line in lines.iter().chain(&aside) {
        assert!(text.contains(line), "no {line:?} in {text}");
    }
    let (again, differences) = Dataset::open_changed(&made.spec(1), Some(&known)).unwrap();
    assert_eq!(again.fingerprint(), changed.fingerprint());
    assert!(differences.join("\n").contains("b/1.parquet was added"));
    assert!(!made.path("dataset.lock.replaced-2").exists());

    // Another change, another lock; and one that nobody has kept.
    write_shard(&made.path("a/1.parquet"), "a", 80..100);
    Dataset::open_changed(&made.spec(1), Some(changed.fingerprint())).unwrap();
    assert!(made.path("dataset.lock.replaced-2").exists());
    assert!(refusal(&made, &known).contains("documents 70 → 20"));
    let text = refusal(&made, "0123");
    assert!(
        text.contains("fingerprint 0123") && text.contains("cannot be told"),
        "{text}"
    );
}

#[test]
fn a_cursor_is_fitted_to_data_that_have_shrunk() {
    let made = Made::new();
    let before = made.open(1);
    let mut stream = before.stream(&before.start(), 20, &[1.0, 1.0]).unwrap();
    stream.next_batch(80).unwrap();
    let cursor = stream.cursor();
    assert_eq!(cursor.fitted(&before), (cursor.clone(), Vec::new()));
    let a = cursor.sources[0].clone();
    assert!(a.epoch == 0 && a.window > 0, "{a:?}");

    std::fs::remove_file(made.path("a/1.parquet")).unwrap();
    write_shard(&made.path("a/0.parquet"), "a", 0..16);
    let (after, _) = Dataset::open_changed(&made.spec(1), None).unwrap();
    let (fitted, moved) = cursor.fitted(&after);
    assert_eq!(fitted.sources[1], cursor.sources[1]);
    assert!(fitted.sources[0].window < a.window && fitted.sources[0].offset == 0);
    assert!(
        moved.len() == 1 && moved[0].contains("source \"a\" goes on with epoch 1"),
        "{moved:?}"
    );
    let mut stream = after.stream(&fitted, 20, &[1.0, 1.0]).unwrap();
    stream.next_batch(10).unwrap();
    assert!(stream.cursor().sources[0].epoch >= 1);
    assert!(matches!(
        after.stream(&cursor, 20, &[1.0, 1.0]),
        Err(Error::Cursor(_))
    ));

    let mut foreign = cursor.clone();
    foreign.sources[0].name = "c".into();
    let (fitted, moved) = foreign.fitted(&after);
    assert_eq!((fitted.sources.len(), moved.len()), (1, 1));
}
