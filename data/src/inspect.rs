//! Figures of shards, for people.

use crate::error::Result;
use crate::lock::Lock;
use crate::open::resolve;
use crate::shard::{Shard, ShardHeader};
use crate::tokenizer::TextTokenizer;
use rayon::prelude::*;
use std::fmt;
use std::path::PathBuf;

/// Tokens of the sample that is shown.
const SAMPLE_TOKENS: usize = 200;
/// Classes of document lengths: class `i` holds lengths below 2^(i+1), from 2^i on.
const CLASSES: usize = 32;

/// What [`inspect`] found.
#[derive(Debug, Clone, PartialEq)]
pub struct Inspection {
    /// What each `dataset.lock` among the paths says.
    pub locks: Vec<String>,
    /// One line per shard.
    pub files: Vec<FileFigures>,
    /// Headers that occur, each once: more than one means shards of different tokenizers.
    pub headers: Vec<ShardHeader>,
    /// Per power of two: documents whose length lies in it.
    pub documents_by_length: Vec<u64>,
    /// Per power of two: tokens of those documents.
    pub tokens_by_length: Vec<u64>,
    /// Longest document in tokens.
    pub longest: u32,
    /// Beginning of the first document as text, where a tokenizer was given.
    pub sample: Option<String>,
}

/// Figures of one shard.
#[derive(Debug, Clone, PartialEq)]
pub struct FileFigures {
    /// The file.
    pub path: PathBuf,
    /// Its size.
    pub size_bytes: u64,
    /// Row groups.
    pub row_groups: usize,
    /// Documents.
    pub documents: u64,
    /// Tokens.
    pub tokens: u64,
    /// Checksum of its contents.
    pub checksum: String,
}

/// Reads footers and document lengths of the shards that `paths` name (files, folders, patterns, or
/// a `dataset.lock` for its files).
///
/// # Errors
/// Paths that name nothing, files that are no shards, and a tokenizer that did not write them.
pub fn inspect(paths: &[PathBuf], tokenizer: Option<&TextTokenizer>) -> Result<Inspection> {
    let shards = resolve(paths)?
        .par_iter()
        .map(|p| Shard::open(p))
        .collect::<Result<Vec<_>>>()?;
    let mut headers: Vec<ShardHeader> = Vec::new();
    for shard in &shards {
        if !headers.contains(shard.header()) {
            headers.push(shard.header().clone());
        }
    }
    let row_groups: Vec<(&Shard, usize)> = shards
        .iter()
        .flat_map(|s| (0..s.row_groups().len()).map(move |g| (s, g)))
        .collect();
    let counted = row_groups
        .par_iter()
        .map(|(shard, group)| {
            let mut counts = Counts::default();
            shard
                .read_index(*group, false)?
                .lengths
                .iter()
                .for_each(|&n| counts.add(n));
            Ok(counts)
        })
        .try_reduce(Counts::default, |a, b| Ok(a.merged(&b)))?;
    let sample = match (tokenizer, row_groups.first()) {
        (Some(tokenizer), Some((shard, group))) => Some(decode_sample(shard, *group, tokenizer)?),
        _ => None,
    };
    let figures = |shard: &Shard| FileFigures {
        path: shard.path().to_path_buf(),
        size_bytes: shard.size_bytes(),
        row_groups: shard.row_groups().len(),
        documents: shard.documents(),
        tokens: shard.tokens(),
        checksum: shard.checksum().to_string(),
    };
    let locks = paths
        .iter()
        .filter(|path| path.extension().is_some_and(|e| e == "lock"));
    let locks = locks.map(|path| Ok(Lock::load(path)?.describe(path)));
    Ok(Inspection {
        locks: locks.collect::<Result<_>>()?,
        files: shards.iter().map(figures).collect(),
        headers,
        documents_by_length: counted.documents.to_vec(),
        tokens_by_length: counted.tokens.to_vec(),
        longest: counted.longest,
        sample,
    })
}

fn decode_sample(shard: &Shard, group: usize, tokenizer: &TextTokenizer) -> Result<String> {
    if shard.header().tokenizer != tokenizer.hash() {
        return Err(crate::Error::Tokenizer {
            path: tokenizer.path().to_path_buf(),
            problem: format!(
                "it did not write {} (its hash is {}, the shard names {})",
                shard.path().display(),
                tokenizer.hash(),
                shard.header().tokenizer
            ),
        });
    }
    let tokens = shard.read_tokens(group, shard.header().vocab_size)?;
    let document = tokens.document(0);
    tokenizer.decode(&document[..document.len().min(SAMPLE_TOKENS)], true)
}

/// Counts by class of length.
#[derive(Debug, Default, Clone)]
struct Counts {
    documents: [u64; CLASSES],
    tokens: [u64; CLASSES],
    longest: u32,
}

impl Counts {
    fn add(&mut self, length: u32) {
        let class = length.max(1).ilog2() as usize;
        self.documents[class] += 1;
        self.tokens[class] += u64::from(length);
        self.longest = self.longest.max(length);
    }

    fn merged(mut self, other: &Counts) -> Counts {
        for class in 0..CLASSES {
            self.documents[class] += other.documents[class];
            self.tokens[class] += other.tokens[class];
        }
        self.longest = self.longest.max(other.longest);
        self
    }
}

impl fmt::Display for Inspection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let documents: u64 = self.documents_by_length.iter().sum();
        let tokens: u64 = self.tokens_by_length.iter().sum();
        let bytes: u64 = self.files.iter().map(|file| file.size_bytes).sum();
        self.locks.iter().try_for_each(|lock| f.write_str(lock))?;
        for file in &self.files {
            writeln!(
                f,
                "{}: {:.1} MB, {} row groups, {} documents, {} tokens, checksum {}",
                file.path.display(),
                file.size_bytes as f64 / 1e6,
                file.row_groups,
                file.documents,
                file.tokens,
                file.checksum
            )?;
        }
        writeln!(
            f,
            "{} files, {:.1} MB, {documents} documents, {tokens} tokens, {:.2} bytes per token on \
             disk",
            self.files.len(),
            bytes as f64 / 1e6,
            bytes as f64 / tokens.max(1) as f64
        )?;
        for header in &self.headers {
            writeln!(
                f,
                "tokenizer {}, {} ids, end of text {}",
                header.tokenizer, header.vocab_size, header.eos_id
            )?;
        }
        if self.headers.len() > 1 {
            writeln!(
                f,
                "these shards cannot be used together: their tokenizers differ"
            )?;
        }
        writeln!(f, "document length in tokens (longest {}):", self.longest)?;
        for (class, &count) in self.documents_by_length.iter().enumerate() {
            if count > 0 {
                let bar = "#".repeat((count * 40).div_ceil(documents.max(1)) as usize);
                writeln!(
                    f,
                    "  {:>10} – {:<10} {count:>10} documents {:>5.1}% of tokens {bar}",
                    1u64 << class,
                    (1u64 << (class + 1)) - 1,
                    100.0 * self.tokens_by_length[class] as f64 / tokens.max(1) as f64
                )?;
            }
        }
        if let Some(sample) = &self.sample {
            writeln!(f, "first document begins:\n{sample}")?;
        }
        Ok(())
    }
}
