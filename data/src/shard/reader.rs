//! Reading a shard that may be cut short, damaged, hostile, or no shard at all.
//!
//! Only the footer is read on opening; a row group's columns are decoded when asked for and
//! compared with the digests that were written with them.

use super::format::{self, RowGroupSummary, ShardHeader};
use crate::error::{Error, Result};
use arrow_array::cast::AsArray;
use arrow_array::types::{Float16Type, UInt32Type};
use arrow_array::{Array, RecordBatch};
use arrow_schema::{DataType, Field};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder,
};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};

/// Rows decoded at once; bounds what a forged row count can make the reader allocate.
const BATCH_ROWS: usize = 4096;

/// An opened shard: its checked footer, no data.
#[derive(Debug)]
pub struct Shard {
    path: PathBuf,
    metadata: ArrowReaderMetadata,
    header: ShardHeader,
    row_groups: Vec<RowGroupSummary>,
    checksum: String,
    footer_checksum: String,
    size_bytes: u64,
    has_weights: bool,
}

/// The decoded tokens of one row group.
#[derive(Debug, PartialEq)]
pub struct RowGroupTokens {
    /// `[documents + 1]` offsets into `tokens`.
    offsets: Vec<usize>,
    /// `[tokens]` ids, all below the vocabulary size asked for.
    tokens: Vec<u32>,
    /// `[tokens]` weights, if the shard stores them.
    weights: Option<Vec<f32>>,
}

/// Lengths, and where asked for ids, of the documents of one row group.
#[derive(Debug, PartialEq, Eq)]
pub struct RowGroupIndex {
    /// `[documents]` length of each document in tokens, at least 1.
    pub lengths: Vec<u32>,
    /// `[documents]` document ids.
    pub ids: Option<Vec<String>>,
}

impl RowGroupTokens {
    /// Tokens of document `row`, or an empty slice past the end.
    pub fn document(&self, row: usize) -> &[u32] {
        self.range(row)
            .and_then(|range| self.tokens.get(range))
            .unwrap_or_default()
    }

    /// Weights of document `row`, if the shard stores them.
    pub fn weights(&self, row: usize) -> Option<&[f32]> {
        self.weights.as_ref()?.get(self.range(row)?)
    }

    /// Number of documents.
    pub fn documents(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.tokens.len()
    }

    fn range(&self, row: usize) -> Option<std::ops::Range<usize>> {
        Some(*self.offsets.get(row)?..*self.offsets.get(row + 1)?)
    }
}

impl Shard {
    /// Reads and checks the footer of `path`.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Parquet`] for a file that is cut short or damaged,
    /// [`Error::Schema`] for Parquet that is not a token shard.
    pub fn open(path: &Path) -> Result<Self> {
        let mut file = File::open(path).map_err(Error::io("open", path))?;
        let size_bytes = file.metadata().map_err(Error::io("read", path))?.len();
        let metadata = guarded(path, None, || {
            ArrowReaderMetadata::load(&file, ArrowReaderOptions::new()).map_err(|e| e.to_string())
        })?;
        let has_weights = check_schema(path, metadata.schema().fields())?;
        let file_metadata = metadata.metadata().file_metadata();
        let stated = format::parse_metadata(path, file_metadata.key_value_metadata())?;

        let found: Vec<i64> = metadata
            .metadata()
            .row_groups()
            .iter()
            .map(|group| group.num_rows())
            .collect();
        let expected: Vec<i64> = stated
            .row_groups
            .iter()
            .map(|g| g.documents as i64)
            .collect();
        if found != expected {
            return Err(Error::Schema {
                path: path.to_path_buf(),
                what: "rows per row group".to_string(),
                expected: format!("{expected:?}"),
                found: format!("{found:?}"),
            });
        }
        let footer_checksum = footer_checksum(&mut file, size_bytes, path)?;
        Ok(Self {
            path: path.to_path_buf(),
            metadata,
            header: stated.header,
            row_groups: stated.row_groups,
            checksum: stated.checksum,
            footer_checksum,
            size_bytes,
            has_weights,
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What all shards of the same tokenisation share.
    pub fn header(&self) -> &ShardHeader {
        &self.header
    }

    /// Counts and digests per row group.
    pub fn row_groups(&self) -> &[RowGroupSummary] {
        &self.row_groups
    }

    /// Checksum of the contents, as stated in the footer.
    pub fn checksum(&self) -> &str {
        &self.checksum
    }

    /// Checksum of the footer's own bytes: it covers the counts, the digests of all row groups and
    /// the place of every column, and is cheap to compare.
    pub fn footer_checksum(&self) -> &str {
        &self.footer_checksum
    }

    /// Size of the file.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Sum of document lengths.
    pub fn tokens(&self) -> u64 {
        self.row_groups.iter().map(|g| g.tokens).sum()
    }

    /// Rows.
    pub fn documents(&self) -> u64 {
        self.row_groups.iter().map(|g| g.documents).sum()
    }

    /// Whether the shard stores loss weights.
    pub fn has_weights(&self) -> bool {
        self.has_weights
    }

    /// Decodes the tokens of a row group; every id is checked to be below `vocab_size`.
    ///
    /// # Errors
    /// [`Error::Parquet`] for damage, [`Error::Corrupt`] where the digest differs,
    /// [`Error::TokenOutOfRange`] with the place of the first id that is too large.
    pub fn read_tokens(&self, row_group: usize, vocab_size: usize) -> Result<RowGroupTokens> {
        let summary = self.summary(row_group)?;
        let mut columns = vec![format::TOKENS, format::N_TOKENS];
        if self.has_weights {
            columns.push(format::LOSS_WEIGHT);
        }
        let mut lengths: Vec<u32> = Vec::new();
        let mut tokens: Vec<u32> = Vec::new();
        let mut weight_bits: Vec<u16> = Vec::new();
        self.read_columns(row_group, &columns, |batch| {
            lengths.extend_from_slice(u32_column(batch, format::N_TOKENS)?);
            let list = batch.column_by_name(format::TOKENS)?.as_list_opt::<i32>()?;
            let rows = u32_column(batch, format::N_TOKENS)?
                .iter()
                .map(|&n| n as usize);
            // `value_offsets` may start past zero in a slice; the values between first and last
            // offset are the batch's.
            if !list.offsets().lengths().eq(rows) || list.null_count() > 0 {
                return None;
            }
            let offsets = list.value_offsets();
            let (first, last) = (*offsets.first()? as usize, *offsets.last()? as usize);
            let values = list.values().as_primitive_opt::<UInt32Type>()?;
            if values.null_count() > 0 {
                return None;
            }
            tokens.extend_from_slice(values.values().get(first..last)?);
            if self.has_weights {
                let list = batch
                    .column_by_name(format::LOSS_WEIGHT)?
                    .as_list_opt::<i32>()?;
                let offsets = list.value_offsets();
                let (first, last) = (*offsets.first()? as usize, *offsets.last()? as usize);
                let values = list.values().as_primitive_opt::<Float16Type>()?;
                weight_bits.extend(
                    values
                        .values()
                        .get(first..last)?
                        .iter()
                        .map(|w| w.to_bits()),
                );
            }
            Some(())
        })?;
        let weights_fit = !self.has_weights || weight_bits.len() == tokens.len();
        let weights = self.has_weights.then_some(weight_bits.as_slice());
        if !weights_fit
            || tokens.len() as u64 != summary.tokens
            || format::tokens_digest(&lengths, &tokens, weights) != summary.tokens_digest
        {
            return Err(Error::Corrupt {
                path: self.path.clone(),
                row_group,
                what: "tokens",
            });
        }
        let mut offsets = Vec::with_capacity(lengths.len() + 1);
        offsets.push(0);
        let mut end = 0;
        offsets.extend(lengths.iter().map(|&n| {
            end += n as usize;
            end
        }));
        if tokens
            .iter()
            .copied()
            .max()
            .is_some_and(|id| id as usize >= vocab_size)
        {
            return Err(self.out_of_range(row_group, &offsets, &tokens, vocab_size));
        }
        let weights = weights.map(|bits| {
            bits.iter()
                .map(|&b| half::f16::from_bits(b).to_f32())
                .collect()
        });
        Ok(RowGroupTokens {
            offsets,
            tokens,
            weights,
        })
    }

    /// Reads the lengths, and `with_ids` the ids, of a row group's documents.
    ///
    /// # Errors
    /// [`Error::Parquet`], [`Error::Corrupt`] (checked where ids are read: the digest covers
    /// both), [`Error::Row`] for a document without tokens.
    pub fn read_index(&self, row_group: usize, with_ids: bool) -> Result<RowGroupIndex> {
        let summary = self.summary(row_group)?;
        let mut lengths: Vec<u32> = Vec::new();
        let mut ids: Vec<String> = Vec::new();
        let columns = if with_ids {
            vec![format::N_TOKENS, format::DOC_ID]
        } else {
            vec![format::N_TOKENS]
        };
        self.read_columns(row_group, &columns, |batch| {
            lengths.extend_from_slice(u32_column(batch, format::N_TOKENS)?);
            if with_ids {
                let column = batch
                    .column_by_name(format::DOC_ID)?
                    .as_string_opt::<i32>()?;
                for id in column.iter() {
                    ids.push(id?.to_string());
                }
            }
            Some(())
        })?;
        let digest_differs = with_ids
            && format::ids_digest(&lengths, ids.iter().map(String::as_str)) != summary.ids_digest;
        if digest_differs || lengths.iter().map(|&n| u64::from(n)).sum::<u64>() != summary.tokens {
            let what = "document lengths and ids";
            return Err(Error::Corrupt {
                path: self.path.clone(),
                row_group,
                what,
            });
        }
        if let Some(row) = lengths.iter().position(|&n| n == 0) {
            let problem = "a document without tokens; every document ends with the end-of-text id";
            return Err(Error::Row {
                path: self.path.clone(),
                row_group,
                row,
                problem: problem.to_string(),
            });
        }
        Ok(RowGroupIndex {
            lengths,
            ids: with_ids.then_some(ids),
        })
    }

    fn summary(&self, row_group: usize) -> Result<&RowGroupSummary> {
        self.row_groups.get(row_group).ok_or_else(|| Error::Schema {
            path: self.path.clone(),
            what: "row group".to_string(),
            expected: format!("at least {} row groups", row_group + 1),
            found: self.row_groups.len().to_string(),
        })
    }

    /// Hands the batches of a row group's columns to `take`, which answers `None` for contents
    /// that do not fit the schema.
    fn read_columns(
        &self,
        row_group: usize,
        columns: &[&str],
        mut take: impl FnMut(&RecordBatch) -> Option<()>,
    ) -> Result<()> {
        let file = File::open(&self.path).map_err(Error::io("open", &self.path))?;
        guarded(&self.path, Some(row_group), || {
            let mask =
                ProjectionMask::columns(self.metadata.parquet_schema(), columns.iter().copied());
            let reader =
                ParquetRecordBatchReaderBuilder::new_with_metadata(file, self.metadata.clone())
                    .with_row_groups(vec![row_group])
                    .with_projection(mask)
                    .with_batch_size(BATCH_ROWS)
                    .build()
                    .map_err(|e| e.to_string())?;
            for batch in reader {
                take(&batch.map_err(|e| e.to_string())?)
                    .ok_or("rows that contradict the columns' own lengths or types")?;
            }
            Ok(())
        })
    }

    /// Finds the first id that is too large and names its place.
    fn out_of_range(
        &self,
        row_group: usize,
        offsets: &[usize],
        tokens: &[u32],
        vocab_size: usize,
    ) -> Error {
        let index = tokens
            .iter()
            .position(|&id| id as usize >= vocab_size)
            .unwrap_or(0);
        let row = offsets
            .partition_point(|&offset| offset <= index)
            .saturating_sub(1);
        Error::TokenOutOfRange {
            path: self.path.clone(),
            row_group,
            row,
            position: index - offsets[row],
            id: tokens[index],
            vocab_size,
        }
    }
}

fn u32_column<'a>(batch: &'a RecordBatch, name: &str) -> Option<&'a [u32]> {
    let column = batch
        .column_by_name(name)?
        .as_primitive_opt::<UInt32Type>()?;
    (column.null_count() == 0).then(|| &column.values()[..])
}

/// Checks names and types of the columns; answers whether loss weights are stored.
fn check_schema(path: &Path, fields: &arrow_schema::Fields) -> Result<bool> {
    let field = |name: &str| fields.iter().find(|f| f.name() == name).map(|f| f.as_ref());
    let list_of = |f: &Field, item: DataType| matches!(f.data_type(), DataType::List(element) if *element.data_type() == item);
    let check = |name: &str, expected: &str, right: &dyn Fn(&Field) -> bool| match field(name) {
        Some(f) if right(f) => Ok(()),
        found => Err(Error::Schema {
            path: path.to_path_buf(),
            what: format!("column \"{name}\""),
            expected: expected.to_string(),
            found: found.map_or("no such column".to_string(), |f| f.data_type().to_string()),
        }),
    };
    check(format::TOKENS, "list<uint32>", &|f| {
        list_of(f, DataType::UInt32)
    })?;
    check(format::N_TOKENS, "uint32", &|f| {
        *f.data_type() == DataType::UInt32
    })?;
    check(format::DOC_ID, "string", &|f| {
        *f.data_type() == DataType::Utf8
    })?;
    let has_weights = field(format::LOSS_WEIGHT).is_some();
    if has_weights {
        check(format::LOSS_WEIGHT, "list<float16>", &|f| {
            list_of(f, DataType::Float16)
        })?;
    }
    Ok(has_weights)
}

/// Hash of the footer's bytes. A Parquet file ends with the footer, its length in four bytes
/// (little-endian) and the magic "PAR1".
fn footer_checksum(file: &mut File, size_bytes: u64, path: &Path) -> Result<String> {
    let read = |file: &mut File, start: u64, length: u64| -> std::io::Result<Vec<u8>> {
        let mut bytes = vec![0; length as usize];
        file.seek(SeekFrom::Start(start))?;
        file.read_exact(&mut bytes)?;
        Ok(bytes)
    };
    let failed = |e| Error::Io {
        action: "read the footer of",
        path: path.to_path_buf(),
        reason: e,
    };
    let tail = read(file, size_bytes.saturating_sub(8), 8).map_err(failed)?;
    let length = tail
        .iter()
        .take(4)
        .rev()
        .fold(0u64, |n, &byte| n << 8 | u64::from(byte));
    let start = size_bytes.saturating_sub(8 + length);
    let footer = read(file, start, size_bytes - start).map_err(failed)?;
    Ok(crate::mix::content_hash(&footer))
}

/// Runs Parquet code on untrusted bytes. Malformed pages are meant to be errors there, but some
/// end in a panic; either becomes [`Error::Parquet`].
fn guarded<T>(
    path: &Path,
    row_group: Option<usize>,
    work: impl FnOnce() -> std::result::Result<T, String>,
) -> Result<T> {
    let outcome = std::panic::catch_unwind(AssertUnwindSafe(work));
    let detail = match outcome {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(detail)) => detail,
        Err(_) => "its pages are malformed".to_string(),
    };
    let place = row_group.map_or(String::new(), |n| format!(", row group {n}"));
    Err(Error::Parquet {
        path: path.to_path_buf(),
        place,
        detail,
    })
}
