//! The documents of a corpus, one after the other.

use super::scan::{Corpus, CorpusFile};
use super::{Format, jsonl, parquet};
use crate::error::{Error, Result};
use crate::mix;

/// Bytes at the start of a file that are searched for NUL, the mark of a binary file.
const BINARY_PROBE: usize = 8192;

/// A text to be tokenised.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// Stable id.
    pub id: String,
    /// Where it came from: input name and path, and a line or row (from 1 and 0) where a file holds
    /// several.
    pub origin: String,
    /// The text, never empty.
    pub text: String,
}

/// What reading met.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReadCounts {
    /// Documents handed out.
    pub documents: u64,
    /// Bytes of their texts.
    pub text_bytes: u64,
    /// Documents in which invalid UTF-8 was replaced by U+FFFD.
    pub repaired: u64,
    /// Text files left out because they hold NUL bytes.
    pub binary: u64,
    /// Documents without text, left out.
    pub empty: u64,
}

/// A text before it has an id.
pub(super) struct Raw {
    pub id: Option<String>,
    pub place: Option<String>,
    pub text: Vec<u8>,
}

/// Reader of one file: its texts in order.
pub(super) type RawTexts = Box<dyn Iterator<Item = Result<Raw>> + Send>;

/// Iterator over the documents of a corpus, in the order of its files.
pub struct Documents {
    corpus: Corpus,
    next_file: usize,
    open: Option<(CorpusFile, RawTexts)>,
    counts: ReadCounts,
}

impl Corpus {
    /// Reads the corpus from its first document.
    pub fn documents(&self) -> Documents {
        Documents {
            corpus: self.clone(),
            next_file: 0,
            open: None,
            counts: ReadCounts::default(),
        }
    }
}

impl Documents {
    /// What was met so far.
    pub fn counts(&self) -> ReadCounts {
        self.counts
    }

    /// Opens the next file; false after the last.
    fn open_next(&mut self) -> Result<bool> {
        let Some(file) = self.corpus.files().get(self.next_file) else {
            return Ok(false);
        };
        self.next_file += 1;
        let options = &self.corpus.options;
        let texts = match file.format {
            Format::Jsonl => jsonl::read(&file.path, options)?,
            Format::Parquet => parquet::read(&file.path, options)?,
            Format::Text | Format::Auto => {
                let text = std::fs::read(&file.path).map_err(Error::io("read", &file.path))?;
                if text[..text.len().min(BINARY_PROBE)].contains(&0) {
                    self.counts.binary += 1;
                    return Ok(true);
                }
                Box::new(std::iter::once(Ok(Raw {
                    id: None,
                    place: None,
                    text,
                })))
            }
        };
        self.open = Some((file.clone(), texts));
        Ok(true)
    }

    fn finish(&mut self, file: &CorpusFile, raw: Raw) -> Option<Document> {
        if raw.text.iter().all(u8::is_ascii_whitespace) {
            self.counts.empty += 1;
            return None;
        }
        let text = String::from_utf8(raw.text).unwrap_or_else(|error| {
            self.counts.repaired += 1;
            String::from_utf8_lossy(error.as_bytes()).into_owned()
        });
        self.counts.documents += 1;
        self.counts.text_bytes += text.len() as u64;
        let id = raw.id.unwrap_or_else(|| mix::content_hash(text.as_bytes()));
        let origin = match raw.place {
            Some(place) => format!("{}:{place}", file.origin),
            None => file.origin.clone(),
        };
        Some(Document { id, origin, text })
    }
}

impl Iterator for Documents {
    type Item = Result<Document>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let Some((file, mut texts)) = self.open.take() else {
                match self.open_next() {
                    Ok(true) => continue,
                    Ok(false) => return None,
                    Err(error) => return Some(Err(error)),
                }
            };
            match texts.next() {
                None => {}
                Some(Err(error)) => return Some(Err(error)),
                Some(Ok(raw)) => {
                    let document = self.finish(&file, raw);
                    self.open = Some((file, texts));
                    if let Some(document) = document {
                        return Some(Ok(document));
                    }
                }
            }
        }
    }
}
