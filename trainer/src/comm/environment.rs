//! What the launcher's environment says about this process.
//!
//! `MPI_Init` in a process that no MPI launcher started makes it a world of its own. That is right
//! for a run of one rank, and silently wrong under an `srun` without the matching MPI plug-in, where
//! N processes would each train alone. So MPI is only initialised where a launcher left its mark,
//! and its size is compared with what the launcher promised.

use super::error::{Error, Result};

/// Variables by which a launcher that MPI can talk to makes itself known.
const MPI_MARKS: [&str; 3] = ["OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK"];

/// Variables that hold this process's rank, before any communication.
const RANKS: [&str; 4] = [
    "OMPI_COMM_WORLD_RANK",
    "PMIX_RANK",
    "PMI_RANK",
    "SLURM_PROCID",
];

/// Variables that hold the number of ranks, the surest first. The step's own count comes before
/// that of the whole job.
const SIZES: [&str; 4] = [
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_NTASKS",
];

const REMEDY: &str = "under Slurm start the ranks with `srun --mpi=pmix` (see `srun --mpi=list`), \
                      elsewhere with `oxitron launch` or the mpirun of the MPI library that this \
                      program is linked to";

/// What the environment of a process says about its place in a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Environment {
    /// Whether a launcher that MPI can talk to started this process.
    pub under_mpi: bool,
    /// This process's rank, if a launcher gave it one. Known before MPI is initialised, for
    /// instance to name a log file.
    pub rank: Option<usize>,
    /// The number of ranks that the launcher started, with the variable that says so.
    pub expected_world: Option<(usize, &'static str)>,
}

impl Environment {
    /// Reads the environment of this process.
    #[must_use]
    pub fn read() -> Self {
        Self::from_variables(|name| std::env::var(name).ok())
    }

    /// Reads an environment given as a function from name to value.
    fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Self {
        let number = |name: &str| variable(name)?.trim().parse::<usize>().ok();
        Self {
            under_mpi: MPI_MARKS.iter().any(|name| variable(name).is_some()),
            rank: RANKS.iter().find_map(|name| number(name)),
            expected_world: SIZES.iter().find_map(|&name| Some((number(name)?, name))),
        }
    }

    /// Refuses a process that was started as one of several ranks in a way that MPI cannot see.
    ///
    /// # Errors
    /// [`Error::Start`] with the remedy.
    pub fn check_alone(&self) -> Result<()> {
        match self.expected_world {
            Some((expected, variable)) if expected > 1 && !self.under_mpi => {
                Err(Error::Start(format!(
                    "{variable}={expected} says that this is one of {expected} processes, but they \
                     were started without MPI and would each train alone; {REMEDY}"
                )))
            }
            _ => Ok(()),
        }
    }

    /// Compares the size that MPI found with the one that the launcher promised.
    ///
    /// # Errors
    /// [`Error::Start`] with the remedy.
    pub fn check_world(&self, found: usize) -> Result<()> {
        match self.expected_world {
            Some((expected, variable)) if expected != found => Err(Error::Start(format!(
                "{variable}={expected} says that this is one of {expected} processes, but MPI found \
                 a world of {found}: the launcher and this program use different MPI libraries or \
                 plug-ins; {REMEDY}"
            ))),
            _ => Ok(()),
        }
    }
}

/// The MPI library that this program runs on, as it calls itself.
#[must_use]
pub fn mpi_library() -> String {
    #[cfg(feature = "mpi")]
    let name = super::mpi::library();
    #[cfg(not(feature = "mpi"))]
    let name = "none: built without it, for one rank".to_owned();
    name
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn environment(variables: &[(&str, &str)]) -> Environment {
        Environment::from_variables(|wanted| {
            variables
                .iter()
                .find(|(name, _)| *name == wanted)
                .map(|(_, v)| (*v).to_owned())
        })
    }

    #[test]
    fn a_process_alone_is_alone() {
        let alone = environment(&[]);
        assert!(!alone.under_mpi);
        assert_eq!(alone.rank, None);
        alone.check_alone().unwrap();
        alone.check_world(1).unwrap();
    }

    #[test]
    fn srun_without_a_plugin_is_refused_with_the_remedy() {
        let singleton = environment(&[("SLURM_NTASKS", "8"), ("SLURM_PROCID", "3")]);
        assert_eq!(singleton.rank, Some(3));
        let error = singleton.check_alone().unwrap_err().to_string();
        assert!(
            error.contains("SLURM_NTASKS=8") && error.contains("srun --mpi=pmix"),
            "{error}"
        );
    }

    #[test]
    fn a_world_of_another_size_is_refused() {
        let rank = environment(&[("PMIX_RANK", "1"), ("SLURM_NTASKS", "4")]);
        assert!(rank.under_mpi);
        rank.check_alone().unwrap();
        let error = rank.check_world(1).unwrap_err().to_string();
        assert!(
            error.contains("SLURM_NTASKS=4") && error.contains("a world of 1"),
            "{error}"
        );
    }

    #[test]
    fn mpirun_inside_a_larger_slurm_job_counts_its_own_ranks() {
        let rank = environment(&[
            ("SLURM_NTASKS", "8"),
            ("OMPI_COMM_WORLD_SIZE", "2"),
            ("OMPI_COMM_WORLD_RANK", "1"),
        ]);
        assert_eq!(rank.rank, Some(1));
        rank.check_world(2).unwrap();
        assert!(rank.check_world(8).is_err());
    }
}
