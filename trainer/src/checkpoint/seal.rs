//! A manifest as bytes: JSON that a person can read, closed by a checksum over itself.
//!
//! The last key of the object is `checksum`, the xxh3-128 of every byte before it. The tail that
//! follows is compared byte for byte, so no bit of the file is left unchecked.

use std::io::{self, Write};

use serde::{Deserialize, Serialize};
use serde_json::ser::{Formatter, Serializer};
use xxhash_rust::xxh3::xxh3_128;

use super::manifest::{FORMAT, FormatLimits, Manifest};

const TAIL_START: &[u8] = b",\n  \"checksum\": \"";
const TAIL_END: &[u8] = b"\"\n}\n";
const DIGITS: usize = 32;

/// xxh3-128 as it is written everywhere: 32 lower-case hexadecimal digits.
pub(super) fn hex(checksum: u128) -> String {
    format!("{checksum:032x}")
}

/// Why bytes are not a manifest.
#[derive(Debug)]
pub(super) enum Broken {
    /// The seal does not hold.
    Damaged(String),
    /// Another format version.
    Version(u32),
    /// Intact, but not a manifest.
    Invalid(String),
}

/// The bytes of `manifest.json`.
pub(super) fn encode(manifest: &Manifest) -> Result<Vec<u8>, serde_json::Error> {
    let mut bytes = Vec::new();
    manifest.serialize(&mut Serializer::with_formatter(
        &mut bytes,
        Shallow::default(),
    ))?;
    // The formatter ends the object with "\n}"; the seal takes its place.
    bytes.truncate(bytes.len() - 2);
    let checksum = hex(xxh3_128(&bytes));
    bytes.extend_from_slice(TAIL_START);
    bytes.extend_from_slice(checksum.as_bytes());
    bytes.extend_from_slice(TAIL_END);
    Ok(bytes)
}

/// Reads the bytes of `manifest.json`. The seal is checked before anything is parsed; what the
/// manifest says is not checked here.
pub(super) fn decode(bytes: &[u8]) -> Result<Manifest, Broken> {
    let tail = TAIL_START.len() + DIGITS + TAIL_END.len();
    let Some((body, seal)) = bytes.len().checked_sub(tail).map(|at| bytes.split_at(at)) else {
        return Err(Broken::Damaged(format!(
            "{} bytes are too few for a manifest",
            bytes.len()
        )));
    };
    let (start, rest) = seal.split_at(TAIL_START.len());
    let (stated, end) = rest.split_at(DIGITS);
    if start != TAIL_START || end != TAIL_END {
        return Err(Broken::Damaged(
            "it does not end with its checksum".to_owned(),
        ));
    }
    let found = hex(xxh3_128(body));
    if stated != found.as_bytes() {
        return Err(Broken::Damaged(format!(
            "checksum {} is stated, {found} was found",
            String::from_utf8_lossy(stated)
        )));
    }

    // Only the version is read from a manifest of another version.
    #[derive(Deserialize)]
    struct Header {
        format: String,
        format_version: u32,
    }
    let invalid = |error: serde_json::Error| Broken::Invalid(format!("not a manifest: {error}"));
    let header: Header = serde_json::from_slice(bytes).map_err(invalid)?;
    if header.format != FORMAT {
        return Err(Broken::Invalid(format!(
            "`format` is `{}`, `{FORMAT}` was expected",
            header.format
        )));
    }
    if !(FormatLimits::OLDEST..=FormatLimits::VERSION).contains(&header.format_version) {
        return Err(Broken::Version(header.format_version));
    }
    serde_json::from_slice(bytes).map_err(invalid)
}

/// Breaks lines in the two outer levels only, so that each tensor and each file is one line: a
/// manifest of a large run stays readable and is not mostly indentation.
#[derive(Default)]
struct Shallow {
    depth: usize,
    has_items: bool,
}

/// Containers up to this depth have an item per line.
const BROKEN_LEVELS: usize = 2;

impl Shallow {
    fn open<W: ?Sized + Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        self.has_items = false;
        writer.write_all(bracket)
    }

    fn close<W: ?Sized + Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        if self.depth <= BROKEN_LEVELS && self.has_items {
            writer.write_all(b"\n")?;
            writer.write_all("  ".repeat(self.depth - 1).as_bytes())?;
        }
        self.depth -= 1;
        self.has_items = true;
        writer.write_all(bracket)
    }

    fn item<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if !first {
            writer.write_all(if self.depth <= BROKEN_LEVELS {
                b","
            } else {
                b", "
            })?;
        }
        if self.depth <= BROKEN_LEVELS {
            writer.write_all(b"\n")?;
            writer.write_all("  ".repeat(self.depth).as_bytes())?;
        }
        Ok(())
    }
}

impl Formatter for Shallow {
    fn begin_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"[")
    }

    fn end_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"]")
    }

    fn begin_array_value<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.item(writer, first)
    }

    fn end_array_value<W: ?Sized + Write>(&mut self, _writer: &mut W) -> io::Result<()> {
        self.has_items = true;
        Ok(())
    }

    fn begin_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"{")
    }

    fn end_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"}")
    }

    fn begin_object_key<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.item(writer, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }

    fn end_object_value<W: ?Sized + Write>(&mut self, _writer: &mut W) -> io::Result<()> {
        self.has_items = true;
        Ok(())
    }
}
