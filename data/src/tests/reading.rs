//! Samples, validation and the loader.

use super::*;
use crate::{Error, LoaderOptions, NO_TARGET, Next, assign, is_validation};
use std::collections::HashSet;

/// The document that a piece belongs to, from its number in the made data.
fn tokens_of(dataset: &Dataset, piece: &Piece) -> Vec<u32> {
    let shard = &dataset.inner.shards[piece.shard as usize];
    let ids = shard
        .read_index(piece.row_group as usize, true)
        .unwrap()
        .ids
        .unwrap();
    let (source, number) = ids[piece.row as usize].split_once('-').unwrap();
    document(source, number.parse().unwrap())
}

#[test]
fn samples_hold_the_documents_and_predict_inside_them() {
    let made = Made::new();
    let dataset = made.open(9);
    let mut stream = dataset.stream(&dataset.start(), 48, &[1.0, 1.0]).unwrap();
    let (mut cut, mut padded) = (0, 0);
    for index in stream.next_batch(60).unwrap().samples {
        let sample = dataset.read(&index).unwrap();
        assert_eq!((sample.tokens.len(), sample.targets.len()), (48, 48));
        assert_eq!(sample.weights, None);
        let mut at = 0;
        for (number, piece) in index.pieces.iter().enumerate() {
            assert_eq!(sample.document_starts[number] as usize, at);
            let document = tokens_of(&dataset, piece);
            for position in piece.start..piece.start + piece.length {
                assert_eq!(sample.tokens[at], document[position as usize]);
                let next = document.get(position as usize + 1);
                assert_eq!(
                    sample.targets[at],
                    next.map_or(NO_TARGET, |&id| i64::from(id))
                );
                at += 1;
            }
            cut += u32::from(piece.start + piece.length < piece.document_tokens);
        }
        if at < 48 {
            padded += 1;
            assert_eq!(sample.document_starts[index.pieces.len()] as usize, at);
            assert!(sample.tokens[at..].iter().all(|&id| id == 0));
            assert!(
                sample.targets[at..]
                    .iter()
                    .all(|&target| target == NO_TARGET)
            );
        }
        let targets = sample
            .targets
            .iter()
            .filter(|&&target| target != NO_TARGET)
            .count();
        assert_eq!(targets as u64, index.target_tokens());
    }
    assert!(
        cut > 0 && padded > 0,
        "{cut} cut, {padded} padded: the test saw too little"
    );
}

#[test]
fn validation_never_trains_and_has_one_order() {
    let made = Made::new();
    let dataset = made.open(1);
    let validation = |dataset: &Dataset, seq_len| -> Vec<SampleIndex> {
        dataset
            .validation(seq_len)
            .collect::<crate::Result<_>>()
            .unwrap()
    };
    let kept = validation(&dataset, 32);
    let rows = |samples: &[SampleIndex]| -> HashSet<(u32, u32, u32)> {
        let pieces = samples.iter().flat_map(|s| &s.pieces);
        pieces.map(|p| (p.shard, p.row_group, p.row)).collect()
    };
    let mut spec = made.spec(1);
    spec.sources
        .iter_mut()
        .for_each(|source| source.max_epochs = Some(1.0));
    let dataset = Dataset::open(&spec).unwrap();
    let trained = samples(drain(&dataset, &dataset.start(), 32, &[1.0, 1.0], 1));
    assert!(rows(&kept).is_disjoint(&rows(&trained)));
    assert_eq!(rows(&kept).len() + rows(&trained).len(), 150 + 60);
    let expected = (0..150)
        .filter(|n| is_validation(&format!("a-{n}"), 0.1))
        .count()
        + (0..60)
            .filter(|n| is_validation(&format!("b-{n}"), 0.1))
            .count();
    assert_eq!(rows(&kept).len(), expected);
    // Another seed and another length: the same documents in the same order.
    let other = validation(&made.open(77), 7);
    for source in 0..2 {
        assert_eq!(positions(&kept, source), positions(&other, source));
    }
    // Sources take turns, so that the first samples hold both.
    assert_ne!(kept[0].source, kept[1].source);
}

#[test]
fn loaders_of_all_ranks_together_read_the_batch() {
    let made = Made::new();
    let dataset = made.open(4);
    let stream = || dataset.stream(&dataset.start(), 32, &[1.0, 1.0]).unwrap();
    let options = |rank| LoaderOptions {
        samples_per_batch: 7,
        ranks: 3,
        rank,
        micro_batch: 2,
        batches: 5,
        ahead: 1,
    };
    let mut loaders: Vec<Loader> = (0..3)
        .map(|rank| Loader::start(stream(), options(rank)).unwrap())
        .collect();
    let mut direct = stream();
    for _ in 0..5 {
        let index = direct.next_batch(7).unwrap();
        let assignment = assign(&index, 3, 2);
        for (rank, loader) in loaders.iter_mut().enumerate() {
            let batch = next_batch(loader);
            assert_eq!(batch.cursor, direct.cursor());
            assert_eq!(batch.target_tokens, index.target_tokens());
            assert_eq!((batch.samples, batch.tokens), (7, index.tokens()));
            for (slots, samples) in assignment.rank(rank).iter().zip(&batch.micro_batches) {
                let expected: Vec<_> = slots
                    .iter()
                    .map(|slot| slot.map(|s| dataset.read(&index.samples[s]).unwrap()))
                    .collect();
                assert_eq!(*samples, expected);
            }
        }
    }
    for mut loader in loaders {
        assert!(matches!(loader.next_batch(&|| false).unwrap(), Next::End));
    }
}

#[test]
fn a_loader_passes_errors_on() {
    let made = Made::new();
    let mut spec = made.spec(4);
    spec.sources
        .iter_mut()
        .for_each(|source| source.max_epochs = Some(1.0));
    let dataset = Dataset::open(&spec).unwrap();
    let options = LoaderOptions {
        samples_per_batch: 100_000,
        ranks: 1,
        rank: 0,
        micro_batch: 1,
        batches: 1,
        ahead: 1,
    };
    let stream = dataset.stream(&dataset.start(), 32, &[1.0, 1.0]).unwrap();
    let error = Loader::start(stream, options)
        .unwrap()
        .next_batch(&|| false)
        .unwrap_err();
    assert!(
        matches!(
            error,
            Error::Exhausted {
                wanted: 100_000,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn loss_weights_follow_the_predicted_token() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("w.parquet");
    let header = ShardHeader {
        tokenizer: "made".into(),
        vocab_size: VOCAB,
        eos_id: 0,
    };
    let mut writer = ShardWriter::create(&path, &header, 100, true).unwrap();
    let weights = [0.0, 0.25, 0.5, 1.0].map(half::f16::from_f32);
    for (doc_id, tokens) in [("x", [5, 6, 7, 0]), ("y", [8, 9, 1, 0])] {
        let row = DocumentRow {
            doc_id,
            source: "",
            tokens: &tokens,
            loss_weight: Some(&weights),
        };
        writer.push(row).unwrap();
    }
    writer.finish().unwrap();
    let source = SourceSpec {
        name: "w".into(),
        paths: vec![path],
        weight: 1.0,
        max_epochs: Some(1.0),
    };
    let spec = DatasetSpec {
        sources: vec![source],
        seed: 0,
        window_tokens: 8,
        validation_fraction: 0.0,
        vocab_size: VOCAB,
        lock: folder.path().join("dataset.lock"),
    };
    let dataset = Dataset::open(&spec).unwrap();
    let all = samples(drain(&dataset, &dataset.start(), 6, &[1.0], 1));
    assert_eq!(all.len(), 2);
    let read: Vec<_> = all
        .iter()
        .map(|index| dataset.read(index).unwrap())
        .collect();
    let weights = |n: usize| read[n].weights.clone().unwrap();
    assert_eq!(weights(0), [0.25, 0.5, 1.0, 1.0, 0.25, 0.5]);
    assert_eq!(weights(1), [1.0; 6]);
}
