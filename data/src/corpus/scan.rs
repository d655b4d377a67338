//! Finding the files of a corpus, in an order that is the same on every machine.

use super::{CorpusOptions, Format, share};
use crate::error::{Error, Result};
use std::path::{Path, PathBuf};

/// One file to read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CorpusFile {
    /// Where it lies.
    pub path: PathBuf,
    /// Name of the input and the path below it, with `/`: the same wherever the input lies.
    pub origin: String,
    /// Size.
    pub bytes: u64,
    /// How to read it; never [`Format::Auto`].
    pub format: Format,
}

/// What scanning left out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ScanCounts {
    /// Files of other extensions.
    pub other_extension: u64,
    /// Text files that are too large.
    pub too_large: u64,
    /// Files of trees beyond their share.
    pub beyond_share: u64,
}

/// The files of a corpus in reading order.
#[derive(Debug, Clone)]
pub struct Corpus {
    pub(super) options: CorpusOptions,
    files: Vec<CorpusFile>,
    left_out: ScanCounts,
}

impl Corpus {
    /// Finds the files that `options` name.
    ///
    /// # Errors
    /// An input that does not exist or cannot be read, a share that cannot be kept, and
    /// [`Error::EmptyCorpus`] when no file is left.
    pub fn scan(options: &CorpusOptions) -> Result<Corpus> {
        let mut left_out = ScanCounts::default();
        let mut trees = Vec::new();
        for input in &options.inputs {
            trees.push(scan_input(input, options, &mut left_out)?);
        }
        let found: usize = trees.iter().map(Vec::len).sum();
        if let Some(share) = options.max_tree_share {
            share::limit(&mut trees, share)?;
        }
        let mut files: Vec<CorpusFile> = trees.into_iter().flatten().collect();
        left_out.beyond_share = (found - files.len()) as u64;
        // Two inputs may bear the same name; their paths then decide.
        files.sort_by(|a, b| (&a.origin, &a.path).cmp(&(&b.origin, &b.path)));
        files.dedup_by(|a, b| a.path == b.path);
        if files.is_empty() {
            return Err(Error::EmptyCorpus(format!(
                "{} input(s){}: {} files of other extensions, {} too large; check the paths, \
                 --extensions and --max-file-bytes",
                options.inputs.len(),
                first(options.inputs.first()),
                left_out.other_extension,
                left_out.too_large
            )));
        }
        Ok(Corpus {
            options: options.clone(),
            files,
            left_out,
        })
    }

    /// Number and first of the files, for messages.
    pub(crate) fn describe(&self) -> String {
        let path = self.files.first().map(|file| &file.path);
        format!("{} file(s){}", self.files.len(), first(path))
    }

    /// The files in reading order.
    pub fn files(&self) -> &[CorpusFile] {
        &self.files
    }

    /// What was left out.
    pub fn left_out(&self) -> ScanCounts {
        self.left_out
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }
}

/// ` (first: PATH)`, or nothing.
fn first(path: Option<&PathBuf>) -> String {
    path.map_or_else(String::new, |path| format!(" (first: {})", path.display()))
}

/// The files of one input.
fn scan_input(
    input: &Path,
    options: &CorpusOptions,
    left_out: &mut ScanCounts,
) -> Result<Vec<CorpusFile>> {
    let metadata = std::fs::metadata(input).map_err(Error::io("read the input", input))?;
    // "." and ".." have no name of their own.
    let resolved = std::fs::canonicalize(input).map_err(Error::io("resolve", input))?;
    let name = resolved
        .file_name()
        .map(|n| n.to_string_lossy().into_owned())
        .unwrap_or_default();
    if metadata.is_file() {
        let format = format_of(input, options.format);
        let file = CorpusFile {
            path: input.to_path_buf(),
            origin: name,
            bytes: metadata.len(),
            format,
        };
        return Ok(vec![file]);
    }
    let mut files = Vec::new();
    let visible = |entry: &walkdir::DirEntry| {
        entry.depth() == 0 || !entry.file_name().to_string_lossy().starts_with('.')
    };
    for entry in walkdir::WalkDir::new(input)
        .into_iter()
        .filter_entry(visible)
    {
        let failed = |e: walkdir::Error| {
            let path = e.path().unwrap_or(input).to_path_buf();
            Error::Io {
                action: "list",
                path,
                reason: e.into(),
            }
        };
        let entry = entry.map_err(failed)?;
        if !entry.file_type().is_file() {
            continue;
        }
        let bytes = entry.metadata().map_err(failed)?.len();
        let path = entry.into_path();
        let format = format_of(&path, options.format);
        if !wanted_extension(&path, format, options) {
            left_out.other_extension += 1;
        } else if format == Format::Text && options.max_file_bytes.is_some_and(|max| bytes > max) {
            left_out.too_large += 1;
        } else {
            let below = path.strip_prefix(input).unwrap_or(&path);
            let parts: Vec<_> = below
                .components()
                .map(|c| c.as_os_str().to_string_lossy())
                .collect();
            let origin = format!("{name}/{}", parts.join("/"));
            files.push(CorpusFile {
                path,
                origin,
                bytes,
                format,
            });
        }
    }
    Ok(files)
}

fn format_of(path: &Path, format: Format) -> Format {
    if format != Format::Auto {
        return format;
    }
    match extension(path).as_str() {
        "jsonl" | "ndjson" => Format::Jsonl,
        "parquet" => Format::Parquet,
        _ => Format::Text,
    }
}

/// Whether a file of a tree is wanted: by the extensions asked for, or else by what its format
/// usually has.
fn wanted_extension(path: &Path, format: Format, options: &CorpusOptions) -> bool {
    let extension = extension(path);
    let named = |wanted: &String| wanted.trim_start_matches('.') == extension;
    match format {
        _ if !options.extensions.is_empty() => options.extensions.iter().any(named),
        Format::Jsonl => matches!(extension.as_str(), "jsonl" | "ndjson" | "json"),
        Format::Parquet => extension == "parquet",
        Format::Text | Format::Auto => true,
    }
}

fn extension(path: &Path) -> String {
    path.extension()
        .map(|e| e.to_string_lossy().to_lowercase())
        .unwrap_or_default()
}
