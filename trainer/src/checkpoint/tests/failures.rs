//! A disk that fails: wherever it does, the save says so, and nothing that is in the way stays.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use super::*;

fn attachment(root: &Path) -> Attachment {
    let source = root.join("tokenizer.source");
    fs::write(&source, b"{\"model\": 1}").unwrap();
    Attachment {
        name: "tokenizer.json".to_owned(),
        source,
    }
}

/// The save of one rank after the other, and the commit, with the error of the first that failed.
fn try_save(dir: &Path, save_id: &str, attachment: &Attachment) -> Result<(), Error> {
    for rank in 0..2 {
        save_rank(dir, rank, save_id)?;
    }
    let step = 2;
    let attachments = std::slice::from_ref(attachment);
    commit(dir, 2, save_id, &meta(step), attachments, NO_WAIT).map(drop)
}

/// Fails a save at every point in turn: into a new folder, and in place of an older checkpoint.
#[test]
fn a_save_may_fail_at_every_point() {
    for replaces in [false, true] {
        let mut points = 0;
        for passed in 0.. {
            let root = tempfile::tempdir().unwrap();
            let attachment = attachment(root.path());
            let run = root.path().join("run");
            let dir = run.join(folder_name(2));
            save_small(&run, 1);
            if replaces {
                try_save(&dir, "1-2", &attachment).unwrap();
            }
            let (result, point) =
                trace::failing_after(passed, || try_save(&dir, "2-2", &attachment));
            let Some(point) = point else {
                result.unwrap();
                break;
            };
            points += 1;
            let place = format!("{point}, the {passed}th, replaces: {replaces}");
            let newest = newest_valid(&run, Scrutiny::Payload).unwrap().checkpoint;
            let newest = newest.unwrap();
            let Err(error) = result else {
                // What comes after the commit may fail in silence: it only removes leftovers.
                assert!(point.starts_with("disk::remove_file"), "{place}");
                assert_eq!(newest.save_id(), "2-2", "{place}");
                continue;
            };
            assert!(error.to_string().contains("No space left"), "{error}");
            // No rank is writing: there is no beginning of a file.
            let begun = |name: &String| name.starts_with('.');
            if dir.is_dir() {
                assert!(!names(&dir).iter().any(begun), "{place}: {:?}", names(&dir));
            }
            let committed = newest.save_id() == "2-2";
            let before = if replaces { "1-2" } else { "1-1" };
            assert!(committed || newest.save_id() == before, "{place}");

            discard(&dir, "2-2");
            let after = newest_valid(&run, Scrutiny::Payload).unwrap();
            let checkpoint = after.checkpoint.unwrap();
            assert_eq!(checkpoint.save_id(), newest.save_id(), "{place}");
            if checkpoint.meta().step == 2 {
                let listed = checkpoint.files().len() + 1;
                let found = names(&dir);
                let old = found.iter().filter(|name| name.contains(".1-2.")).count();
                let expected = if committed && replaces {
                    // The commit stopped before it removed what it had replaced.
                    listed + old
                } else {
                    listed
                };
                assert_eq!(found.len(), expected, "{place}: {found:?}");
            } else {
                assert!(!dir.exists(), "{place}: {:?}", names(&dir));
            }
            // The run goes on: the next save into the same folder works and leaves only itself.
            try_save(&dir, "3-2", &attachment).unwrap();
            assert_eq!(names(&dir).len(), 4, "{place}: {:?}", names(&dir));
            read_all(&dir).unwrap();
        }
        println!("replaces: {replaces}: {points} points failed");
        assert!(points > 50, "{points}");
    }
}

#[test]
fn a_discarded_save_takes_nothing_else_along() {
    let root = tempfile::tempdir().unwrap();
    let dir = save_small(root.path(), 1);
    save_parts(&dir, "2-1");
    save_rank(&dir, 0, "22-1").unwrap();
    fs::write(dir.join(".part-00007.2-1.safetensors.partial"), b"half").unwrap();
    fs::write(dir.join("part-note"), b"mine").unwrap();
    discard(&dir, "2-1");
    assert_eq!(
        names(&dir),
        [
            "manifest.json",
            "part-00000.1-1.safetensors",
            "part-00000.22-1.done",
            "part-00000.22-1.safetensors",
            "part-00001.1-1.safetensors",
            "part-note",
        ]
    );
    // A committed save is not a failed one.
    discard(&dir, "1-1");
    read_all(&dir).unwrap();
    // Without a readable manifest nobody knows what it listed.
    fs::write(dir.join("manifest.json"), b"{").unwrap();
    let before = names(&dir);
    discard(&dir, "1-1");
    assert_eq!(names(&dir), before);
    discard(&root.path().join("absent"), "1-1");
}

/// A leader discards again and again while others write: they succeed or fail cleanly, and nothing
/// but whole files is left.
#[test]
fn a_save_is_discarded_under_a_writer() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join(folder_name(1));
    thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for _ in 0..200 {
                if let Err(error) = save_rank(&dir, 1, "1-1") {
                    assert!(error.is_not_found(), "{error}");
                }
                // Another save may find the folder gone again and again, and nothing worse.
                while let Err(error) = save_rank(&dir, 0, "2-1") {
                    assert!(error.is_not_found(), "{error}");
                }
                fs::remove_file(dir.join("part-00000.2-1.done")).unwrap();
                fs::remove_file(dir.join("part-00000.2-1.safetensors")).unwrap();
            }
        });
        while !writer.is_finished() {
            discard(&dir, "1-1");
        }
    });
    discard(&dir, "1-1");
    assert!(!dir.exists());
}

#[test]
fn a_commit_can_be_called_off() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join(folder_name(1));
    save_rank(&dir, 0, "1-1").unwrap();
    let flag = AtomicBool::new(false);
    let hour = Duration::from_secs(3600);
    let began = Instant::now();
    let error = thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(300));
            flag.store(true, Ordering::Relaxed);
        });
        let waiting = Waiting::until_cancelled(hour, &flag);
        commit(&dir, 2, "1-1", &meta(1), &[], waiting).unwrap_err()
    });
    assert!(matches!(error, Error::Cancelled { .. }), "{error}");
    let waited = began.elapsed();
    assert!(waited >= Duration::from_millis(300) && waited < Duration::from_secs(30));
    // Also when all parts are there: whoever calls it off knows of something that went wrong.
    save_rank(&dir, 1, "1-1").unwrap();
    let waiting = Waiting::until_cancelled(hour, &flag);
    assert!(commit(&dir, 2, "1-1", &meta(1), &[], waiting).is_err());
    flag.store(false, Ordering::Relaxed);
    let waiting = Waiting::until_cancelled(hour, &flag);
    commit(&dir, 2, "1-1", &meta(1), &[], waiting).unwrap();
    read_all(&dir).unwrap();
}
