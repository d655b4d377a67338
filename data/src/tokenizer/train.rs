//! Training a byte-level BPE tokenizer.
//!
//! Text is split into words by a pattern without look-around, which a finite automaton matches in
//! linear time: the usual patterns end in `\s+(?!\S)`, which needs backtracking, and in the
//! `tokenizers` crate a match that exceeds the backtracking limit silently ends the splitting of
//! the whole text. Words are then spelled in bytes and merged; merges never cross a word.

use crate::atomic;
use crate::corpus::Corpus;
use crate::error::{Error, Result};
use crate::mix;
use crate::progress::Progress;
use crate::tokenizer::TextTokenizer;
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use tokenizers::decoders::byte_level::ByteLevel as ByteLevelDecoder;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{
    AddedToken, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer,
    SplitDelimiterBehavior, Tokenizer, Trainer,
};

/// How text is split into words: contractions, a letter run with the one character before it,
/// digits in groups of up to three, punctuation with the line ends after it, line ends with the
/// blanks before them, other blanks.
const WORDS: &str = concat!(
    r"'(?i:s|t|re|ve|m|ll|d)\b",
    r"|[^\r\n\p{L}\p{N}]?\p{L}+",
    r"|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"|\s*[\r\n]+",
    r"|\s+",
);

/// Longest token in bytes: keeps ruler lines and runs of blanks from filling the vocabulary.
const LONGEST_TOKEN: usize = 32;

/// What to train.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainOptions {
    /// Ids in all, special tokens and the 256 bytes included.
    pub vocab_size: usize,
    /// Special tokens; the first ends documents. They get the first ids.
    pub special_tokens: Vec<String>,
    /// Bytes of text to learn from, about: of a larger corpus every document is taken with the
    /// same probability, decided by a hash of it.
    pub sample_bytes: u64,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainReport {
    /// The tokenizer.json.
    pub path: PathBuf,
    /// Ids in its vocabulary; fewer than asked for if the text ran out of repeated pairs.
    pub vocab_size: usize,
    /// Documents and bytes it was learned from.
    pub documents: u64,
    /// Bytes it was learned from.
    pub bytes: u64,
    /// Seconds for reading and counting words.
    pub count_seconds: f64,
    /// Seconds for finding the merges.
    pub merge_seconds: f64,
    /// Bytes per token on the text it was learned from (a sample of it).
    pub bytes_per_token: f64,
}

/// Trains a tokenizer on `corpus` and writes `tokenizer.json` and `tokenizer_config.json` into
/// `folder`. The same corpus and options give the same tokenizer.
///
/// # Errors
/// Options that cannot work, a corpus without documents, or a folder that cannot be written.
pub fn train(
    corpus: &Corpus,
    options: &TrainOptions,
    folder: &Path,
    progress: &Progress,
) -> Result<TrainReport> {
    check(options)?;
    let failed = |e: tokenizers::Error| Error::Tokenizer {
        path: folder.to_path_buf(),
        problem: e.to_string(),
    };
    let mut tokenizer = untrained().map_err(failed)?;
    let special = |token: &String| AddedToken::from(token.clone(), true).normalized(false);
    let mut trainer = BpeTrainer::builder()
        .vocab_size(options.vocab_size)
        .min_frequency(2)
        .special_tokens(options.special_tokens.iter().map(special).collect())
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect::<HashSet<char>>())
        .max_token_length(Some(LONGEST_TOKEN))
        .show_progress(false)
        .build();

    // In two steps, so that a reading error is noticed before the merges are sought.
    let mut texts = SampledTexts::new(corpus, options.sample_bytes, progress);
    trainer
        .feed(texts.by_ref(), |text| words(&tokenizer, text))
        .map_err(failed)?;
    if let Some(error) = texts.error.take() {
        return Err(error);
    }
    if texts.documents == 0 {
        return Err(Error::EmptyCorpus(format!(
            "{} hold no text to learn from; name inputs with text",
            corpus.describe()
        )));
    }
    let count_seconds = progress.seconds();
    progress.phase("finding merges");
    let mut model = BPE::default();
    let special_tokens = trainer.train(&mut model).map_err(failed)?;
    tokenizer.with_model(model);
    tokenizer
        .add_special_tokens(special_tokens)
        .map_err(failed)?;
    let merge_seconds = progress.seconds() - count_seconds;

    let text = tokenizer.to_string(true).map_err(failed)?;
    let path = folder.join("tokenizer.json");
    atomic::write(
        &folder.join("tokenizer_config.json"),
        config(options).as_bytes(),
    )?;
    atomic::write(&path, text.as_bytes())?;
    let trained = TextTokenizer::load(&path, Some(&options.special_tokens[0]))?;
    Ok(TrainReport {
        vocab_size: trained.vocab_size(),
        documents: texts.documents,
        bytes: texts.bytes,
        count_seconds,
        merge_seconds,
        bytes_per_token: bytes_per_token(corpus, &trained)?,
        path,
    })
}

fn check(options: &TrainOptions) -> Result<()> {
    let least = 256 + options.special_tokens.len();
    if options.vocab_size <= least || options.vocab_size > 1 << 24 {
        return Err(Error::Option {
            option: "--vocab-size",
            problem: format!(
                "{} is outside {}..=2^24 (256 bytes and {} special tokens come first)",
                options.vocab_size,
                least + 1,
                options.special_tokens.len()
            ),
        });
    }
    let distinct: HashSet<&String> = options.special_tokens.iter().collect();
    if options.special_tokens.is_empty()
        || distinct.len() < options.special_tokens.len()
        || distinct.iter().any(|token| token.is_empty())
    {
        return Err(Error::Option {
            option: "--special",
            problem: "give at least one special token, each once and none empty; the first ends \
                      documents"
                .to_string(),
        });
    }
    Ok(())
}

/// The pipeline around the merges to be learned.
fn untrained() -> tokenizers::Result<Tokenizer> {
    let words = Split::new(
        SplitPattern::Regex(WORDS.to_string()),
        SplitDelimiterBehavior::Isolated,
        false,
    )?;
    let bytes = ByteLevel::new(false, false, false);
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(PreTokenizerWrapper::from(Sequence::new(vec![
        words.into(),
        bytes.into(),
    ]))));
    tokenizer.with_decoder(Some(ByteLevelDecoder::new(false, false, false)));
    Ok(tokenizer)
}

/// The words of a text, spelled in the byte alphabet, as encoding will see them.
fn words(tokenizer: &Tokenizer, text: &str) -> tokenizers::Result<Vec<String>> {
    let mut split = PreTokenizedString::from(text);
    if let Some(pre_tokenizer) = tokenizer.get_pre_tokenizer() {
        pre_tokenizer.pre_tokenize(&mut split)?;
    }
    let words = split.get_splits(OffsetReferential::Original, OffsetType::Byte);
    Ok(words
        .into_iter()
        .map(|(word, _, _)| word.to_string())
        .collect())
}

/// What transformers reads beside the tokenizer.json.
fn config(options: &TrainOptions) -> String {
    let end = &options.special_tokens[0];
    let config = serde_json::json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "add_bos_token": false,
        "add_eos_token": false,
        "clean_up_tokenization_spaces": false,
    });
    format!("{config:#}\n")
}

/// Average length of a token over the first megabyte or so of the corpus.
fn bytes_per_token(corpus: &Corpus, tokenizer: &TextTokenizer) -> Result<f64> {
    let (mut bytes, mut tokens) = (0usize, 0usize);
    for document in corpus.documents() {
        let document = document?;
        bytes += document.text.len();
        tokens += tokenizer.encode(&document.text)?.len();
        if bytes > 1 << 20 {
            break;
        }
    }
    Ok(bytes as f64 / tokens.max(1) as f64)
}

/// The texts to learn from. The trainer takes an iterator of texts, so a reading error ends the
/// iteration and is kept for the caller.
struct SampledTexts<'a> {
    documents_of: crate::corpus::Documents,
    rate: f64,
    progress: &'a Progress,
    documents: u64,
    bytes: u64,
    error: Option<Error>,
}

impl<'a> SampledTexts<'a> {
    fn new(corpus: &Corpus, sample_bytes: u64, progress: &'a Progress) -> Self {
        Self {
            documents_of: corpus.documents(),
            rate: sample_bytes as f64 / corpus.bytes().max(1) as f64,
            progress,
            documents: 0,
            bytes: 0,
            error: None,
        }
    }
}

impl Iterator for SampledTexts<'_> {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        loop {
            match self.documents_of.next() {
                Some(Ok(document)) => {
                    self.progress.add(document.text.len() as u64);
                    let hash = mix::mix64(mix::name_word(&document.id));
                    if self.rate >= 1.0 || mix::below_fraction(hash, self.rate) {
                        self.documents += 1;
                        self.bytes += document.text.len() as u64;
                        return Some(document.text);
                    }
                }
                last => {
                    self.error = last.and_then(std::result::Result::err);
                    return None;
                }
            }
        }
    }
}
