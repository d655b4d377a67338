#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::*;
use crate::corpus::{Corpus, CorpusOptions};
use crate::progress::Progress;
use crate::shard::Shard;
use crate::{TokenizeOptions, tokenize};

/// Some text with repetition, non-ASCII letters, digits and code.
fn corpus(folder: &Path) -> Corpus {
    let inputs = folder.join("text");
    std::fs::create_dir_all(&inputs).unwrap();
    for n in 0..40 {
        let text = format!(
            "fn item_{n}(x: usize) -> usize {{\n    x + {n}\n}}\n\n// Größe {n}: don't guess, \
             measure; the measure of item {n} is {}.\n",
            n * 1234567
        );
        std::fs::write(inputs.join(format!("{n:02}.rs")), text).unwrap();
    }
    Corpus::scan(&CorpusOptions::new(vec![inputs])).unwrap()
}

fn options(vocab_size: usize) -> TrainOptions {
    TrainOptions {
        vocab_size,
        special_tokens: vec!["<|endoftext|>".into(), "<|pad|>".into()],
        sample_bytes: u64::MAX,
    }
}

fn trained(folder: &Path) -> TextTokenizer {
    let out = folder.join("tok");
    train(&corpus(folder), &options(320), &out, &Progress::silent()).unwrap();
    TextTokenizer::load(&out, None).unwrap()
}

#[test]
fn training_is_repeatable_and_decodes_to_the_same_text() {
    let folder = tempfile::tempdir().unwrap();
    let (corpus, out) = (corpus(folder.path()), folder.path().join("tok"));
    let report = train(&corpus, &options(320), &out, &Progress::silent()).unwrap();
    assert_eq!(report.vocab_size, 320);
    assert_eq!(report.documents, 40);
    assert!(report.bytes_per_token > 1.3, "{}", report.bytes_per_token);
    let first = std::fs::read(&report.path).unwrap();
    train(&corpus, &options(320), &out, &Progress::silent()).unwrap();
    assert_eq!(first, std::fs::read(&report.path).unwrap());

    let tokenizer = TextTokenizer::load(&out, None).unwrap();
    assert_eq!((tokenizer.eos_id(), tokenizer.vocab_size()), (0, 320));
    for text in [
        "fn größe() -> 12345\r\n\t  don't  ",
        "  日本語 🦀\u{0}\n\n\n",
        " ",
        "a",
    ] {
        let ids = tokenizer.encode_document(text).unwrap();
        assert_eq!(ids.last(), Some(&0));
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
        assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
    }
}

#[test]
fn text_cannot_spell_a_special_token() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = trained(folder.path());
    let ids = tokenizer.encode("a<|endoftext|>b").unwrap();
    assert!(!ids.contains(&tokenizer.eos_id()));
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "a<|endoftext|>b");
}

#[test]
fn options_that_cannot_work_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let corpus = corpus(folder.path());
    let out = folder.path().join("never");
    let no_special = TrainOptions {
        special_tokens: Vec::new(),
        ..options(300)
    };
    let twice = TrainOptions {
        special_tokens: vec!["a".into(); 2],
        ..options(300)
    };
    for options in [options(258), options(1 << 25), no_special, twice] {
        let error = train(&corpus, &options, &out, &Progress::silent()).unwrap_err();
        assert!(matches!(error, Error::Option { .. }), "{error}");
    }
    assert!(!out.exists());
    let tokenizer = trained(folder.path());
    let error = TextTokenizer::load(tokenizer.path(), Some("<none>")).unwrap_err();
    assert!(error.to_string().contains("<none>"));
    assert!(TextTokenizer::load(&folder.path().join("text/00.rs"), None).is_err());
}

#[test]
fn a_sample_is_a_part_of_the_corpus() {
    let folder = tempfile::tempdir().unwrap();
    let corpus = corpus(folder.path());
    let sampled = TrainOptions {
        sample_bytes: corpus.bytes() / 2,
        ..options(300)
    };
    let out = folder.path().join("tok");
    let report = train(&corpus, &sampled, &out, &Progress::silent()).unwrap();
    assert!((8..32).contains(&report.documents), "{}", report.documents);
}

#[test]
fn tokenising_gives_the_same_shards_on_any_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    let (corpus, tokenizer) = (corpus(folder.path()), trained(folder.path()));
    let run = |name: &str, threads: usize| {
        let options = TokenizeOptions {
            out: folder.path().join(name),
            row_group_tokens: 500,
            shard_tokens: 1500,
            threads,
            overwrite: false,
        };
        tokenize(&corpus, &tokenizer, &options, &Progress::silent()).map(|r| (r, options))
    };
    let (one, options) = run("one", 1).unwrap();
    let (two, _) = run("two", 2).unwrap();
    assert!(one.shards.len() > 1);
    assert_eq!(one.read.documents, 40);
    let mut documents = Vec::new();
    for (a, b) in one.shards.iter().zip(&two.shards) {
        assert_eq!(
            std::fs::read(&a.path).unwrap(),
            std::fs::read(&b.path).unwrap()
        );
        let shard = Shard::open(&a.path).unwrap();
        assert_eq!(shard.header().tokenizer, tokenizer.hash());
        for group in 0..shard.row_groups().len() {
            let tokens = shard.read_tokens(group, 320).unwrap();
            documents.extend((0..tokens.documents()).map(|row| tokens.document(row).to_vec()));
        }
    }
    let expected: Vec<Vec<u32>> = corpus
        .documents()
        .map(|document| tokenizer.encode_document(&document.unwrap().text).unwrap())
        .collect();
    assert_eq!(documents, expected);

    // An existing folder is not touched without being told to.
    let error = tokenize(&corpus, &tokenizer, &options, &Progress::silent()).unwrap_err();
    assert!(error.to_string().contains("--overwrite"), "{error}");
    let again = TokenizeOptions {
        overwrite: true,
        ..options
    };
    tokenize(&corpus, &tokenizer, &again, &Progress::silent()).unwrap();
    let shown = crate::inspect(std::slice::from_ref(&again.out), Some(&tokenizer)).unwrap();
    assert!(shown.to_string().contains("fn item_0(x: usize)"), "{shown}");
}

#[test]
fn a_failed_run_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = trained(folder.path());
    let input = folder.path().join("bad.jsonl");
    std::fs::write(&input, "{\"text\": \"good\"}\nnot json\n").unwrap();
    let corpus = Corpus::scan(&CorpusOptions::new(vec![input])).unwrap();
    let options = TokenizeOptions {
        out: folder.path().join("out/shards"),
        row_group_tokens: 500,
        shard_tokens: 1500,
        threads: 2,
        overwrite: false,
    };
    let error = tokenize(&corpus, &tokenizer, &options, &Progress::silent()).unwrap_err();
    assert!(error.to_string().contains("line 2"), "{error}");
    assert_eq!(
        std::fs::read_dir(folder.path().join("out"))
            .unwrap()
            .count(),
        0
    );
}
