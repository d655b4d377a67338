//! Which machines answer: a trivial program is started on each, the way ranks are.
//!
//! A machine that answers a ping but on which `mpirun` cannot start anything is of no use, and
//! how machines are reached (ssh, or whatever `OMPI_MCA_plm_rsh_agent` says) is known to `mpirun`
//! alone. So `mpirun` itself is asked, once per machine, all at the same time.

use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process_group};

use super::leftover;
use super::mpirun;

/// How long a machine may take to answer.
pub const PROBE_LIMIT: Duration = Duration::from_secs(20);

/// How many machines are asked at the same time; each costs an `mpirun` here.
const AT_ONCE: usize = 32;

const LOOK: Duration = Duration::from_millis(50);

/// A machine, and why nothing can be started on it, if so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// As the host file calls it.
    pub host: String,
    /// What happened instead of an answer.
    pub dead: Option<String>,
}

/// One question under way.
struct Question {
    host: usize,
    child: Child,
    mark: String,
    until: Instant,
}

impl Question {
    fn ask(host: usize, name: &str, limit: Duration) -> Result<Self> {
        let mark = leftover::new_mark();
        let child = mpirun::probe(name, &mark)?
            .spawn()
            .context("cannot start mpirun")?;
        let until = Instant::now() + limit;
        Ok(Self {
            host,
            child,
            mark,
            until,
        })
    }

    /// `None` while there is hope; then why the machine is of no use, if it is not.
    fn answer(&mut self, limit: Duration) -> Result<Option<Option<String>>> {
        if let Some(status) = self.child.try_wait().context("cannot wait for mpirun")? {
            return Ok(Some((!status.success()).then(|| {
                format!("mpirun cannot start a program there ({status})")
            })));
        }
        let late = Instant::now() > self.until;
        Ok(late.then(|| Some(format!("no answer in {} s", limit.as_secs()))))
    }
}

impl Drop for Question {
    fn drop(&mut self) {
        if let Ok(Some(_)) = self.child.try_wait() {
            return;
        }
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            // It may have ended meanwhile.
            let _ = kill_process_group(pid, Signal::KILL);
        }
        let _ = self.child.wait();
        // The ssh that waits for the machine.
        leftover::end_all(&self.mark);
    }
}

/// Asks every machine, in the order given; none when `interrupted` says so before all is known.
///
/// # Errors
/// `mpirun` is missing or cannot be started.
pub fn probe(
    hosts: &[String],
    limit: Duration,
    mut interrupted: impl FnMut() -> bool,
) -> Result<Option<Vec<Answer>>> {
    let mut answers: Vec<Option<Answer>> = vec![None; hosts.len()];
    let mut waiting: Vec<usize> = (0..hosts.len()).rev().collect();
    let mut asked: Vec<Question> = Vec::new();
    while !(waiting.is_empty() && asked.is_empty()) {
        while asked.len() < AT_ONCE
            && let Some(host) = waiting.pop()
        {
            asked.push(Question::ask(host, &hosts[host], limit)?);
        }
        if interrupted() {
            return Ok(None);
        }
        let mut open = Vec::new();
        for mut question in asked {
            match question.answer(limit)? {
                Some(dead) => {
                    let host = hosts[question.host].clone();
                    answers[question.host] = Some(Answer { host, dead });
                }
                None => open.push(question),
            }
        }
        asked = open;
        std::thread::sleep(LOOK);
    }
    Ok(Some(answers.into_iter().flatten().collect()))
}
