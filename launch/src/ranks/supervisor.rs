//! Watches over the ranks of one job from its start to its end.

use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ExitStatus};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use oxitron_trainer::comm::ABORT_MARK;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;

use super::leftover;
use super::mpirun::Job;
use super::tags::Untagger;
use super::verdict::{How, first_death, followed, lost};

/// How often the child, the signals and the view get a look when nothing is said.
const TICK: Duration = Duration::from_millis(100);

/// How long `mpirun` may take to end the other ranks after one has died. It gives them one second.
const REAPING: Duration = Duration::from_secs(5);

/// How long the ranks may take to end by themselves once the watchdog has said that one is lost.
const LEAVING: Duration = Duration::from_secs(30);

/// How long lines may still come in after `mpirun` has ended.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Lines kept of each rank's standard error and of `mpirun` itself.
const KEPT_LINES: usize = 30;

/// Exit code of a rank that stopped on request after a complete save.
const STOPPED: i32 = 75;

/// Something that was said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// The rank that said it; `None` for `mpirun` itself.
    pub rank: Option<usize>,
    /// Whether it came on standard error.
    pub error: bool,
    /// The words, without the line's end.
    pub text: String,
}

/// Who shows a person what happens.
pub trait View {
    /// A rank said something.
    fn line(&mut self, line: &Line);
    /// Time has passed.
    fn tick(&mut self);
    /// The ranks were asked to stop.
    fn stopping(&mut self);
}

/// How a job ended.
#[derive(Debug)]
pub enum Ending {
    /// Every rank returned 0.
    Done,
    /// The ranks stopped on request after a complete save.
    Stopped,
    /// A person asked for an end twice and did not wait for the save.
    Killed,
    /// A rank died, or the ranks could not be started.
    Failed(Failure),
}

/// What is known about a failed job.
#[derive(Debug)]
pub struct Failure {
    /// The rank that died first, where `mpirun` says it.
    pub rank: Option<usize>,
    /// How it died.
    pub how: How,
    /// The last lines that the rank wrote to standard error; where none is named, those of
    /// `mpirun` and of every rank.
    pub words: Vec<String>,
    /// Whether a rank got as far as running, as far as anybody knows.
    pub started: bool,
}

impl Failure {
    /// Who failed, and how, in a few words.
    pub fn headline(&self) -> String {
        match self.rank {
            Some(rank) => format!("rank {rank} {}", self.how),
            None if self.started => format!("a rank {}; mpirun did not say which", self.how),
            None => format!("no rank was started, mpirun {}", self.how),
        }
    }
}

/// Requests to stop, of a person or of a scheduler: SIGINT, SIGTERM and SIGUSR1 (by which Slurm
/// warns of a time limit). From the first value on they do not end this process any more.
pub struct Requests {
    signals: Signals,
    seen: usize,
}

impl Requests {
    /// Watches for them from now on.
    ///
    /// # Errors
    /// The system does not let signals be caught.
    pub fn watch() -> Result<Self> {
        let signals =
            Signals::new([SIGINT, SIGTERM, SIGUSR1]).context("cannot watch for signals")?;
        Ok(Self { signals, seen: 0 })
    }

    /// How many there have been so far.
    pub fn seen(&mut self) -> usize {
        self.seen += self.signals.pending().count();
        self.seen
    }
}

/// Starts the ranks of `job` and stays with them until all have ended.
///
/// # Errors
/// `mpirun` is missing or cannot be started. A job that started and failed is an [`Ending`].
pub fn supervise(job: &Job, view: &mut dyn View, requests: &mut Requests) -> Result<Ending> {
    let mut family = Family::start(job)?;
    let mut heard = Heard::default();
    let (mut passed_on, mut asked) = (0, false);
    let mut deadline: Option<Instant> = None;
    let status = loop {
        match family.lines.recv_timeout(TICK) {
            Ok(line) => heard.line(line, view),
            Err(RecvTimeoutError::Timeout) => {}
            // Both outputs are closed; the end is near.
            Err(RecvTimeoutError::Disconnected) => std::thread::sleep(TICK),
        }
        view.tick();
        while passed_on < requests.seen() {
            passed_on += 1;
            if passed_on == 1 {
                view.stopping();
            } else {
                family.kill();
            }
        }
        // A rank that is still being loaded would die of the signal. None gets past the start of MPI
        // before all are there, so once one speaks all can hear.
        if passed_on > 0 && !asked && heard.someone_spoke {
            asked = true;
            family.signal(Signal::USR1);
        }
        if let Some(status) = family.child.try_wait().context("cannot wait for mpirun")? {
            break status;
        }
        if let Some(patience) = heard.patience() {
            let until = Instant::now() + patience;
            deadline = Some(deadline.map_or(until, |deadline| deadline.min(until)));
        }
        if deadline.is_some_and(|deadline| Instant::now() > deadline) {
            // A daemon on an unreachable machine keeps mpirun alive for minutes.
            family.kill();
        }
    };
    let until = Instant::now() + LAST_WORDS;
    while let Ok(line) = family
        .lines
        .recv_timeout(until.saturating_duration_since(Instant::now()))
    {
        heard.line(line, view);
    }
    view.tick();
    Ok(heard.ending(status, passed_on))
}

/// `mpirun` and the threads that read its outputs. Dropping it leaves no process behind.
struct Family {
    child: Child,
    lines: Receiver<Line>,
    mark: String,
}

impl Family {
    fn start(job: &Job) -> Result<Self> {
        let mark = leftover::new_mark();
        let mut child = job.command(&mark)?.spawn().context("cannot start mpirun")?;
        let (sender, lines) = channel();
        let outputs: [Option<Box<dyn Read + Send>>; 2] = [
            child.stdout.take().map(|output| Box::new(output) as _),
            child.stderr.take().map(|output| Box::new(output) as _),
        ];
        for (output, error) in outputs.into_iter().zip([false, true]) {
            if let Some(output) = output {
                let sender = sender.clone();
                std::thread::spawn(move || read_lines(output, error, &sender));
            }
        }
        Ok(Self { child, lines, mark })
    }

    fn pid(&self) -> Option<Pid> {
        Pid::from_raw(i32::try_from(self.child.id()).ok()?)
    }

    /// Sends a signal that mpirun passes on to its ranks.
    fn signal(&self, signal: Signal) {
        if let Some(pid) = self.pid() {
            // It may have ended meanwhile; the next look will tell.
            let _ = kill_process(pid, signal);
        }
    }

    /// Kills mpirun and what it started in its group; the kernel then kills the ranks.
    fn kill(&self) {
        if let Some(pid) = self.pid() {
            let _ = kill_process_group(pid, Signal::KILL);
        }
    }
}

impl Drop for Family {
    fn drop(&mut self) {
        self.kill();
        // Killed or ended: this returns at once and leaves no zombie.
        let _ = self.child.wait();
        leftover::end_all(&self.mark);
    }
}

fn read_lines(output: impl Read, error: bool, lines: &Sender<Line>) {
    let mut output = BufReader::new(output);
    let (mut bytes, mut untagger) = (Vec::new(), Untagger::default());
    // Ranks may write anything; bytes that are no text must not end the reading.
    while matches!(output.read_until(b'\n', &mut bytes), Ok(1..)) {
        let text = String::from_utf8_lossy(&bytes);
        let (rank, text) = untagger.line(text.trim_end_matches(['\r', '\n']));
        if lines.send(Line { rank, error, text }).is_err() {
            return;
        }
        bytes.clear();
    }
}

/// What the family has said so far.
#[derive(Default)]
struct Heard {
    /// All of mpirun's own words.
    mpirun: String,
    /// The last lines on standard error by rank, mpirun's own under `None`.
    last: BTreeMap<Option<usize>, VecDeque<String>>,
    someone_died: bool,
    /// The first rank that the watchdog named as lost, and why.
    lost: Option<(usize, String)>,
    /// Whether any rank has said anything.
    someone_spoke: bool,
}

impl Heard {
    fn line(&mut self, line: Line, view: &mut dyn View) {
        if line.rank.is_none() {
            self.mpirun.push_str(&line.text);
            self.mpirun.push('\n');
            // The first words about a death in both versions of Open MPI.
            self.someone_died |= line.text.contains("non-zero")
                || line.text.contains("noticed that process rank")
                || line.text.contains("the job has been aborted");
        } else {
            self.someone_spoke = true;
            if line.error && self.lost.is_none() {
                self.lost = lost(&line.text);
            }
            view.line(&line);
        }
        if line.error && !line.text.starts_with("-----") {
            let last = self.last.entry(line.rank).or_default();
            if last.len() == KEPT_LINES {
                last.pop_front();
            }
            last.push_back(line.text);
        }
    }

    /// How long the job may go on after what was heard; none while nothing is wrong.
    fn patience(&self) -> Option<Duration> {
        let lost = self.lost.is_some().then_some(LEAVING);
        self.someone_died.then_some(REAPING).or(lost)
    }

    /// The rank that the last words of `rank` give as their reason, if they do, or itself. Those
    /// that follow a failed rank leave with it, and may be first.
    fn culprit(&self, rank: usize) -> usize {
        let words = |rank: usize| self.last.get(&Some(rank)).into_iter().flatten();
        let named = words(rank).rev().find_map(|line| followed(line));
        named
            .filter(|&named| words(named).next().is_some())
            .unwrap_or(rank)
    }

    /// The rank that said that it aborts the run.
    fn aborted(&self) -> Option<usize> {
        let said = |lines: &VecDeque<String>| lines.iter().any(|line| line.contains(ABORT_MARK));
        self.last
            .iter()
            .find_map(|(rank, lines)| rank.filter(|_| said(lines)))
    }

    /// The last lines of mpirun and of all ranks, each with its rank.
    fn everything(self) -> Vec<String> {
        let name =
            |rank: Option<usize>| rank.map_or(String::new(), |rank| format!("rank {rank}: "));
        let lines = self.last.into_iter().flat_map(|(rank, lines)| {
            let name = name(rank);
            lines.into_iter().map(move |line| format!("{name}{line}"))
        });
        lines.collect()
    }

    fn ending(mut self, status: ExitStatus, requests: usize) -> Ending {
        if status.success() {
            return Ending::Done;
        }
        if status.code() == Some(STOPPED) {
            return Ending::Stopped;
        }
        if requests > 1 {
            return Ending::Killed;
        }
        let verdict = first_death(&self.mpirun);
        let (rank, how) = match (self.lost.take(), verdict) {
            (Some((rank, reason)), Some((named, how @ How::Signal(_)))) if rank == named => (
                Some(rank),
                How::Lost(format!("{reason} (mpirun: it {how})")),
            ),
            (Some((rank, reason)), _) => (Some(rank), How::Lost(reason)),
            (None, Some((rank, how @ How::Exit(_)))) => (Some(self.culprit(rank)), how),
            (None, Some((rank, how))) => (Some(rank), how),
            (None, None) => (self.aborted(), own_end(status)),
        };
        let started = rank.is_some() || self.someone_spoke || matches!(how, How::Signal(_));
        let words = match rank {
            Some(_) => self.last.remove(&rank).unwrap_or_default().into(),
            None => self.everything(),
        };
        Ending::Failed(Failure {
            rank,
            how,
            words,
            started,
        })
    }
}

/// What mpirun's own end says about its ranks.
fn own_end(status: ExitStatus) -> How {
    use std::os::unix::process::ExitStatusExt as _;
    match (status.code(), status.signal()) {
        (Some(code), _) => How::from_exit_code(code),
        (None, signal) => How::Signal(signal.unwrap_or_default()),
    }
}
