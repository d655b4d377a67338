//! Writing a shard: rows are gathered into row groups of about equal token counts.

use super::format::{self, RowGroupSummary, ShardHeader};
use crate::atomic;
use crate::error::{Error, Result};
use arrow_array::{ArrayRef, Float16Array, ListArray, RecordBatch, StringArray, UInt32Array};
use arrow_buffer::{OffsetBuffer, ScalarBuffer};
use arrow_schema::{DataType, Field, SchemaRef};
use half::f16;
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::NamedTempFile;

/// One document, ready to be stored.
#[derive(Debug, Clone, Copy)]
pub struct DocumentRow<'a> {
    /// Stable name of the document.
    pub doc_id: &'a str,
    /// Where it came from, for people.
    pub source: &'a str,
    /// `[n]` token ids, the end-of-text id last; at least one.
    pub tokens: &'a [u32],
    /// `[n]` weight of predicting each token; only in shards created with weights.
    pub loss_weight: Option<&'a [f16]>,
}

/// What a finished shard holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardSummary {
    /// The file.
    pub path: PathBuf,
    /// Rows.
    pub documents: u64,
    /// Sum of their lengths.
    pub tokens: u64,
    /// Row groups.
    pub row_groups: usize,
}

/// Rows of the row group in the making.
#[derive(Debug, Default)]
struct Rows {
    tokens: Vec<u32>,
    lengths: Vec<u32>,
    ids: Vec<String>,
    sources: Vec<String>,
    weights: Vec<f16>,
}

/// Writes one shard under a temporary name; [`ShardWriter::finish`] puts it in place. A writer
/// that is dropped leaves nothing behind.
pub struct ShardWriter {
    path: PathBuf,
    header: ShardHeader,
    schema: SchemaRef,
    with_weights: bool,
    row_group_tokens: usize,
    writer: ArrowWriter<NamedTempFile>,
    rows: Rows,
    groups: Vec<RowGroupSummary>,
}

impl ShardWriter {
    /// Begins the shard `path` with row groups of about `row_group_tokens` tokens: a row group
    /// closes with the document that reaches this count.
    ///
    /// # Errors
    /// A `row_group_tokens` of zero or beyond 2^30, or a folder that cannot be written.
    pub fn create(
        path: &Path,
        header: &ShardHeader,
        row_group_tokens: usize,
        with_weights: bool,
    ) -> Result<Self> {
        if row_group_tokens == 0 || row_group_tokens > 1 << 30 {
            return Err(Error::Option {
                option: "row-group-tokens",
                problem: format!("{row_group_tokens} is outside 1..=2^30; 2000000 is usual"),
            });
        }
        let schema = Arc::new(format::schema(with_weights));
        let properties = WriterProperties::builder()
            .set_created_by(concat!("oxitron ", env!("CARGO_PKG_VERSION")).to_string())
            .set_compression(Compression::ZSTD(ZstdLevel::default()))
            // Minimum and maximum of token ids help nobody and cost space per page.
            .set_statistics_enabled(EnabledStatistics::None)
            .set_max_row_group_row_count(None)
            .build();
        let writer = ArrowWriter::try_new(atomic::begin(path)?, schema.clone(), Some(properties))
            .map_err(|e| parquet_error(path, e))?;
        Ok(Self {
            path: path.to_path_buf(),
            header: header.clone(),
            schema,
            with_weights,
            row_group_tokens,
            writer,
            rows: Rows::default(),
            groups: Vec::new(),
        })
    }

    /// Appends a document.
    ///
    /// # Errors
    /// A document without tokens or longer than 2^30 of them, an id past the vocabulary, weights
    /// that do not match, or a full disk.
    pub fn push(&mut self, row: DocumentRow<'_>) -> Result<()> {
        let problem = |problem: String| Error::Row {
            path: self.path.clone(),
            row_group: self.groups.len(),
            row: self.rows.lengths.len(),
            problem,
        };
        if row.tokens.is_empty() || row.tokens.len() > 1 << 30 {
            return Err(problem(format!(
                "document \"{}\" has {} tokens; a shard stores 1 to 2^30 per document",
                row.doc_id,
                row.tokens.len()
            )));
        }
        if let Some(position) = row
            .tokens
            .iter()
            .position(|&id| id as usize >= self.header.vocab_size)
        {
            return Err(Error::TokenOutOfRange {
                path: self.path.clone(),
                row_group: self.groups.len(),
                row: self.rows.lengths.len(),
                position,
                id: row.tokens[position],
                vocab_size: self.header.vocab_size,
            });
        }
        match (self.with_weights, row.loss_weight) {
            (false, None) => {}
            (true, Some(weights)) if weights.len() == row.tokens.len() => {
                self.rows.weights.extend_from_slice(weights);
            }
            _ => {
                return Err(problem(format!(
                    "document \"{}\": loss weights must be given for every token of a shard that \
                     stores them, and for none of a shard that does not",
                    row.doc_id
                )));
            }
        }
        self.rows.tokens.extend_from_slice(row.tokens);
        self.rows.lengths.push(row.tokens.len() as u32);
        self.rows.ids.push(row.doc_id.to_string());
        self.rows.sources.push(row.source.to_string());
        if self.rows.tokens.len() >= self.row_group_tokens {
            self.flush()?;
        }
        Ok(())
    }

    /// Tokens pushed so far.
    pub fn tokens(&self) -> u64 {
        self.groups.iter().map(|g| g.tokens).sum::<u64>() + self.rows.tokens.len() as u64
    }

    /// Writes what is left, flushes to disk and renames into place.
    ///
    /// # Errors
    /// A full disk, or a folder that lost its write permission.
    pub fn finish(mut self) -> Result<ShardSummary> {
        self.flush()?;
        for pair in format::metadata(&self.header, &self.groups)? {
            self.writer.append_key_value_metadata(pair);
        }
        let file = self
            .writer
            .into_inner()
            .map_err(|e| parquet_error(&self.path, e))?;
        atomic::commit(file, &self.path)?;
        Ok(ShardSummary {
            documents: self.groups.iter().map(|g| g.documents).sum(),
            tokens: self.groups.iter().map(|g| g.tokens).sum(),
            row_groups: self.groups.len(),
            path: self.path,
        })
    }

    /// Closes the row group in the making.
    fn flush(&mut self) -> Result<()> {
        if self.rows.lengths.is_empty() {
            return Ok(());
        }
        let rows = std::mem::take(&mut self.rows);
        let weight_bits: Vec<u16> = rows.weights.iter().map(|w| w.to_bits()).collect();
        self.groups.push(RowGroupSummary {
            documents: rows.lengths.len() as u64,
            tokens: rows.tokens.len() as u64,
            tokens_digest: format::tokens_digest(
                &rows.lengths,
                &rows.tokens,
                self.with_weights.then_some(&weight_bits),
            ),
            ids_digest: format::ids_digest(&rows.lengths, rows.ids.iter().map(String::as_str)),
        });

        let offsets = OffsetBuffer::from_lengths(rows.lengths.iter().map(|&n| n as usize));
        let element = |data_type: DataType| Arc::new(Field::new("element", data_type, false));
        let mut columns: Vec<ArrayRef> = vec![
            Arc::new(ListArray::new(
                element(DataType::UInt32),
                offsets.clone(),
                Arc::new(UInt32Array::new(ScalarBuffer::from(rows.tokens), None)),
                None,
            )),
            Arc::new(UInt32Array::from(rows.lengths)),
            Arc::new(StringArray::from(rows.ids)),
            Arc::new(StringArray::from(rows.sources)),
        ];
        if self.with_weights {
            columns.push(Arc::new(ListArray::new(
                element(DataType::Float16),
                offsets,
                Arc::new(Float16Array::new(ScalarBuffer::from(rows.weights), None)),
                None,
            )));
        }
        let path = &self.path;
        let batch = RecordBatch::try_new(self.schema.clone(), columns)
            .map_err(|e| parquet_error(path, e))?;
        self.writer
            .write(&batch)
            .map_err(|e| parquet_error(path, e))?;
        self.writer.flush().map_err(|e| parquet_error(path, e))
    }
}

/// Writing fails for want of disk space or permission, not for damaged data.
fn parquet_error(path: &Path, error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::Io {
        action: "write",
        path: path.to_path_buf(),
        reason: std::io::Error::other(error),
    }
}
