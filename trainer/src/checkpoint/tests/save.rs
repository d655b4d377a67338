//! Saves that go wrong commit nothing, and name what went wrong.

use std::fs;
use std::time::Instant;

use super::*;

fn one_piece<'a>(range: std::ops::Range<usize>, data: &'a [f32]) -> PieceData<'a> {
    PieceData {
        tensor: "w",
        state: StateKind::Master,
        shape: &[6, 5],
        range,
        data,
    }
}

#[test]
fn a_commit_leaves_only_the_checkpoint() {
    let root = tempfile::tempdir().unwrap();
    let dir = save_small(root.path(), 1);
    assert_eq!(
        names(&dir),
        [
            "manifest.json",
            "part-00000.1-1.safetensors",
            "part-00001.1-1.safetensors"
        ]
    );
}

#[test]
fn a_missing_rank_is_named_after_the_time_out() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("step-00000001");
    for rank in [0, 2] {
        let start = rank * 5;
        save_part(
            &dir,
            rank,
            4,
            "s",
            &[one_piece(start..start + 5, &[0.0; 5])],
        )
        .unwrap();
    }
    assert_eq!(missing_parts(&dir, 4, "s"), [1, 3]);
    let began = Instant::now();
    let timeout = Duration::from_millis(60);
    let error = commit(&dir, 4, "s", &meta(1), &[], timeout).unwrap_err();
    assert!(began.elapsed() >= timeout);
    assert!(matches!(&error, Error::CommitTimeout { missing, .. } if missing == &[1, 3]));
    assert!(error.to_string().contains("rank(s) [1, 3]"), "{error}");
    assert!(matches!(
        Checkpoint::open(&dir),
        Err(Error::NotACheckpoint { .. })
    ));
}

#[test]
fn a_commit_waits_for_a_late_rank() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("step-00000001");
    save_part(&dir, 0, 2, "s", &[one_piece(0..10, &[1.0; 10])]).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(40));
            save_part(&dir, 1, 2, "s", &[one_piece(10..30, &[2.0; 20])]).unwrap();
        });
        commit(&dir, 2, "s", &meta(1), &[], Duration::from_secs(20)).unwrap();
    });
    read_all(&dir).unwrap();
}

#[test]
fn done_files_of_another_save_are_ignored() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("step-00000001");
    // An earlier attempt died after both parts and before the manifest.
    save_parts(&dir, "1-1");
    save_part(&dir, 0, 2, "2-1", &[one_piece(0..10, &[1.0; 10])]).unwrap();
    let error = commit(&dir, 2, "2-1", &meta(1), &[], NO_WAIT).unwrap_err();
    assert!(matches!(error, Error::CommitTimeout { missing, .. } if missing == [1]));
    save_part(&dir, 1, 2, "2-1", &[one_piece(10..30, &[2.0; 20])]).unwrap();
    commit(&dir, 2, "2-1", &meta(1), &[], NO_WAIT).unwrap();
    assert_eq!(
        names(&dir),
        [
            "manifest.json",
            "part-00000.2-1.safetensors",
            "part-00001.2-1.safetensors"
        ]
    );
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let mut out = [0.0; 2];
    checkpoint
        .read("w", StateKind::Master, 9..11, &mut out)
        .unwrap();
    assert_eq!(out, [1.0, 2.0]);
}

/// Wherever a save of the same step stops, the checkpoint that was there stays.
#[test]
fn an_older_checkpoint_in_the_folder_survives_until_the_new_manifest() {
    let root = tempfile::tempdir().unwrap();
    let dir = save_small(root.path(), 1);
    save_part(&dir, 0, 2, "2-1", &[one_piece(0..10, &[1.0; 10])]).unwrap();
    read_all(&dir).unwrap();
    assert!(commit(&dir, 2, "2-1", &meta(1), &[], NO_WAIT).is_err());
    read_all(&dir).unwrap();
    // The new save leaves a hole: refused, the old one stays.
    save_part(&dir, 1, 2, "2-1", &[one_piece(11..30, &[2.0; 19])]).unwrap();
    let error = commit(&dir, 2, "2-1", &meta(1), &[], NO_WAIT).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("elements 10..11 are in no piece"),
        "{error}"
    );
    let checkpoint = Checkpoint::open(&dir).unwrap();
    assert_eq!(checkpoint.save_id(), "1-1");
    read_all(&dir).unwrap();
}

#[test]
fn parts_that_do_not_fit_together_are_refused() {
    let attempt = |second: PieceData<'_>, world| {
        let root = tempfile::tempdir().unwrap();
        save_part(root.path(), 0, 2, "s", &[one_piece(0..10, &[0.0; 10])]).unwrap();
        save_part(root.path(), 1, world, "s", &[second]).unwrap();
        let error = commit(root.path(), 2, "s", &meta(0), &[], NO_WAIT).unwrap_err();
        assert!(!root.path().join("manifest.json").exists());
        error.to_string()
    };
    let overlap = attempt(one_piece(9..30, &[0.0; 21]), 2);
    assert!(
        overlap.contains("elements 9..10 are in two pieces"),
        "{overlap}"
    );
    let shape = attempt(
        PieceData {
            shape: &[5, 6],
            ..one_piece(10..30, &[0.0; 20])
        },
        2,
    );
    assert!(
        shape.contains("shape [6, 5] in one part and [5, 6]"),
        "{shape}"
    );
    let world = attempt(one_piece(10..30, &[0.0; 20]), 3);
    assert!(
        world.contains("rank 1 of 3; expected save `s`, rank 1 of 2"),
        "{world}"
    );
}

#[test]
fn a_part_cut_short_before_the_commit_is_refused() {
    let root = tempfile::tempdir().unwrap();
    save_parts(root.path(), "s");
    fs::write(root.path().join("part-00001.s.safetensors"), b"short").unwrap();
    let error = commit(root.path(), 2, "s", &meta(0), &[], NO_WAIT).unwrap_err();
    assert!(matches!(error, Error::FileSize { found: 5, .. }), "{error}");
}

#[test]
fn pieces_that_do_not_fit_their_tensor_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let save = |piece| {
        save_part(root.path(), 0, 1, "s", &[piece])
            .unwrap_err()
            .to_string()
    };
    assert!(save(one_piece(0..3, &[0.0; 2])).contains("2 values for range 0..3"));
    assert!(save(one_piece(28..31, &[0.0; 3])).contains("does not lie in shape"));
    let empty = PieceData {
        shape: &[0, 5],
        ..one_piece(0..1, &[0.0])
    };
    assert!(save(empty).contains("cannot be saved"));
    for save_id in ["", "a/b", "..", "a b", "é"] {
        let error = save_part(root.path(), 0, 1, save_id, &[]).unwrap_err();
        assert!(matches!(error, Error::Save { .. }), "{save_id}");
    }
    assert!(save_part(root.path(), 3, 3, "s", &[]).is_err());
    assert_eq!(names(root.path()), Vec::<String>::new());
}

#[test]
fn a_writer_that_stops_early_leaves_nothing() {
    let root = tempfile::tempdir().unwrap();
    let spec = || [PieceSpec::flat("w", StateKind::Master, &[4], 0..4)];
    let mut writer = PartWriter::create(root.path(), 0, 1, "s", spec()).unwrap();
    writer.write(&[1.0; 3]).unwrap();
    assert!(
        writer
            .write(&[1.0; 2])
            .unwrap_err()
            .to_string()
            .contains("2 elements")
    );
    let error = writer.finish().err().unwrap();
    assert!(
        error
            .to_string()
            .contains("1 declared elements were not written"),
        "{error}"
    );
    assert_eq!(names(root.path()), Vec::<String>::new());
}

/// Permissions do not stop a superuser, who runs many a container; a file in the way stops
/// everybody.
#[test]
fn an_unwritable_folder_is_named() {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("file");
    fs::write(&file, b"").unwrap();
    let dir = file.join("step-00000001");
    let error = save_part(&dir, 0, 1, "s", &[]).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
    assert!(
        error.to_string().contains(&*dir.to_string_lossy()),
        "{error}"
    );
    assert!(
        error.to_string().contains("a part of this path is a file"),
        "{error}"
    );
}
