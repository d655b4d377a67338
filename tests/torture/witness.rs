//! What must hold after every attempt of a run, whatever has become of it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use oxitron_trainer::checkpoint::{Checkpoint, ManifestMeta, Purpose, StateKind, folder_name};
use oxitron_trainer::metrics::{Event, History, StepRecord, next_attempt};

use super::support::runs::tensors;

/// `checkpoint.keep` of the runs that are killed.
pub const KEEP: usize = 2;

/// What a step's record says that does not depend on time, to the bit.
type Figures = (String, [u64; 6]);

/// Everything a checkpoint holds that the run depends on: the values of every tensor to the bit, and
/// the state of the run.
#[derive(PartialEq)]
struct Content {
    values: BTreeMap<(String, StateKind), Vec<u32>>,
    meta: ManifestMeta,
}

/// A run that nobody disturbed, with all its checkpoints.
pub struct Truth {
    figures: BTreeMap<u64, Figures>,
    contents: BTreeMap<u64, Content>,
    /// When it wrote its first event.
    pub began: SystemTime,
    /// From then to its last.
    pub length: Duration,
}

impl Truth {
    /// Reads it from a run directory in which no checkpoint was deleted.
    pub fn read(dir: &Path, steps: u64) -> Self {
        let history = History::read(dir).unwrap();
        let figures: BTreeMap<_, _> = history
            .steps
            .iter()
            .map(|record| (record.step, figures(record)))
            .collect();
        let contents: BTreeMap<_, _> = complete(dir)
            .into_iter()
            .map(|(step, checkpoint)| (step, content(&checkpoint)))
            .collect();
        let expected: Vec<u64> = (1..=steps).collect();
        assert!(figures.keys().eq(&expected) && contents.keys().eq(&expected));
        let [first, last] = [history.events.first(), history.events.last()]
            .map(|event| event.unwrap().unix_seconds);
        Self {
            figures,
            contents,
            began: UNIX_EPOCH + Duration::from_secs_f64(first),
            length: Duration::from_secs_f64(last - first),
        }
    }

    /// The last step.
    pub fn steps(&self) -> u64 {
        self.figures.len() as u64
    }
}

fn figures(record: &StepRecord) -> Figures {
    let numbers = [
        record.loss.to_bits(),
        record.grad_norm.to_bits(),
        record.lr.to_bits(),
        record.tokens,
        record.target_tokens,
        record.samples,
    ];
    (record.stage.clone(), numbers)
}

fn content(checkpoint: &Checkpoint) -> Content {
    let values = tensors(checkpoint);
    assert_eq!(values.len(), 3 * checkpoint.tensors().len());
    // What belongs to an attempt and not to the run.
    let meta = ManifestMeta {
        run_id: String::new(),
        attempt: 0,
        parent: None,
        purpose: Purpose::default(),
        config: String::new(),
        ..checkpoint.meta().clone()
    };
    Content { values, meta }
}

/// The complete checkpoints of a run: the folders with a manifest. One that has a manifest and is
/// not whole, to the last byte, is the partial one that must never be.
fn complete(run_dir: &Path) -> BTreeMap<u64, Checkpoint> {
    let mut found = BTreeMap::new();
    let Ok(entries) = fs::read_dir(run_dir.join("checkpoints")) else {
        return found;
    };
    for entry in entries {
        let dir = entry.unwrap().path();
        if !dir.join("manifest.json").exists() {
            continue;
        }
        let checkpoint = Checkpoint::open(&dir).unwrap();
        checkpoint.verify(&mut |_, _| {}).unwrap();
        let step = checkpoint.meta().step;
        assert_eq!(dir.file_name().unwrap(), folder_name(step).as_str());
        found.insert(step, checkpoint);
    }
    found
}

/// A run that is being killed, and what was once seen to be complete in it.
pub struct Witness {
    dir: PathBuf,
    seen: BTreeMap<u64, Purpose>,
    /// The number that the next attempt must have.
    attempt: u32,
    /// The newest complete checkpoint; 0 before there is one.
    newest: u64,
}

impl Witness {
    pub fn new(dir: PathBuf) -> Self {
        Self {
            dir,
            seen: BTreeMap::new(),
            attempt: 1,
            newest: 0,
        }
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn newest(&self) -> u64 {
        self.newest
    }

    /// Whether the attempt under way has said where it begins.
    pub fn has_begun(&self) -> bool {
        let history = History::read(&self.dir).unwrap_or_default();
        let mut events = history.events.iter();
        events.any(|event| event.attempt == self.attempt)
    }

    /// Looks at the run after an attempt, and compares it with the truth. `kill` is for messages.
    pub fn look(&mut self, truth: &Truth, kill: &str) {
        self.check_records(truth, kill);
        let complete = complete(&self.dir);
        for (step, checkpoint) in &complete {
            assert!(
                content(checkpoint) == truth.contents[step],
                "{kill}: the checkpoint of step {step} holds something else than the undisturbed \
                 run had then"
            );
        }
        let now: BTreeMap<u64, Purpose> = complete
            .iter()
            .map(|(&step, checkpoint)| (step, checkpoint.meta().purpose))
            .collect();
        for (&step, &purpose) in &self.seen {
            let newer = now.range(step + 1..);
            let rotating =
                |purpose: &Purpose| matches!(purpose, Purpose::Regular | Purpose::StageEnd);
            let may_go = match purpose {
                Purpose::StageEnd => false,
                Purpose::Regular => newer.filter(|(_, purpose)| rotating(purpose)).count() >= KEEP,
                Purpose::Ephemeral | Purpose::Stop => newer.count() > 0,
            };
            assert!(
                now.contains_key(&step) || may_go,
                "{kill}: the {purpose} checkpoint of step {step} is lost; there are {now:?}"
            );
        }
        self.newest = now.keys().next_back().copied().unwrap_or(0);
        self.seen.extend(now);
        self.attempt = next_attempt(&self.dir).unwrap();
    }

    /// What the last attempt has written down.
    fn check_records(&mut self, truth: &Truth, kill: &str) {
        let history = match History::read(&self.dir) {
            Ok(history) => history,
            // Killed before it had made the folder or a file in it.
            Err(_) if self.attempt == 1 => return,
            Err(error) => panic!("{kill}: {error}"),
        };
        let events: Vec<&Event> = history
            .events
            .iter()
            .filter(|event| event.attempt == self.attempt)
            .map(|event| &event.event)
            .collect();
        for (index, event) in events.iter().enumerate() {
            let fits = match event {
                Event::Start { .. } => (index, self.newest) == (0, 0),
                Event::Resume { step, .. } => (index, self.newest) == (0, *step),
                Event::SaveDurable { step, .. } => {
                    let purpose = truth_purpose(*step, truth);
                    self.seen.insert(*step, purpose);
                    index > 0
                }
                Event::CheckpointRejected { .. } | Event::Skip { .. } | Event::Rollback { .. } => {
                    false
                }
                _ => index > 0,
            };
            assert!(
                fits,
                "{kill}: event {index}, {event:?}, of an attempt that should go on from the \
                 newest complete checkpoint, of step {}",
                self.newest
            );
        }
        let text = fs::read_to_string(self.dir.join("metrics.jsonl")).unwrap_or_default();
        let mut step = self.newest;
        for line in text
            .split_inclusive('\n')
            .filter(|line| line.ends_with('\n'))
        {
            let record: StepRecord = serde_json::from_str(line).unwrap();
            if record.attempt == self.attempt {
                step += 1;
                assert_eq!(record.step, step, "{kill}");
                assert_eq!(
                    figures(&record),
                    truth.figures[&step],
                    "{kill}: step {step}"
                );
            }
        }
    }

    /// Asserts that the run is done, and has done what the undisturbed one did.
    pub fn assert_finished(&self, truth: &Truth) {
        assert_eq!(self.newest, truth.steps());
        let history = History::read(&self.dir).unwrap();
        let found = history
            .steps
            .iter()
            .map(|record| (record.step, figures(record)));
        assert!(found.eq(truth.figures.clone()));
    }
}

/// What the checkpoint of a step is for.
fn truth_purpose(step: u64, truth: &Truth) -> Purpose {
    let stage = |step: u64| truth.figures.get(&step).map(|(stage, _)| stage);
    if stage(step) != stage(step + 1) {
        Purpose::StageEnd
    } else if step.is_multiple_of(super::EVERY_STEPS) {
        Purpose::Regular
    } else {
        Purpose::Ephemeral
    }
}
