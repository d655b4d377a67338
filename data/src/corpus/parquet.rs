//! Parquet: one row per document, its text in one column.

use super::CorpusOptions;
use super::documents::{Raw, RawTexts};
use crate::error::{Error, Result};
use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, RecordBatch};
use arrow_schema::DataType;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};
use std::fs::File;
use std::path::{Path, PathBuf};

/// Rows decoded at once.
const BATCH_ROWS: usize = 256;

/// The rows of a file.
struct Rows {
    path: PathBuf,
    reader: ParquetRecordBatchReader,
    text_column: String,
    id_column: Option<String>,
    batch: Option<RecordBatch>,
    row_in_batch: usize,
    row: u64,
}

/// Reads the text column of `path`.
pub(super) fn read(path: &Path, options: &CorpusOptions) -> Result<RawTexts> {
    let damaged = |e: parquet::errors::ParquetError| Error::Parquet {
        path: path.to_path_buf(),
        place: String::new(),
        detail: e.to_string(),
    };
    let file = File::open(path).map_err(Error::io("open", path))?;
    let builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(damaged)?;
    let columns: Vec<&str> = [Some(&options.text_field), options.id_field.as_ref()]
        .into_iter()
        .flatten()
        .map(|c| &**c)
        .collect();
    for column in &columns {
        let field = builder
            .schema()
            .fields()
            .iter()
            .find(|field| field.name() == column);
        let is_text = field.is_some_and(|field| {
            matches!(
                field.data_type(),
                DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View
            )
        });
        if !is_text {
            let names: Vec<String> = builder
                .schema()
                .fields()
                .iter()
                .map(|field| format!("{} ({})", field.name(), field.data_type()))
                .collect();
            return Err(Error::Record {
                path: path.to_path_buf(),
                place: format!("column \"{column}\""),
                problem: format!(
                    "not a column of strings (columns: {}); name it with --text-field or --id-field",
                    names.join(", ")
                ),
            });
        }
    }
    let mask = ProjectionMask::columns(builder.parquet_schema(), columns);
    let reader = builder
        .with_projection(mask)
        .with_batch_size(BATCH_ROWS)
        .build()
        .map_err(damaged)?;
    Ok(Box::new(Rows {
        path: path.to_path_buf(),
        reader,
        text_column: options.text_field.clone(),
        id_column: options.id_field.clone(),
        batch: None,
        row_in_batch: 0,
        row: 0,
    }))
}

/// The string in a row of any string column; `None` for null.
fn string(column: Option<&ArrayRef>, row: usize) -> Option<&str> {
    let column = column.filter(|column| column.is_valid(row))?;
    match column.data_type() {
        DataType::LargeUtf8 => Some(column.as_string::<i64>().value(row)),
        DataType::Utf8View => Some(column.as_string_view().value(row)),
        _ => Some(column.as_string::<i32>().value(row)),
    }
}

impl Iterator for Rows {
    type Item = Result<Raw>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let Some(batch) = self
                .batch
                .as_ref()
                .filter(|batch| self.row_in_batch < batch.num_rows())
            else {
                self.row_in_batch = 0;
                match self.reader.next()? {
                    Ok(batch) => self.batch = Some(batch),
                    Err(error) => {
                        return Some(Err(Error::Parquet {
                            path: self.path.clone(),
                            place: format!(", near row {}", self.row),
                            detail: error.to_string(),
                        }));
                    }
                }
                continue;
            };
            let row = self.row_in_batch;
            let text = string(batch.column_by_name(&self.text_column), row).unwrap_or_default();
            let id = match &self.id_column {
                None => None,
                Some(column) => match string(batch.column_by_name(column), row) {
                    Some(id) => Some(id.to_string()),
                    None => {
                        return Some(Err(Error::Record {
                            path: self.path.clone(),
                            place: format!("row {}", self.row),
                            problem: format!("no id in the column \"{column}\""),
                        }));
                    }
                },
            };
            // A null text comes out empty, and is counted and left out like one.
            let raw = Raw {
                id,
                place: Some(self.row.to_string()),
                text: text.as_bytes().to_vec(),
            };
            self.row_in_batch += 1;
            self.row += 1;
            return Some(Ok(raw));
        }
    }
}
