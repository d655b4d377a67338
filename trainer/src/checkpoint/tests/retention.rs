//! Which checkpoints stay, over random histories; going back, and amending.

use std::fs;

use super::damage::Xorshift;
use super::*;

/// What is wrong with a checkpoint of a history.
#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    Sound,
    /// Shows only when the payload is read.
    DamagedPayload,
    DamagedManifest,
    MissingFile,
    Unfinished,
}

#[derive(Clone, Copy, Debug)]
struct Member {
    step: u64,
    purpose: Purpose,
    state: State,
}

/// Makes folders of checkpoints by copying one, which is faster than saving each.
struct Template {
    manifest: Manifest,
    parts: Vec<(String, Vec<u8>)>,
}

impl Template {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let dir = save_small(root.path(), 1);
        let manifest = seal::decode(&fs::read(dir.join("manifest.json")).unwrap()).unwrap();
        let parts = manifest
            .files
            .iter()
            .map(|file| (file.name.clone(), fs::read(dir.join(&file.name)).unwrap()))
            .collect();
        Self { manifest, parts }
    }

    fn make(&self, root: &Path, member: Member) {
        let dir = root.join(folder_name(member.step));
        fs::create_dir(&dir).unwrap();
        for (index, (name, bytes)) in self.parts.iter().enumerate() {
            let mut bytes = bytes.clone();
            if index == 1 && member.state == State::DamagedPayload {
                *bytes.last_mut().unwrap() ^= 1;
            }
            if index == 0 || member.state != State::MissingFile {
                fs::write(dir.join(name), bytes).unwrap();
            }
        }
        let mut manifest = self.manifest.clone();
        manifest.run.step = member.step;
        manifest.run.purpose = member.purpose;
        let mut bytes = seal::encode(&manifest).unwrap();
        match member.state {
            State::Unfinished => return,
            State::DamagedManifest => bytes[20] ^= 1,
            _ => {}
        }
        fs::write(dir.join("manifest.json"), bytes).unwrap();
    }
}

/// Whether the rules let a checkpoint stay, said for each on its own.
fn stays(member: &Member, history: &[Member], policy: &Retention, scrutiny: Scrutiny) -> bool {
    let is_valid = |other: &Member| match other.state {
        State::Sound => true,
        State::DamagedPayload => scrutiny == Scrutiny::Structure,
        _ => false,
    };
    let rotates = |purpose| matches!(purpose, Purpose::Regular | Purpose::StageEnd);
    let newer: Vec<&Member> = history
        .iter()
        .filter(|other| other.step > member.step && is_valid(other))
        .collect();
    let is_evidence = !matches!(member.state, State::Sound | State::DamagedPayload);
    is_evidence
        || newer.is_empty()
        || member.purpose == Purpose::StageEnd
        || policy
            .keep_every
            .is_some_and(|every| member.step.is_multiple_of(every))
        || (rotates(member.purpose)
            && newer.iter().filter(|other| rotates(other.purpose)).count() < policy.keep)
}

#[test]
fn the_rules_hold_over_random_histories() {
    let template = Template::new();
    let mut random = Xorshift(0xCAFE);
    let (mut gone, mut stayed) = (0, 0);
    for number in 0..300 {
        let root = tempfile::tempdir().unwrap();
        let policy = Retention {
            keep: random.below(4),
            keep_every: [None, Some(3), Some(4)][random.below(3)],
        };
        let scrutiny = [Scrutiny::Structure, Scrutiny::Payload][random.below(2)];
        let mut history = Vec::new();
        let mut step = 0;
        for _ in 0..random.below(9) {
            step += 1 + random.below(3) as u64;
            let purposes = [
                Purpose::Regular,
                Purpose::Regular,
                Purpose::Ephemeral,
                Purpose::StageEnd,
                Purpose::Stop,
            ];
            let states = [
                State::DamagedPayload,
                State::DamagedManifest,
                State::MissingFile,
                State::Unfinished,
            ];
            let state = states
                .get(random.below(10))
                .copied()
                .unwrap_or(State::Sound);
            let member = Member {
                step,
                purpose: purposes[random.below(5)],
                state,
            };
            template.make(root.path(), member);
            history.push(member);
        }
        let newest = |scrutiny| {
            let newest = newest_valid(root.path(), scrutiny).unwrap().checkpoint;
            newest.map(|checkpoint| checkpoint.meta().step)
        };
        let before = newest(scrutiny);
        let deleted = retain(root.path(), &policy, scrutiny).unwrap();
        let expected: Vec<String> = history
            .iter()
            .filter(|member| stays(member, &history, &policy, scrutiny))
            .map(|member| folder_name(member.step))
            .collect();
        let place = format!("history {number}: {policy:?} {scrutiny:?} {history:#?}");
        assert_eq!(names(root.path()), expected, "{place}");
        assert_eq!(deleted.len(), history.len() - expected.len(), "{place}");
        assert_eq!(newest(scrutiny), before, "{place}");
        assert!(
            retain(root.path(), &policy, scrutiny).unwrap().is_empty(),
            "{place}"
        );
        gone += deleted.len();
        stayed += expected.len();
    }
    println!("{gone} deleted, {stayed} stayed");
    assert!(gone > 100 && stayed > 100);
}

#[test]
fn a_manifest_without_a_purpose_is_of_a_regular_checkpoint() {
    let root = tempfile::tempdir().unwrap();
    let dir = save_small(root.path(), 1);
    let path = dir.join("manifest.json");
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.contains("\"format_version\": 2") && text.contains("\"purpose\": \"regular\""));
    let old = text
        .replace("\"format_version\": 2", "\"format_version\": 1")
        .replace("\"purpose\": \"regular\",\n", "");
    assert!(!old.contains("purpose"));
    let body = &old[..old.rfind(",\n  \"checksum\"").unwrap()];
    let checksum = xxhash_rust::xxh3::xxh3_128(body.as_bytes());
    fs::write(
        &path,
        format!("{body},\n  \"checksum\": \"{checksum:032x}\"\n}}\n"),
    )
    .unwrap();
    let checkpoint = Checkpoint::open(&dir).unwrap();
    assert_eq!(checkpoint.meta(), &meta(1));
    // An amended one is of the version of this build.
    amend(&dir, |meta| meta.purpose = Purpose::Stop).unwrap();
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.contains("\"format_version\": 2") && text.contains("\"purpose\": \"stop\""));
}

#[test]
fn an_amendment_changes_the_manifest_alone() {
    let root = tempfile::tempdir().unwrap();
    let dir = save_small(root.path(), 4);
    let before = Checkpoint::open(&dir).unwrap();
    let range = SkippedRange {
        step: 5,
        first_sample: 100,
        samples: 8,
    };
    let amended = amend(&dir, |meta| meta.skipped.push(range.clone())).unwrap();
    assert_eq!(amended.meta().skipped, [range]);
    assert_eq!(amended.meta().cursor, before.meta().cursor);
    assert_eq!(amended.tensors(), before.tensors());
    assert_eq!(amended.files(), before.files());
    assert_eq!(amended.save_id(), before.save_id());
    read_all(&dir).unwrap();
    assert_eq!(names(&dir).len(), 3);

    let manifest = fs::read(dir.join("manifest.json")).unwrap();
    let error = amend(&dir, |meta| meta.step = 5).unwrap_err().to_string();
    assert!(error.contains("step 4 one of step 5"), "{error}");
    fs::remove_file(dir.join("part-00001.1-4.safetensors")).unwrap();
    assert!(amend(&dir, |meta| meta.tokens = 0).is_err());
    assert_eq!(fs::read(dir.join("manifest.json")).unwrap(), manifest);
}

#[test]
fn a_run_is_taken_back() {
    let template = Template::new();
    let root = tempfile::tempdir().unwrap();
    for (step, state) in [
        (2, State::Sound),
        (4, State::Sound),
        (6, State::DamagedManifest),
        (8, State::DamagedManifest),
        (10, State::Sound),
        (12, State::Unfinished),
    ] {
        let purpose = Purpose::StageEnd;
        template.make(
            root.path(),
            Member {
                step,
                purpose,
                state,
            },
        );
    }
    // There is nothing valid at 1 or before: everything stays.
    let error = retire(root.path(), 1).unwrap_err().to_string();
    assert!(error.contains("no valid checkpoint of step 1"), "{error}");
    assert_eq!(names(root.path()).len(), 6);
    let deleted = retire(root.path(), 6).unwrap();
    let expected: Vec<PathBuf> = [12, 10, 8]
        .iter()
        .map(|step| root.path().join(folder_name(*step)))
        .collect();
    assert_eq!(deleted, expected);
    assert_eq!(names(root.path()).len(), 3);
    assert_eq!(retire(root.path(), 4).unwrap().len(), 1);
    assert!(retire(root.path(), 4).unwrap().is_empty());

    // Wherever it is cut short, what is left is a beginning of the branch.
    for passed in 0.. {
        let root = tempfile::tempdir().unwrap();
        for step in [1, 2, 3] {
            let (purpose, state) = (Purpose::Regular, State::Sound);
            template.make(
                root.path(),
                Member {
                    step,
                    purpose,
                    state,
                },
            );
        }
        let (result, point) = trace::failing_after(passed, || retire(root.path(), 1));
        if point.is_none() {
            assert_eq!(result.unwrap().len(), 2);
            break;
        }
        assert!(result.is_err());
        let newest = newest_valid(root.path(), Scrutiny::Payload).unwrap();
        let newest = newest.checkpoint.unwrap().meta().step;
        for step in 1..=newest {
            Checkpoint::open(root.path().join(folder_name(step))).unwrap();
        }
    }
}
