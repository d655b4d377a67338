//! Compiled kernels on disk, so that a run's start does not wait for a compiler.
//!
//! A file is named by a hash of everything that went into it and ends with a checksum of what came
//! out: a change makes another file, and one that was cut short is made again. It appears under its
//! name when it is complete, so ranks that start together do not see each other's halves. A cache
//! that cannot be read or written costs time alone.

use std::io;
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::xxh3_128;

/// Bytes of the checksum at the end of a file.
const CHECKSUM: usize = 16;

/// `$XDG_CACHE_HOME/oxitron/kernels`, or the same in `~/.cache`. `None` where neither is known.
pub(super) fn folder() -> Option<PathBuf> {
    let given = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let caches = given("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .or_else(|| Some(PathBuf::from(given("HOME")?).join(".cache")))?;
    Some(caches.join("oxitron").join("kernels"))
}

/// A hash of the texts that something is made from.
pub(super) fn hash<'t>(texts: impl IntoIterator<Item = &'t str>) -> u128 {
    let texts: Vec<&str> = texts.into_iter().collect();
    xxh3_128(texts.join("\0").as_bytes())
}

/// What lies in a file, if all of it does.
pub(super) fn read(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = std::fs::read(path).ok()?;
    let content = bytes.len().checked_sub(CHECKSUM)?;
    let sound = xxh3_128(&bytes[..content]).to_le_bytes() == bytes[content..];
    bytes.truncate(content);
    sound.then_some(bytes)
}

/// Writes a file and its checksum, all at once for whoever reads.
pub(super) fn write(path: &Path, content: &[u8]) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let unfinished = path.with_extension(format!("{}.tmp", std::process::id()));
    let checksum = xxh3_128(content).to_le_bytes();
    let written = std::fs::write(&unfinished, [content, &checksum].concat())
        .and_then(|()| std::fs::rename(&unfinished, path));
    if written.is_err() {
        let _ = std::fs::remove_file(&unfinished);
    }
    written
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn only_whole_files_are_read() {
        let folder = std::env::temp_dir().join(format!("oxitron-cache-{}", std::process::id()));
        let path = folder.join("deeper").join("kernel.cubin");
        assert_eq!(read(&path), None);
        write(&path, b"code").unwrap();
        assert_eq!(read(&path).unwrap(), b"code");
        let whole = std::fs::read(&path).unwrap();
        for damaged in [&whole[..whole.len() - 1], &whole[1..], b"", b"short"] {
            std::fs::write(&path, damaged).unwrap();
            assert_eq!(read(&path), None);
        }
        let names = std::fs::read_dir(path.parent().unwrap()).unwrap();
        assert_eq!(names.count(), 1, "nothing unfinished is left");
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn another_text_or_another_cut_is_another_hash() {
        let all = [
            hash(["a", "b"]),
            hash(["ab"]),
            hash(["a", "c"]),
            hash(["b", "a"]),
        ];
        for (i, one) in all.iter().enumerate() {
            assert!(all[i + 1..].iter().all(|other| other != one));
        }
    }
}
