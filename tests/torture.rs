//! A run that is killed again and again, most of all while it saves, and loses nothing by it.
//!
//! Two ranks train two stages with a save after every step. The same run, undisturbed, is the truth.
//! Then ranks or the launcher are killed: at every fault point of a save, and at random moments; the
//! next attempt goes on, and is killed in its turn. After each one everything is looked at:
//!
//! - whatever has a manifest is whole, and holds what the undisturbed run had after that step, bit
//!   for bit: weights, moments, the state of the data;
//! - whatever was complete once, or was announced as durable, is there, or newer ones are in whose
//!   favour it may go;
//! - the next attempt goes on from exactly the newest complete one;
//! - every step that any attempt has taken has the figures of the undisturbed run, bit for bit.
//!
//! `OXITRON_KILLS` is how many kills (20 otherwise), `OXITRON_SEED` draws others. A kill counts when
//! the attempt has died of it.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)]

#[path = "torture/kills.rs"]
mod kills;
mod support;
#[path = "torture/witness.rs"]
mod witness;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use kills::{Kill, Random, Victim, Visits};
use rustix::process::{Pid, Signal, kill_process};
use support::runs::ranks_of;
use support::{Fixture, Output, start_with};
use witness::{KEEP, Truth, Witness};

/// The second stage resets the optimizer: what has and has not happened at its beginning shows in
/// every figure after it.
const STAGES: &str = r#"
[[stage]]
name = "short"
seq_len = 64
steps = 7
batch_tokens = 256

[[stage]]
name = "long"
seq_len = 128
rope_base = 40000.0
optimizer = "reset"
steps = 11
batch_tokens = 256
"#;
/// The last step, and the last one of the first stage.
const STEPS: u64 = 18;
const SWITCH: u64 = 7;
/// `checkpoint.every_steps`; between them there are ephemeral ones.
const EVERY_STEPS: u64 = 2;
/// Of the kills at some moment, so many come before the run has begun for one that comes after.
const OPENINGS: f64 = 0.2;

fn from_environment(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).map_or(otherwise, |text| text.parse().unwrap())
}

#[test]
fn ranks_killed_at_any_byte_lose_nothing() {
    let count = from_environment("OXITRON_KILLS", 20) as usize;
    let seed = from_environment("OXITRON_SEED", 0x5EED);
    let torture = Torture::new();
    println!("\n{count} kills, seed {seed}");
    let mut random = Random(seed);
    let mut made: BTreeMap<Kill, usize> = BTreeMap::new();
    let mut runs = 1;
    let mut witness = torture.begin(runs);
    for (number, kill) in kills::draw(&mut random, count).into_iter().enumerate() {
        let mut ease = 1;
        loop {
            let from = witness.newest();
            let passed = kill.is_at_the_switch() && torture.is_behind_the_switch(from);
            let done = from == STEPS;
            if !passed && !done {
                let blow = torture.draw(kill, &mut random, STEPS - from, ease);
                let died = torture.attempt(&mut witness, Some(&blow));
                println!(
                    "{:4}  run {runs}  step {from:2} to {:2}  {}  {blow}",
                    number + 1,
                    witness.newest(),
                    if died { "killed" } else { "lived " }
                );
                if died {
                    *made.entry(kill).or_default() += 1;
                    break;
                }
                // The run has come to its end before.
                ease *= 4;
                assert!(ease < 1 << 16, "{kill} never happens");
            } else {
                torture.finish(&mut witness);
            }
            runs += 1;
            witness = torture.begin(runs);
        }
    }
    torture.finish(&mut witness);
    println!("\nkills  where\n{}", kills::table(&made));
    let total: usize = made.values().sum();
    assert_eq!(total, count);
    let hit = |point: &&str| {
        made.keys()
            .any(|kill| matches!(kill, Kill::Point(at, _) if at == point))
    };
    let points = kills::points();
    let missed: Vec<_> = points.iter().filter(|point| !hit(point)).collect();
    assert!(missed.is_empty() || count < 3 * points.len(), "{missed:?}");
    println!(
        "{total} kills in {runs} runs, {} of {} fault points; nothing was lost",
        points.len() - missed.len(),
        points.len()
    );
    println!("{{\"kills\":{total}}}");
}

/// A kill and when it comes.
struct Blow {
    kill: Kill,
    /// Visits of the point before it.
    visits: u64,
    /// The moment, as a share of the time that the attempt takes; from its first event on;
    /// below zero before that.
    moment: f64,
    /// Whether saves are written beside the steps.
    asynchronous: bool,
}

impl Blow {
    fn failpoints(&self) -> Option<String> {
        let Kill::Point(point, rank) = self.kill else {
            return None;
        };
        let rank = rank.map_or(String::new(), |rank| format!("@{rank}"));
        let before = match self.visits {
            0 => String::new(),
            visits => format!("{visits}*off->"),
        };
        Some(format!("{point}={before}1*return(kill{rank})"))
    }
}

impl std::fmt::Display for Blow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.failpoints() {
            Some(points) => write!(f, "{points}"),
            None => write!(f, "{} ({:+.2})", self.kill, self.moment),
        }?;
        f.write_str(if self.asynchronous {
            ""
        } else {
            ", saving directly"
        })
    }
}

/// The fixture and the truth.
struct Torture {
    fixture: Fixture,
    truth: Truth,
    /// From the start of the launcher to the first event of a run.
    opening: Duration,
    visits: Visits,
}

impl Torture {
    fn new() -> Self {
        let fixture = Fixture::new();
        fixture.config(STAGES);
        let keep_all = ["checkpoint.every_steps=1", "checkpoint.keep=1000"];
        let began = SystemTime::now();
        launch(&fixture, "calm", &keep_all, "", |_| {}).done();
        let truth = Truth::read(&fixture.path("calm"), STEPS);
        let opening = truth.began.duration_since(began).unwrap();
        // Once more, as the runs that will be killed, which shows that it is the same every time.
        let counting = Visits::counting();
        let output = launch(&fixture, "counted", &saving(true), &counting, |_| {}).done();
        let mut witness = Witness::new(fixture.path("counted"));
        witness.look(&truth, "undisturbed");
        witness.assert_finished(&truth);
        Self {
            fixture,
            truth,
            opening,
            visits: Visits::read(&output.stderr),
        }
    }

    /// When a kill comes, to a run that has so many steps left; `ease` brings it forward so many
    /// times.
    fn draw(&self, kill: Kill, random: &mut Random, steps_left: u64, ease: u64) -> Blow {
        let saves = if kill.is_at_the_switch() {
            1
        } else {
            steps_left.min(3)
        };
        let per_save = self.visits.of(kill).div_ceil(STEPS);
        // Most of a save are the writes of its parts. Every other kill is for its end, where the
        // small files are and last of all the manifest.
        let visits = if random.below(2) == 0 {
            random.below(per_save * saves)
        } else {
            per_save * (1 + random.below(saves)) - 1 - random.below(per_save.min(4))
        };
        Blow {
            kill,
            visits: visits / ease,
            moment: (random.share() * (1.0 + OPENINGS) - OPENINGS) / ease as f64,
            asynchronous: random.below(4) > 0,
        }
    }

    /// A new run.
    fn begin(&self, number: usize) -> Witness {
        Witness::new(self.fixture.path(&format!("run-{number}")))
    }

    /// Whether a run that goes on from this step does not enter the second stage any more.
    fn is_behind_the_switch(&self, step: u64) -> bool {
        step > SWITCH
    }

    /// One attempt, with a look at the run afterwards; true if it died of `blow`.
    fn attempt(&self, witness: &mut Witness, blow: Option<&Blow>) -> bool {
        let dir = witness.dir().file_name().unwrap().to_str().unwrap();
        let sets = saving(blow.is_none_or(|blow| blow.asynchronous));
        let failpoints = blow.and_then(Blow::failpoints).unwrap_or_default();
        let mut hit = false;
        let output = launch(&self.fixture, dir, &sets, &failpoints, |launcher| {
            if let Some(&Blow {
                kill: Kill::Moment(victim),
                moment,
                ..
            }) = blow
            {
                hit = self.strike(witness, victim, moment, launcher);
            }
        });
        let words = blow.map_or("undisturbed".to_owned(), ToString::to_string);
        if let Some(Blow {
            kill: Kill::Point(point, _),
            ..
        }) = blow
        {
            hit = output.stderr.contains(&format!("fault at {point}: kill"));
        }
        let died = output.code != Some(0);
        assert!(
            hit || !died,
            "{words}: {}\n{}",
            output.stdout,
            output.stderr
        );
        self.wait_until_gone(witness.dir());
        witness.look(&self.truth, &words);
        if !died {
            witness.assert_finished(&self.truth);
        }
        hit && died
    }

    /// Runs to the end.
    fn finish(&self, witness: &mut Witness) {
        self.attempt(witness, None);
        witness.assert_finished(&self.truth);
    }

    /// Waits for the moment and kills; false when the victim had gone before.
    fn strike(&self, witness: &Witness, victim: Victim, moment: f64, launcher: u32) -> bool {
        let began = Instant::now();
        let alive = || Path::new(&format!("/proc/{launcher}/exe")).exists();
        if moment < 0.0 {
            std::thread::sleep(self.opening.mul_f64(1.0 + moment / OPENINGS));
        } else {
            while !witness.has_begun() && alive() {
                assert!(
                    began.elapsed() < Duration::from_secs(60),
                    "it does not begin"
                );
                std::thread::sleep(Duration::from_millis(2));
            }
            let left = 1.0 - witness.newest() as f64 / STEPS as f64;
            std::thread::sleep(self.truth.length.mul_f64(left * moment));
        }
        let ranks = ranks_of(&self.fixture.path("config.toml"));
        let victims: Vec<u32> = match victim {
            Victim::Launcher => vec![launcher],
            Victim::AllRanks => ranks.iter().map(|&(pid, _)| pid).collect(),
            Victim::Rank(wanted) => ranks
                .iter()
                .filter(|&&(_, rank)| rank == wanted)
                .map(|&(pid, _)| pid)
                .collect(),
        };
        let kill =
            |pid: u32| kill_process(Pid::from_raw(pid as i32).unwrap(), Signal::KILL).is_ok();
        victims.into_iter().filter(|&pid| kill(pid)).count() > 0
    }

    /// Waits until no rank can change anything any more: the kernel kills ranks with their launcher,
    /// but not at once, and a thread that is killed ends its system call. Rank 0 holds the lock of
    /// the run directory until then.
    fn wait_until_gone(&self, run_dir: &Path) {
        let began = Instant::now();
        let locked = || match fs::File::open(run_dir.join("lock")) {
            Ok(lock) => lock.try_lock().is_err(),
            Err(_) => false,
        };
        while !ranks_of(&self.fixture.path("config.toml")).is_empty() || locked() {
            assert!(began.elapsed() < Duration::from_secs(10), "orphans");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// How the runs that are killed save.
fn saving(asynchronous: bool) -> [String; 4] {
    [
        format!("checkpoint.every_steps={EVERY_STEPS}"),
        "checkpoint.ephemeral_every_steps=1".to_owned(),
        format!("checkpoint.keep={KEEP}"),
        format!("checkpoint.async={asynchronous}"),
    ]
}

/// Runs `oxitron launch` on two ranks; `meanwhile` gets the launcher's process.
fn launch(
    fixture: &Fixture,
    dir: &str,
    sets: &[impl AsRef<str>],
    failpoints: &str,
    meanwhile: impl FnOnce(u32),
) -> Output {
    let config = fixture.text("config.toml");
    let dir = format!("run.dir={dir}");
    let mut words = vec!["launch", &config, "--ranks", "2", "--set", &dir];
    words.extend(sets.iter().flat_map(|set| ["--set", set.as_ref()]));
    let running = start_with(&words, &[("FAILPOINTS", failpoints)]);
    meanwhile(running.child.id());
    running.wait()
}
