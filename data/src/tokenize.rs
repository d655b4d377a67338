//! Turning a corpus into token shards, on all cores and in bounded memory.
//!
//! One thread reads documents into chunks, the pool encodes a chunk's documents in parallel, one
//! thread writes shards in the order of the corpus. Channels between them hold a chunk or two, so
//! memory does not grow with the corpus, and the shards are the same whatever the number of
//! threads.

use crate::atomic;
use crate::corpus::{Corpus, Document, ReadCounts};
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::shard::{DocumentRow, ShardHeader, ShardSummary, ShardWriter};
use crate::tokenizer::TextTokenizer;
use rayon::prelude::*;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

/// Text that is encoded at once.
const CHUNK_BYTES: usize = 8 << 20;
/// Chunks that may wait between two threads.
const CHUNKS_WAITING: usize = 2;

/// How to write shards.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenizeOptions {
    /// Folder for the shards. It appears when all are written.
    pub out: PathBuf,
    /// Tokens after which a row group closes.
    pub row_group_tokens: usize,
    /// Tokens after which a shard closes.
    pub shard_tokens: u64,
    /// Threads that encode; 0 means one per core.
    pub threads: usize,
    /// Whether an existing folder is replaced.
    pub overwrite: bool,
}

/// What was written.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenizeReport {
    /// The shards.
    pub shards: Vec<ShardSummary>,
    /// What reading met.
    pub read: ReadCounts,
    /// Tokens in all.
    pub tokens: u64,
    /// Seconds in all.
    pub seconds: f64,
}

/// A chunk of documents on its way.
type Encoded = Vec<(Document, Vec<u32>)>;

/// Tokenises `corpus` into shards `shard-00000.parquet` … in the folder `out`.
///
/// The shards are written into a folder beside it, which takes the name `out` at the end: a run
/// that is interrupted leaves no folder that looks finished.
///
/// # Errors
/// An existing `out` without `overwrite`, unreadable input, an empty corpus, or a full disk.
pub fn tokenize(
    corpus: &Corpus,
    tokenizer: &TextTokenizer,
    options: &TokenizeOptions,
    progress: &Progress,
) -> Result<TokenizeReport> {
    let staging = Staging::begin(options)?;
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(options.threads)
        .thread_name(|n| format!("tokenize-{n}"))
        .build()
        .map_err(|e| Error::Option {
            option: "--threads",
            problem: e.to_string(),
        })?;

    let (read_sender, read_receiver) = sync_channel::<Vec<Document>>(CHUNKS_WAITING);
    let (write_sender, write_receiver) = sync_channel::<Encoded>(CHUNKS_WAITING);
    let ended = |_| Error::Thread("tokenize");
    // The first error of encoder, writer, reader in this order is the cause: a thread that fails
    // closes its channels, and its neighbours then stop without an error of their own.
    let (read, shards) = std::thread::scope(|scope| -> Result<_> {
        let reader = scope.spawn(move || read_chunks(corpus, read_sender));
        let writer =
            scope.spawn(|| write_shards(&staging.folder, tokenizer, options, write_receiver));
        let encoded =
            pool.install(|| encode_chunks(tokenizer, progress, read_receiver, write_sender));
        let shards = writer.join().map_err(ended)?;
        let read = reader.join().map_err(ended)?;
        encoded?;
        Ok((read?, shards?))
    })?;
    if shards.is_empty() {
        return Err(Error::EmptyCorpus(format!(
            "{} hold no text ({} binary files, {} empty documents); name inputs with text",
            corpus.describe(),
            read.binary,
            read.empty
        )));
    }
    staging.finish(options)?;
    let renamed = |shard: ShardSummary| {
        let name = shard
            .path
            .file_name()
            .map(PathBuf::from)
            .unwrap_or_default();
        ShardSummary {
            path: options.out.join(name),
            ..shard
        }
    };
    Ok(TokenizeReport {
        tokens: shards.iter().map(|shard| shard.tokens).sum(),
        shards: shards.into_iter().map(renamed).collect(),
        read,
        seconds: progress.seconds(),
    })
}

/// Reads the corpus in chunks of about [`CHUNK_BYTES`].
fn read_chunks(corpus: &Corpus, chunks: SyncSender<Vec<Document>>) -> Result<ReadCounts> {
    let mut documents = corpus.documents();
    let (mut chunk, mut bytes) = (Vec::new(), 0);
    while let Some(document) = documents.next() {
        let document = document?;
        bytes += document.text.len();
        chunk.push(document);
        if bytes >= CHUNK_BYTES {
            bytes = 0;
            if chunks.send(std::mem::take(&mut chunk)).is_err() {
                return Ok(documents.counts());
            }
        }
    }
    // Nobody listens only after an error elsewhere, which is reported there.
    let _ = chunks.send(chunk);
    Ok(documents.counts())
}

/// Encodes the documents of each chunk in parallel, keeping their order.
fn encode_chunks(
    tokenizer: &TextTokenizer,
    progress: &Progress,
    chunks: Receiver<Vec<Document>>,
    encoded: SyncSender<Encoded>,
) -> Result<()> {
    for chunk in chunks {
        let chunk = chunk
            .into_par_iter()
            .map(|document| {
                let ids = tokenizer.encode_document(&document.text)?;
                progress.add(document.text.len() as u64);
                Ok((document, ids))
            })
            .collect::<Result<Encoded>>()?;
        if encoded.send(chunk).is_err() {
            return Ok(());
        }
    }
    Ok(())
}

/// Writes shards until the chunks end.
fn write_shards(
    folder: &Path,
    tokenizer: &TextTokenizer,
    options: &TokenizeOptions,
    chunks: Receiver<Encoded>,
) -> Result<Vec<ShardSummary>> {
    let header = ShardHeader {
        tokenizer: tokenizer.hash().to_string(),
        vocab_size: tokenizer.vocab_size(),
        eos_id: tokenizer.eos_id(),
    };
    let mut done = Vec::new();
    let mut open: Option<ShardWriter> = None;
    for (document, ids) in chunks.into_iter().flatten() {
        let mut writer = match open.take() {
            Some(writer) => writer,
            None => {
                let path = folder.join(format!("shard-{:05}.parquet", done.len()));
                ShardWriter::create(&path, &header, options.row_group_tokens, false)?
            }
        };
        writer.push(DocumentRow {
            doc_id: &document.id,
            source: &document.origin,
            tokens: &ids,
            loss_weight: None,
        })?;
        if writer.tokens() >= options.shard_tokens {
            done.push(writer.finish()?);
        } else {
            open = Some(writer);
        }
    }
    if let Some(writer) = open {
        done.push(writer.finish()?);
    }
    Ok(done)
}

/// The folder in which shards wait until all are written; removed if they never are.
struct Staging {
    folder: PathBuf,
    finished: bool,
}

impl Staging {
    /// Creates an empty folder beside `out`, clearing what an interrupted run left there.
    fn begin(options: &TokenizeOptions) -> Result<Self> {
        let out = &options.out;
        let is_empty = || std::fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_none());
        if out.exists() && !options.overwrite && !is_empty() {
            return Err(Error::Option {
                option: "--out",
                problem: format!(
                    "{} exists; name another folder or add --overwrite",
                    out.display()
                ),
            });
        }
        let name = out
            .file_name()
            .map(|n| n.to_string_lossy().into_owned())
            .unwrap_or_default();
        if name.is_empty() {
            return Err(Error::Option {
                option: "--out",
                problem: format!("{} does not name a folder", out.display()),
            });
        }
        let folder = atomic::parent(out).join(format!(".{name}.partial"));
        remove(&folder)?;
        std::fs::create_dir_all(&folder).map_err(Error::io("create the folder", &folder))?;
        Ok(Self {
            folder,
            finished: false,
        })
    }

    /// Puts the folder in its place.
    fn finish(mut self, options: &TokenizeOptions) -> Result<()> {
        remove(&options.out)?;
        std::fs::rename(&self.folder, &options.out)
            .map_err(Error::io("rename into place", &options.out))?;
        self.finished = true;
        atomic::sync_folder(&atomic::parent(&options.out))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.finished {
            // The error that brought us here is the one to report.
            let _ = remove(&self.folder);
        }
    }
}

/// Removes a folder if it is there.
fn remove(folder: &Path) -> Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", folder)(e)),
        _ => Ok(()),
    }
}
