//! Host files: which machines run how many ranks.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use tempfile::{NamedTempFile, TempPath};

/// A host file of Open MPI, one machine per line: `node1 slots=2`.
#[derive(Debug, Clone)]
pub struct Hosts {
    /// Where it lies, for `mpirun`.
    pub path: PathBuf,
    /// The machines, in the order of the file.
    machines: Vec<Machine>,
    /// Keeps a file of ours in place; the last copy of the value removes it.
    _temporary: Option<Arc<TempPath>>,
}

/// A line of a host file.
#[derive(Debug, Clone)]
struct Machine {
    name: String,
    slots: usize,
    line: String,
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
        let mut machines = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let words = line.split('#').next().unwrap_or_default();
            let Some(name) = words.split_whitespace().next() else {
                continue;
            };
            let count = words
                .split_whitespace()
                .find_map(|word| word.strip_prefix("slots="))
                .and_then(|count| count.parse().ok())
                .filter(|&count: &usize| count > 0);
            match count {
                Some(slots) => machines.push(Machine {
                    name: name.to_owned(),
                    slots,
                    line: line.to_owned(),
                }),
                None => bail!(
                    "{}:{}: expected `HOST slots=N` with N ≥ 1, the number of ranks that the \
                     machine runs, found `{}`",
                    path.display(),
                    index + 1,
                    line.trim()
                ),
            }
        }
        if machines.is_empty() {
            bail!(
                "{}: names no machine; write one `HOST slots=N` per line",
                path.display()
            );
        }
        let path = path
            .canonicalize()
            .with_context(|| format!("cannot resolve the host file {}", path.display()))?;
        Ok(Self {
            path,
            machines,
            _temporary: None,
        })
    }

    /// The machines, each once, in the order of the file.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = Vec::new();
        for machine in &self.machines {
            if !names.contains(&machine.name) {
                names.push(machine.name.clone());
            }
        }
        names
    }

    /// Slots of all machines together.
    pub fn slots(&self) -> usize {
        self.machines.iter().map(|machine| machine.slots).sum()
    }

    /// The same without the machines in `dead`, in a temporary file; none when nobody is left.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn without(&self, dead: &[String]) -> Result<Option<Self>> {
        let alive = |machine: &&Machine| !dead.contains(&machine.name);
        let machines: Vec<Machine> = self.machines.iter().filter(alive).cloned().collect();
        if machines.is_empty() {
            return Ok(None);
        }
        let write = || {
            let mut file = NamedTempFile::with_prefix("oxitron-hosts-")?;
            for machine in &machines {
                writeln!(file, "{}", machine.line)?;
            }
            file.flush()?;
            std::io::Result::Ok(file.into_temp_path())
        };
        let file = write().with_context(|| {
            format!(
                "cannot write a host file to {}",
                std::env::temp_dir().display()
            )
        })?;
        Ok(Some(Self {
            path: file.to_path_buf(),
            machines,
            _temporary: Some(Arc::new(file)),
        }))
    }

    /// How many of `ranks` each machine gets when they fill the slots in order and, once all are
    /// full, the machines in turn.
    fn fill(&self, ranks: usize) -> Vec<usize> {
        let extra = ranks.saturating_sub(self.slots());
        let (all, some) = (extra / self.machines.len(), extra % self.machines.len());
        let mut left = ranks - extra;
        let mut filled = Vec::new();
        for (index, machine) in self.machines.iter().enumerate() {
            let here = machine.slots.min(left);
            left -= here;
            filled.push(here + all + usize::from(index < some));
        }
        filled
    }

    /// The most ranks that one machine gets.
    pub fn busiest(&self, ranks: usize) -> usize {
        self.fill(ranks).into_iter().max().unwrap_or(ranks)
    }

    /// Whether all machines that get ranks get as many.
    pub fn even(&self, ranks: usize) -> bool {
        let busiest = self.busiest(ranks);
        let filled = self.fill(ranks);
        filled.iter().all(|&here| here == 0 || here == busiest)
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
        assert_eq!(
            (hosts.names(), hosts.slots()),
            (names(&["node1", "node2"]), 6)
        );
        assert_eq!(
            [1, 2, 3, 6, 8].map(|ranks| hosts.busiest(ranks)),
            [1, 2, 2, 4, 5]
        );
        assert_eq!(
            [1, 2, 3, 4, 5, 6].map(|ranks| hosts.even(ranks)),
            [true, true, false, true, false, false]
        );
    }

    #[test]
    fn machines_that_are_gone_leave_the_file_and_the_others_keep_their_lines() {
        let hosts = read("a slots=2 max_slots=2 # one\nb slots=1\na slots=1\n").unwrap();
        assert_eq!(hosts.names(), names(&["a", "b"]));
        let left = hosts.without(&names(&["b"])).unwrap().unwrap();
        assert_eq!((left.names(), left.slots()), (names(&["a"]), 3));
        let text = std::fs::read_to_string(&left.path).unwrap();
        assert_eq!(text, "a slots=2 max_slots=2 # one\na slots=1\n");
        let (path, copy) = (left.path.clone(), left.clone());
        drop(left);
        assert!(path.exists());
        drop(copy);
        assert!(!path.exists());
        assert!(hosts.without(&names(&["a", "b"])).unwrap().is_none());
    }

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
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
