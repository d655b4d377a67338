//! Host files: which machines run how many ranks.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// A host file of Open MPI, one machine per line: `node1 slots=2`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hosts {
    /// Where it lies, for `mpirun`.
    pub path: PathBuf,
    /// Slots of each machine, in the order of the file.
    slots: Vec<usize>,
}

impl Hosts {
    /// Reads a host file. Every machine must say its slots: Open MPI would guess them from the
    /// cores, and a rank of Oxitron uses several.
    ///
    /// # Errors
    /// A file that cannot be read, a line without `slots=N`, no machine at all.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the host file {}", path.display()))?;
        let mut slots = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let words = line.split('#').next().unwrap_or_default();
            if words.trim().is_empty() {
                continue;
            }
            let count = words
                .split_whitespace()
                .find_map(|word| word.strip_prefix("slots="))
                .and_then(|count| count.parse().ok())
                .filter(|&count: &usize| count > 0);
            match count {
                Some(count) => slots.push(count),
                None => bail!(
                    "{}:{}: expected `HOST slots=N` with N ≥ 1, the number of ranks that the \
                     machine runs, found `{}`",
                    path.display(),
                    index + 1,
                    line.trim()
                ),
            }
        }
        if slots.is_empty() {
            bail!(
                "{}: names no machine; write one `HOST slots=N` per line",
                path.display()
            );
        }
        let path = path
            .canonicalize()
            .with_context(|| format!("cannot resolve the host file {}", path.display()))?;
        Ok(Self { path, slots })
    }

    /// The most ranks that one machine gets when `ranks` fill the slots in order and, once all are
    /// full, the machines in turn.
    pub fn busiest(&self, ranks: usize) -> usize {
        let total: usize = self.slots.iter().sum();
        let extra = ranks.saturating_sub(total).div_ceil(self.slots.len());
        let mut left = ranks;
        let mut most = 0;
        for &slots in &self.slots {
            let here = slots.min(left);
            left -= here;
            most = most.max(here);
        }
        most + extra
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn read(text: &str) -> Result<Hosts> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hosts");
        std::fs::write(&path, text).unwrap();
        Hosts::read(&path)
    }

    #[test]
    fn slots_are_counted_and_filled_in_order() {
        let hosts = read("# two machines\nnode1 slots=2\n\nnode2 slots=4 max_slots=4\n").unwrap();
        assert_eq!(hosts.slots, [2, 4]);
        assert_eq!(
            [1, 2, 3, 6, 8].map(|ranks| hosts.busiest(ranks)),
            [1, 2, 2, 4, 5]
        );
    }

    #[test]
    fn a_machine_without_slots_is_refused_with_its_line() {
        let error = read("node1 slots=2\nnode2\n").unwrap_err().to_string();
        assert!(
            error.contains("hosts:2: ") && error.contains("found `node2`"),
            "{error}"
        );
        assert!(read("# nothing\n").is_err());
    }
}
