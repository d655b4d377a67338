//! JSONL: one object per line, its text in one field.

use super::CorpusOptions;
use super::documents::{Raw, RawTexts};
use crate::error::{Error, Result};
use serde_json::Value;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

/// The lines of a file.
struct Lines {
    path: PathBuf,
    reader: BufReader<File>,
    text_field: String,
    id_field: Option<String>,
    line: u64,
}

/// Reads `path` line by line.
pub(super) fn read(path: &Path, options: &CorpusOptions) -> Result<RawTexts> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    Ok(Box::new(Lines {
        path: path.to_path_buf(),
        reader: BufReader::with_capacity(1 << 20, file),
        text_field: options.text_field.clone(),
        id_field: options.id_field.clone(),
        line: 0,
    }))
}

impl Lines {
    fn parse(&self, line: &[u8]) -> Result<Raw> {
        let problem = |problem: String| Error::Record {
            path: self.path.clone(),
            place: format!("line {}", self.line),
            problem,
        };
        // Bytes that are no UTF-8 can only stand in strings of a valid line; U+FFFD replaces them.
        let line = String::from_utf8_lossy(line);
        let mut value: Value = serde_json::from_str(&line)
            .map_err(|e| problem(format!("not a JSON object ({e}); every line must hold one")))?;
        let Some(object) = value.as_object_mut() else {
            return Err(problem(
                "not a JSON object; every line must hold one".to_string(),
            ));
        };
        let id = match &self.id_field {
            None => None,
            Some(field) => match object.get(field) {
                Some(Value::String(id)) => Some(id.clone()),
                Some(Value::Number(id)) => Some(id.to_string()),
                _ => {
                    let problem_text = format!("no string or number in the field \"{field}\"");
                    return Err(problem(problem_text));
                }
            },
        };
        let Some(Value::String(text)) = object.get_mut(&self.text_field) else {
            let names: Vec<&str> = object.keys().map(String::as_str).collect();
            return Err(problem(format!(
                "no text in the field \"{}\" (fields: {}); name it with --text-field",
                self.text_field,
                names.join(", ")
            )));
        };
        let text = std::mem::take(text).into_bytes();
        Ok(Raw {
            id,
            place: Some(self.line.to_string()),
            text,
        })
    }
}

impl Iterator for Lines {
    type Item = Result<Raw>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut line = Vec::new();
        loop {
            line.clear();
            match self.reader.read_until(b'\n', &mut line) {
                Err(error) => return Some(Err(Error::io("read", &self.path)(error))),
                Ok(0) => return None,
                Ok(_) => self.line += 1,
            }
            if !line.iter().all(u8::is_ascii_whitespace) {
                return Some(self.parse(&line));
            }
        }
    }
}
