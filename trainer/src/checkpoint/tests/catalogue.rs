//! Which checkpoint is the newest, and which may go.

use std::fs;
use std::path::Path;

use super::*;

fn newest_step(root: &Path, scrutiny: Scrutiny) -> (Option<u64>, Vec<String>) {
    let newest = newest_valid(root, scrutiny).unwrap();
    (
        newest.checkpoint.map(|checkpoint| checkpoint.meta().step),
        newest
            .rejected
            .iter()
            .map(|rejected| rejected.reason.to_string())
            .collect(),
    )
}

#[test]
fn a_run_without_checkpoints_has_no_newest() {
    let root = tempfile::tempdir().unwrap();
    assert_eq!(newest_step(root.path(), Scrutiny::Payload), (None, vec![]));
    assert_eq!(
        newest_step(&root.path().join("absent"), Scrutiny::Payload),
        (None, vec![])
    );
}

/// At every point where a save can stop, the run goes on from the checkpoint before.
#[test]
fn a_save_that_stopped_is_no_checkpoint() {
    let root = tempfile::tempdir().unwrap();
    save_small(root.path(), 1);
    let dir = root.path().join(folder_name(2));
    // Before anything, in the middle of a part, after one part, after all parts, in the middle of
    // writing the manifest.
    fs::create_dir(&dir).unwrap();
    assert_eq!(newest_step(root.path(), Scrutiny::Structure).0, Some(1));
    fs::write(dir.join(".part-00000.1-2.safetensors.partial"), b"abc").unwrap();
    assert_eq!(newest_step(root.path(), Scrutiny::Structure).0, Some(1));
    save_part(&dir, 0, 2, "1-2", &[]).unwrap();
    assert_eq!(newest_step(root.path(), Scrutiny::Structure).0, Some(1));
    save_parts(&dir, "1-2");
    assert_eq!(newest_step(root.path(), Scrutiny::Structure).0, Some(1));
    fs::write(dir.join(".manifest.json.partial"), b"{").unwrap();
    let (step, rejected) = newest_step(root.path(), Scrutiny::Structure);
    assert_eq!(step, Some(1));
    assert!(rejected[0].contains("no manifest.json"), "{rejected:?}");
    commit(&dir, 2, "1-2", &meta(2), &[], NO_WAIT).unwrap();
    assert_eq!(
        newest_step(root.path(), Scrutiny::Payload),
        (Some(2), vec![])
    );
    assert!(!names(&dir).iter().any(|name| name.starts_with('.')));
}

#[test]
fn damaged_checkpoints_are_passed_over_with_reasons() {
    let root = tempfile::tempdir().unwrap();
    for step in 1..=4 {
        save_small(root.path(), step);
    }
    let part = |step| root.path().join(folder_name(step)).join("part-00000.1-");
    let flip = |path: &Path| {
        let mut bytes = fs::read(path).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        fs::write(path, bytes).unwrap();
    };
    flip(&part(4).with_file_name("part-00000.1-4.safetensors"));
    fs::write(part(3).with_file_name("manifest.json"), b"{}").unwrap();
    // A checkpoint under a wrong name would make the run go on from a wrong step.
    fs::rename(
        root.path().join(folder_name(2)),
        root.path().join(folder_name(5)),
    )
    .unwrap();
    let (step, rejected) = newest_step(root.path(), Scrutiny::Payload);
    assert_eq!(step, Some(1));
    assert_eq!(rejected.len(), 3);
    assert!(
        rejected[0].contains("of step 2; the folder was renamed"),
        "{}",
        rejected[0]
    );
    assert!(
        rejected[1].contains("part-00000.1-4.safetensors"),
        "{}",
        rejected[1]
    );
    assert!(
        rejected[2].contains("manifest is damaged"),
        "{}",
        rejected[2]
    );
    // Damage inside a file does not show without reading it.
    assert_eq!(newest_step(root.path(), Scrutiny::Structure).0, Some(4));
}

fn keep(keep: usize) -> Retention {
    Retention {
        keep,
        keep_every: None,
    }
}

#[test]
fn retention_keeps_the_newest() {
    let root = tempfile::tempdir().unwrap();
    for step in 1..=5 {
        save_small(root.path(), step);
    }
    fs::create_dir(root.path().join("notes")).unwrap();
    fs::create_dir(root.path().join("step-7")).unwrap();
    let deleted = retain(root.path(), &keep(2), Scrutiny::Structure).unwrap();
    assert_eq!(deleted.len(), 3);
    assert_eq!(
        names(root.path()),
        ["notes", "step-00000004", "step-00000005", "step-7"]
    );
    assert!(
        retain(root.path(), &keep(2), Scrutiny::Structure)
            .unwrap()
            .is_empty()
    );
}

#[test]
fn retention_never_deletes_the_only_valid_one() {
    let root = tempfile::tempdir().unwrap();
    for step in 1..=3 {
        save_small(root.path(), step);
    }
    for step in 2..=3 {
        let dir = root.path().join(folder_name(step));
        let part = dir.join(format!("part-00001.1-{step}.safetensors"));
        let mut bytes = fs::read(&part).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        fs::write(&part, bytes).unwrap();
    }
    assert!(
        retain(root.path(), &keep(1), Scrutiny::Payload)
            .unwrap()
            .is_empty()
    );
    assert!(
        retain(root.path(), &keep(0), Scrutiny::Payload)
            .unwrap()
            .is_empty()
    );
    assert_eq!(newest_step(root.path(), Scrutiny::Payload).0, Some(1));
    save_small_as(root.path(), 3, "2-3");
    let deleted = retain(root.path(), &keep(0), Scrutiny::Payload).unwrap();
    // Step 2 still has the structure of a checkpoint and is older than a sound one.
    assert_eq!(deleted.len(), 2);
    assert_eq!(names(root.path()), ["step-00000003"]);
}

/// A deletion that stopped at any point leaves no checkpoint that lacks files.
#[test]
fn a_deletion_that_stopped_is_finished_later() {
    let root = tempfile::tempdir().unwrap();
    save_small(root.path(), 1);
    let dir = save_small(root.path(), 2);
    fs::remove_file(dir.join("manifest.json")).unwrap();
    assert_eq!(newest_step(root.path(), Scrutiny::Structure).0, Some(1));
    let saving = root.path().join(folder_name(3));
    save_parts(&saving, "1-3");
    assert_eq!(remove_stale(root.path(), Some(&saving)).unwrap(), [dir]);
    assert_eq!(names(root.path()), ["step-00000001", "step-00000003"]);
    assert_eq!(remove_stale(root.path(), None).unwrap(), [saving]);
    // A damaged manifest is evidence, not a leftover.
    fs::write(root.path().join("step-00000001/manifest.json"), b"").unwrap();
    assert!(remove_stale(root.path(), None).unwrap().is_empty());
}

#[test]
fn a_user_may_name_the_run() {
    let root = tempfile::tempdir().unwrap();
    let dir = save_small(&root.path().join("checkpoints"), 3);
    for path in [root.path(), &root.path().join("checkpoints"), &dir] {
        assert_eq!(find(path).unwrap().meta().step, 3);
    }
    fs::write(dir.join("manifest.json"), b"").unwrap();
    let error = find(root.path()).unwrap_err().to_string();
    assert!(error.contains("manifest is damaged"), "{error}");
    let error = find(&root.path().join("absent")).unwrap_err().to_string();
    assert!(error.contains("no such folder"), "{error}");
    let empty = tempfile::tempdir().unwrap();
    let error = find(empty.path()).unwrap_err().to_string();
    assert!(error.contains("no checkpoint `step-…` in it"), "{error}");
}
