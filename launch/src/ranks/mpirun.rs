//! The command line of `mpirun`.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Result, bail};

use super::hosts::Hosts;
use super::leftover;

/// Variables that ranks on other machines get as they are here, besides those that begin with
/// [`OWN_PREFIX`]. Ranks on this machine inherit everything anyway.
const PASSED_ON: [&str; 4] = [
    "OMP_NUM_THREADS",
    "RUST_BACKTRACE",
    "LD_LIBRARY_PATH",
    "LIBTORCH",
];
const OWN_PREFIX: &str = "OXITRON_";

/// Open MPI 4 and 5 refuse to run as root, the user of most containers, unless told twice.
const ROOT_CONSENT: [&str; 4] = [
    "OMPI_ALLOW_RUN_AS_ROOT",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM",
    "PRTE_ALLOW_RUN_AS_ROOT",
    "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM",
];

/// What is started on a machine to see whether anything can be.
const TRIVIAL: &str = "/bin/true";

/// Ranks to start.
#[derive(Debug, Clone)]
pub struct Job {
    /// What every rank runs.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// How many of them; may exceed the number of cores.
    pub ranks: usize,
    /// Where they run; this machine without a host file.
    pub hosts: Option<Hosts>,
    /// Compute threads of each rank; chosen by [`Job::threads_per_rank`] when `None`, unless the
    /// environment has `OMP_NUM_THREADS` already.
    pub threads: Option<usize>,
}

impl Job {
    /// An equal share of this machine's cores for each rank on it, at least one. Other machines
    /// of a host file are taken to have as many cores.
    pub fn threads_per_rank(&self) -> usize {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let neighbours = self
            .hosts
            .as_ref()
            .map_or(self.ranks, |hosts| hosts.busiest(self.ranks));
        (cores / neighbours.max(1)).max(1)
    }

    /// The command that starts the ranks: in a process group of its own, so that a terminal's
    /// Ctrl-C reaches the launcher only, with both outputs piped. All processes below it carry
    /// `mark` in their environment.
    ///
    /// # Errors
    /// `mpirun` or `setpriv` is not installed (the message says how to install it), or the program
    /// is not there.
    pub fn command(&self, mark: &str) -> Result<Command> {
        if !self.program.is_file() {
            bail!(
                "cannot start ranks: {} is not a file",
                self.program.display()
            );
        }
        let (mut command, die_with_parent) = mpirun(mark)?;
        command.arg("--tag-output");
        command.arg("-n").arg(self.ranks.to_string());
        if let Some(hosts) = &self.hosts {
            command.arg("--hostfile").arg(&hosts.path);
        }

        match self.threads {
            Some(threads) => {
                command.env("OMP_NUM_THREADS", threads.to_string());
            }
            None if std::env::var_os("OMP_NUM_THREADS").is_none() => {
                command.env("OMP_NUM_THREADS", self.threads_per_rank().to_string());
            }
            None => {}
        }
        for name in passed_on(&command) {
            command.arg("-x").arg(name);
        }

        command
            .args(die_with_parent)
            .arg(&self.program)
            .args(&self.arguments);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Ok(command)
    }
}

/// The command that starts a trivial program on one machine, in a process group of its own.
///
/// # Errors
/// `mpirun` or `setpriv` is not installed.
pub(super) fn probe(host: &str, mark: &str) -> Result<Command> {
    let (mut command, _) = mpirun(mark)?;
    command.args(["-n", "1", "--host", &format!("{host}:1"), TRIVIAL]);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    Ok(command)
}

/// `mpirun` with the options that every use of it here needs, and the words that make a program die
/// with its parent.
fn mpirun(mark: &str) -> Result<(Command, [OsString; 3])> {
    let mpirun = find("mpirun", "openmpi-bin")?;
    let setpriv = find("setpriv", "util-linux")?;
    let mut command = Command::new(&setpriv);
    let die_with_parent: [OsString; 3] = [setpriv.into(), "--pdeathsig".into(), "KILL".into()];
    command.args(&die_with_parent[1..]).arg(mpirun);
    // Open MPI would tie a rank with all its threads to one core (at one and two ranks), and
    // refuse more ranks than cores.
    command.args(["--bind-to", "none", "--oversubscribe"]);
    if rustix::process::geteuid().is_root() {
        for name in ROOT_CONSENT {
            command.env(name, "1");
        }
    }
    command.env(leftover::VARIABLE, mark);
    command.stdin(Stdio::null()).process_group(0);
    Ok((command, die_with_parent))
}

/// The names of the variables, set here or for `command`, that every rank must see.
fn passed_on(command: &Command) -> Vec<OsString> {
    let ours = command.get_envs().map(|(name, _)| name.to_owned());
    let inherited = std::env::vars_os().map(|(name, _)| name);
    let mut names: Vec<OsString> = ours
        .chain(inherited)
        .filter(|name| {
            PASSED_ON.iter().any(|passed| name == passed)
                || name
                    .to_str()
                    .is_some_and(|name| name.starts_with(OWN_PREFIX))
        })
        .collect();
    names.sort();
    names.dedup();
    names
}

/// Looks a program up in PATH, and in `/usr/bin` when that is not part of it.
fn find(program: &str, package: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain([Path::new("/usr/bin").to_owned()]);
    match folders
        .map(|folder| folder.join(program))
        .find(|file| file.is_file())
    {
        Some(file) => Ok(file),
        None => bail!(
            "cannot find `{program}` in PATH; install it with `sudo apt-get install {package}`, or \
             start `oxitron train` on one rank without a launcher"
        ),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn the_program_and_its_arguments_come_last() {
        let job = Job {
            program: "/bin/sh".into(),
            arguments: vec!["train".into(), "a config.toml".into()],
            ranks: 7,
            hosts: None,
            threads: Some(3),
        };
        let command = job.command("a mark").unwrap();
        let words: Vec<_> = command
            .get_args()
            .map(|word| word.to_str().unwrap())
            .collect();
        assert!(
            words.ends_with(&["KILL", "/bin/sh", "train", "a config.toml"]),
            "{words:?}"
        );
        assert!(
            words.windows(2).any(|pair| pair == ["-n", "7"]),
            "{words:?}"
        );
        assert!(
            words
                .windows(2)
                .any(|pair| pair == ["-x", "OMP_NUM_THREADS"]),
            "{words:?}"
        );
        let threads = command
            .get_envs()
            .find(|(name, _)| *name == "OMP_NUM_THREADS")
            .unwrap()
            .1;
        assert_eq!(threads.unwrap(), "3");
    }

    #[test]
    fn every_rank_gets_at_least_one_thread() {
        let job = |ranks| Job {
            program: PathBuf::new(),
            arguments: Vec::new(),
            ranks,
            hosts: None,
            threads: None,
        };
        assert_eq!(job(10_000).threads_per_rank(), 1);
        let cores = std::thread::available_parallelism().unwrap().get();
        assert_eq!(job(1).threads_per_rank(), cores);
    }

    #[test]
    fn a_missing_program_is_reported_with_its_package() {
        let error = find("no-such-program-here", "some-package")
            .unwrap_err()
            .to_string();
        assert!(error.contains("apt-get install some-package"), "{error}");
    }
}
