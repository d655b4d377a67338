//! Every state in which a power cut may leave the disk, for the ways in which checkpoints change it.
//!
//! The changes that a save, a deletion and so on make are recorded (`trace.rs`). A model of a disk
//! then replays them up to each point, and makes every state that may be found after a power cut
//! there, by rules that are no kinder than a real file system:
//!
//! - Of the bytes of a file that was not synced since, there may be none, half, or all.
//! - Of the names that were created, renamed or removed in a folder that was not synced since, each
//!   may have changed or not, in any combination. A rename is one change.
//! - What lies in a folder whose own name is lost is lost with it.
//!
//! Each state is written to a real folder and the newest valid checkpoint is looked for in it. It
//! must be the old one or the new one, whole; from the moment at which the operation has said that
//! it is done, the new one. Where there are too many states, some are drawn by chance, with a seed.
//!
//! The ranks of a save are processes of their own, so their changes are replayed in several orders.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};

use super::damage::Xorshift;
use super::trace::{Change, changes_of};
use super::*;

/// States looked at for one point of one order of changes.
const STATES_PER_POINT: usize = 256;
/// Orders of the ranks' changes.
const ORDERS: usize = 12;

/// Files and folders of a state; folders have no content.
type Tree = BTreeMap<PathBuf, Option<Vec<u8>>>;

#[derive(Clone, Debug, PartialEq)]
enum Entry {
    File(usize),
    Folder,
}

#[derive(Clone, Debug)]
enum NameChange {
    Set(String, Entry),
    Move(String, String),
    Remove(String),
}

#[derive(Clone, Debug, Default)]
struct Folder {
    durable: BTreeMap<String, Entry>,
    /// Changes since the last sync.
    pending: Vec<NameChange>,
}

impl Folder {
    fn entries(&self, happened: impl Fn(usize) -> bool) -> BTreeMap<String, Entry> {
        // A rename may be on disk although the creation before it is not: the file is known by what
        // the process saw.
        let mut seen = self.durable.clone();
        let mut entries = self.durable.clone();
        for (index, change) in self.pending.iter().enumerate() {
            let happened = happened(index);
            match change {
                NameChange::Set(name, entry) => {
                    seen.insert(name.clone(), entry.clone());
                    if happened {
                        entries.insert(name.clone(), entry.clone());
                    }
                }
                NameChange::Move(from, to) => {
                    let entry = seen.remove(from).unwrap();
                    seen.insert(to.clone(), entry.clone());
                    if happened {
                        entries.remove(from);
                        entries.insert(to.clone(), entry);
                    }
                }
                NameChange::Remove(name) => {
                    seen.remove(name).unwrap();
                    if happened {
                        entries.remove(name);
                    }
                }
            }
        }
        entries
    }
}

#[derive(Clone, Debug, Default)]
struct File {
    durable: Vec<u8>,
    current: Vec<u8>,
}

impl File {
    fn after_a_cut(&self, choice: usize) -> Vec<u8> {
        match choice {
            0 => self.durable.clone(),
            1 => self.current[..self.current.len() / 2].to_vec(),
            _ => self.current.clone(),
        }
    }
}

/// A disk: what processes see, and what would be there after a power cut.
#[derive(Clone, Debug, Default)]
struct Disk {
    folders: BTreeMap<PathBuf, Folder>,
    files: Vec<File>,
}

fn split(path: &Path) -> (PathBuf, String) {
    let name = path.file_name().unwrap().to_str().unwrap().to_owned();
    (path.parent().unwrap().to_owned(), name)
}

impl Disk {
    /// A disk on which everything in `root` is durable.
    fn load(root: &Path) -> Self {
        let mut disk = Self::default();
        disk.load_folder(root);
        disk
    }

    fn load_folder(&mut self, dir: &Path) {
        let mut folder = Folder::default();
        for name in names(dir) {
            let path = dir.join(&name);
            let entry = if path.is_dir() {
                self.load_folder(&path);
                Entry::Folder
            } else {
                let bytes = fs::read(&path).unwrap();
                self.files.push(File {
                    durable: bytes.clone(),
                    current: bytes,
                });
                Entry::File(self.files.len() - 1)
            };
            folder.durable.insert(name, entry);
        }
        self.folders.insert(dir.to_owned(), folder);
    }

    fn change_name(&mut self, dir: &Path, change: NameChange) {
        self.folders.get_mut(dir).unwrap().pending.push(change);
    }

    fn file(&mut self, path: &Path) -> Option<usize> {
        let (dir, name) = split(path);
        match self.folders.get(&dir).unwrap().entries(|_| true).get(&name) {
            Some(Entry::File(index)) => Some(*index),
            _ => None,
        }
    }

    fn apply(&mut self, change: &Change) {
        match change {
            Change::CreateFolder(path) => {
                let (dir, name) = split(path);
                self.change_name(&dir, NameChange::Set(name, Entry::Folder));
                self.folders.insert(path.clone(), Folder::default());
            }
            Change::CreateFile(path) => match self.file(path) {
                Some(file) => self.files[file].current.clear(),
                None => {
                    let (dir, name) = split(path);
                    self.files.push(File::default());
                    let entry = Entry::File(self.files.len() - 1);
                    self.change_name(&dir, NameChange::Set(name, entry));
                }
            },
            Change::Write(path, bytes) => {
                let file = self.file(path).unwrap();
                self.files[file].current.extend_from_slice(bytes);
            }
            Change::SyncFile(path) => {
                let file = self.file(path).unwrap();
                self.files[file].durable = self.files[file].current.clone();
            }
            Change::Rename(from, to) => {
                let ((dir, from), (to_dir, to)) = (split(from), split(to));
                assert_eq!(dir, to_dir);
                self.change_name(&dir, NameChange::Move(from, to));
            }
            Change::RemoveFile(path) | Change::RemoveFolder(path) => {
                let (dir, name) = split(path);
                self.change_name(&dir, NameChange::Remove(name));
            }
            Change::SyncFolder(path) => {
                // The folder above all that is looked at is not part of the model.
                if let Some(folder) = self.folders.get_mut(path) {
                    folder.durable = folder.entries(|_| true);
                    folder.pending.clear();
                }
            }
        }
    }

    /// The state after a power cut, by a choice per change of a name and per file.
    fn after_a_cut(&self, root: &Path, choices: &[usize]) -> Tree {
        let mut tree = Tree::new();
        let names: usize = self.folders.values().map(|f| f.pending.len()).sum();
        let (names, bytes) = choices.split_at(names);
        let mut first = 0;
        let mut found = BTreeMap::new();
        for (path, folder) in &self.folders {
            found.insert(path, folder.entries(|index| names[first + index] == 1));
            first += folder.pending.len();
        }
        let unsynced = self.unsynced();
        let mut waiting = vec![root.to_owned()];
        while let Some(dir) = waiting.pop() {
            for (name, entry) in &found[&dir] {
                let path = dir.join(name);
                match entry {
                    Entry::Folder => {
                        tree.insert(path.clone(), None);
                        waiting.push(path);
                    }
                    Entry::File(index) => {
                        let choice = unsynced.iter().position(|file| file == index);
                        let choice = choice.map_or(2, |position| bytes[position]);
                        tree.insert(path, Some(self.files[*index].after_a_cut(choice)));
                    }
                }
            }
        }
        tree
    }

    fn unsynced(&self) -> Vec<usize> {
        (0..self.files.len())
            .filter(|index| self.files[*index].durable != self.files[*index].current)
            .collect()
    }

    /// All states after a power cut now, or some of them if they are too many.
    fn states(&self, root: &Path, random: &mut Xorshift) -> Vec<Tree> {
        let names: usize = self.folders.values().map(|f| f.pending.len()).sum();
        let mut sizes = vec![2; names];
        sizes.resize(names + self.unsynced().len(), 3);
        let count = sizes
            .iter()
            .try_fold(1usize, |count, size| count.checked_mul(*size))
            .unwrap_or(usize::MAX);
        (0..count.min(STATES_PER_POINT))
            .map(|number| {
                let mut rest = number;
                let choices: Vec<usize> = sizes
                    .iter()
                    .map(|size| {
                        if count > STATES_PER_POINT {
                            return random.below(*size);
                        }
                        let choice = rest % size;
                        rest /= size;
                        choice
                    })
                    .collect();
                self.after_a_cut(root, &choices)
            })
            .collect()
    }
}

/// The bytes of the newest valid checkpoint: its manifest and every file that it lists.
fn newest_bytes(root: &Path) -> Option<Vec<Vec<u8>>> {
    let newest = newest_valid(root, Scrutiny::Payload).unwrap();
    let checkpoint = newest.checkpoint?;
    read_all(checkpoint.dir()).unwrap();
    let listed = checkpoint.files().iter().map(|file| file.name.as_str());
    Some(
        std::iter::once("manifest.json")
            .chain(listed)
            .map(|name| fs::read(checkpoint.dir().join(name)).unwrap())
            .collect(),
    )
}

/// An operation on the checkpoints in a folder.
struct Scenario {
    _root: tempfile::TempDir,
    checkpoints: PathBuf,
    before: Disk,
    /// Changes that come first, then those of the ranks, each in its order, then the rest.
    first: Vec<Change>,
    ranks: [Vec<Change>; 2],
    rest: Vec<Change>,
    /// So many of `rest` have been made when the operation says that it is done.
    done_after: usize,
    old: Option<Vec<Vec<u8>>>,
    new: Option<Vec<Vec<u8>>>,
}

impl Scenario {
    /// Records `ranks` and then `rest`, which is done with the step that returns first.
    fn record(
        prepare: impl FnOnce(&Path),
        rank: impl Fn(&Path, usize),
        commit: impl FnOnce(&Path),
        afterwards: impl FnOnce(&Path),
    ) -> Self {
        let root = tempfile::tempdir().unwrap();
        let run = root.path().join("run");
        fs::create_dir(&run).unwrap();
        let checkpoints = run.join("checkpoints");
        prepare(&checkpoints);
        let before = Disk::load(&run);
        let old = newest_bytes(&checkpoints);
        let (_, mut first) = changes_of(|| rank(&checkpoints, 0));
        let (_, second) = changes_of(|| rank(&checkpoints, 1));
        // Neither rank can write before the folder is there.
        let folders = first
            .iter()
            .rposition(|change| matches!(change, Change::CreateFolder(_)))
            .map_or(0, |last| last + 1);
        let writing = first.split_off(folders);
        let (_, mut rest) = changes_of(|| commit(&checkpoints));
        let new = newest_bytes(&checkpoints);
        let done_after = rest.len();
        rest.extend(changes_of(|| afterwards(&checkpoints)).1);
        assert_eq!(newest_bytes(&checkpoints), new);
        Self {
            _root: root,
            checkpoints,
            before,
            first,
            ranks: [writing, second],
            rest,
            done_after,
            old,
            new,
        }
    }

    /// One order of all changes, and after how many of them the operation is done.
    fn order(&self, random: &mut Xorshift) -> (Vec<Change>, usize) {
        let mut order = self.first.clone();
        let mut left = self
            .ranks
            .clone()
            .map(|changes| changes.into_iter().peekable());
        while left.iter_mut().any(|changes| changes.peek().is_some()) {
            order.extend(left[random.below(2)].next());
        }
        let done = order.len() + self.done_after;
        order.extend(self.rest.iter().cloned());
        (order, done)
    }

    /// Looks at all states; says how many there were, and what is wrong with the first bad one.
    fn check(&self, name: &str) -> (usize, Result<(), String>) {
        let mut random = Xorshift(0xD15C);
        let mut known = HashSet::new();
        let root = self.checkpoints.parent().unwrap();
        for _ in 0..ORDERS {
            let (order, done) = self.order(&mut random);
            let mut disk = self.before.clone();
            for made in 0..=order.len() {
                if made > 0 {
                    disk.apply(&order[made - 1]);
                }
                for state in disk.states(root, &mut random) {
                    let mut hasher = DefaultHasher::new();
                    (&state, made >= done).hash(&mut hasher);
                    if !known.insert(hasher.finish()) {
                        continue;
                    }
                    let found = newest_in(root, &self.checkpoints, &state);
                    let is_right = found == self.new || (made < done && found == self.old);
                    if !is_right {
                        let last = made.checked_sub(1).map(|last| &order[last]);
                        let names: Vec<_> = state.keys().collect();
                        let verdict = match found {
                            None => "no checkpoint",
                            Some(_) if found == self.old => "the old checkpoint",
                            Some(_) => "a mixture",
                        };
                        let error = format!("{verdict} after {last:?}; on disk: {names:?}");
                        return (known.len(), Err(error));
                    }
                }
            }
        }
        println!("{name}: {} states", known.len());
        (known.len(), Ok(()))
    }
}

/// Writes a state to a folder and looks for the newest checkpoint.
fn newest_in(root: &Path, checkpoints: &Path, state: &Tree) -> Option<Vec<Vec<u8>>> {
    let copy = tempfile::tempdir().unwrap();
    let place = |path: &Path| copy.path().join(path.strip_prefix(root).unwrap());
    for (path, content) in state {
        match content {
            None => fs::create_dir(place(path)).unwrap(),
            Some(bytes) => fs::write(place(path), bytes).unwrap(),
        }
    }
    newest_bytes(&place(checkpoints))
}

/// What every checkpoint here carries, always the same.
fn tokenizer(checkpoints: &Path) -> Attachment {
    let source = checkpoints.parent().unwrap().with_file_name("tokenizer");
    fs::write(&source, b"the same in all checkpoints of a run").unwrap();
    Attachment {
        name: "tokenizer.json".to_owned(),
        source,
    }
}

fn commit_step(checkpoints: &Path, step: u64, save_id: &str) {
    let dir = checkpoints.join(folder_name(step));
    let attachments = [tokenizer(checkpoints)];
    commit(&dir, 2, save_id, &meta(step), &attachments, NO_WAIT).unwrap();
}

fn save_step(checkpoints: &Path, step: u64, save_id: &str) {
    save_parts(&checkpoints.join(folder_name(step)), save_id);
    commit_step(checkpoints, step, save_id);
}

/// A save of two ranks as step `step`, after `prepare` and before `afterwards`.
fn save_scenario(
    prepare: impl FnOnce(&Path),
    step: u64,
    save_id: &str,
    afterwards: impl FnOnce(&Path),
) -> Scenario {
    Scenario::record(
        prepare,
        |checkpoints, rank| {
            save_rank(&checkpoints.join(folder_name(step)), rank, save_id).unwrap();
        },
        |checkpoints| commit_step(checkpoints, step, save_id),
        afterwards,
    )
}

fn replacing() -> Scenario {
    let before = |checkpoints: &Path| save_step(checkpoints, 5, "1-5");
    save_scenario(before, 5, "2-5", |_| {})
}

fn followed_by_retention() -> Scenario {
    let policy = Retention {
        keep: 1,
        keep_every: None,
    };
    save_scenario(
        |checkpoints| save_step(checkpoints, 5, "1-5"),
        6,
        "1-6",
        |checkpoints| {
            let deleted = retain(checkpoints, &policy, Scrutiny::Structure).unwrap();
            assert_eq!(deleted.len(), 1);
        },
    )
}

/// An operation of one process on two checkpoints.
fn on_two(operation: impl FnOnce(&Path)) -> Scenario {
    Scenario::record(
        |checkpoints| {
            save_step(checkpoints, 5, "1-5");
            save_step(checkpoints, 6, "1-6");
        },
        |_, _| {},
        operation,
        |_| {},
    )
}

#[test]
fn a_power_cut_leaves_the_old_or_the_new_checkpoint() {
    let scenarios = [
        ("the first save", save_scenario(|_| {}, 5, "1-5", |_| {})),
        ("a save in place of another", replacing()),
        ("a save, then retention", followed_by_retention()),
        (
            "deletion of the older",
            on_two(|checkpoints| delete(&checkpoints.join(folder_name(5))).unwrap()),
        ),
        (
            "deletion of the newest",
            on_two(|checkpoints| {
                assert_eq!(retire(checkpoints, 5).unwrap().len(), 1);
            }),
        ),
        (
            "an amendment",
            on_two(|checkpoints| {
                let dir = checkpoints.join(folder_name(6));
                amend(&dir, |meta| meta.tokens += 1).unwrap();
            }),
        ),
    ];
    let mut total = 0;
    for (name, scenario) in scenarios {
        let (states, result) = scenario.check(name);
        result.unwrap_or_else(|error| panic!("{name}: {error}"));
        total += states;
    }
    println!("{total} states in all");
    assert!(total > 1000, "{total}");
}

/// The model finds what it is there to find: each sync that a save makes is needed.
#[test]
fn a_protocol_that_lacks_a_sync_is_caught() {
    let is_manifest = |path: &Path| path.ends_with("manifest.json");
    let caught = |mut scenario: Scenario, goes: &dyn Fn(&Change) -> bool, what: &str| {
        let remove = |changes: &mut Vec<Change>| {
            let before = changes.len();
            changes.retain(|change| !goes(change));
            before - changes.len()
        };
        let mut removed: usize = scenario.ranks.iter_mut().map(remove).sum();
        let done_after = scenario.done_after;
        let mut late = scenario.rest.split_off(done_after);
        removed += remove(&mut scenario.rest);
        scenario.done_after = scenario.rest.len();
        removed += remove(&mut late);
        scenario.rest.extend(late);
        assert!(removed > 0, "{what}: nothing was removed");
        let (states, result) = scenario.check(what);
        let error = result.expect_err(what);
        println!("without {what}, after {states} states: {error}");
        error
    };

    // Without any folder sync before the manifest has its name. (Each rank makes two, and the
    // commit one; any of the later ones covers for the earlier.)
    let mut scenario = replacing();
    let renamed = scenario
        .rest
        .iter()
        .position(|change| matches!(change, Change::Rename(_, to) if is_manifest(to)))
        .unwrap();
    let mut after = scenario.rest.split_off(renamed);
    let is_sync = |change: &Change| matches!(change, Change::SyncFolder(_));
    let whole = scenario.rest.len();
    scenario.rest.retain(|change| !is_sync(change));
    scenario.done_after -= whole - scenario.rest.len();
    scenario.rest.append(&mut after);
    for rank in &mut scenario.ranks {
        rank.retain(|change| !is_sync(change));
    }
    let error = scenario
        .check("")
        .1
        .expect_err("folder sync before the manifest");
    println!("without folder syncs before the manifest: {error}");
    assert!(error.starts_with("no checkpoint"), "{error}");

    let error = caught(
        replacing(),
        &|change| matches!(change, Change::SyncFile(path) if path.ends_with(".manifest.json.partial")),
        "the sync of the manifest's bytes",
    );
    assert!(error.starts_with("no checkpoint"), "{error}");
    let part = |path: &Path| path.to_string_lossy().ends_with(".safetensors.partial");
    let error = caught(
        replacing(),
        &|change| matches!(change, Change::SyncFile(path) if part(path)),
        "the sync of a part's bytes",
    );
    assert!(error.starts_with("no checkpoint"), "{error}");
    let step = folder_name(6);
    let error = caught(
        followed_by_retention(),
        &|change| matches!(change, Change::SyncFolder(path) if path.ends_with(&step)),
        "the syncs of the new folder",
    );
    assert!(error.starts_with("the old checkpoint"), "{error}");
    let error = caught(
        save_scenario(|_| {}, 5, "1-5", |_| {}),
        &|change| matches!(change, Change::SyncFolder(path) if path.ends_with("checkpoints")),
        "the sync of the folder of checkpoints",
    );
    assert!(error.starts_with("no checkpoint"), "{error}");
}
