//! Processes that are killed in the middle of a save. Only in builds with the feature `faults`.

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};

use super::*;

const ROOT: &str = "OXITRON_TEST_VICTIM_ROOT";

/// What the killed process does: not a test of its own, it is started by the one below.
#[test]
fn victim() {
    let Some(root) = std::env::var_os(ROOT) else {
        println!("nothing to do: this is a part of another test");
        return;
    };
    crate::faults::setup().unwrap();
    crate::faults::set_rank(0);
    crate::faults::set_step(2);
    save_small(Path::new(&root), 2);
}

fn save_in_a_process(root: &Path, failpoints: &str) -> ExitStatus {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "checkpoint::tests::kills::victim"])
        .env(ROOT, root)
        .env("FAILPOINTS", failpoints)
        .output()
        .unwrap()
        .status
}

#[test]
fn a_killed_save_leaves_the_checkpoint_before() {
    let mut kills = 0;
    for operation in ["create_file", "write", "sync_file", "rename", "sync_folder"] {
        for place in ["before", "within", "after"] {
            if place == "within" && operation != "write" {
                continue;
            }
            for passed in [0, 2, 4] {
                let root = tempfile::tempdir().unwrap();
                save_small(root.path(), 1);
                let point = format!("disk::{operation}::{place}={passed}*off->return(kill@0#2)");
                let status = save_in_a_process(root.path(), &point);
                let newest = newest_valid(root.path(), Scrutiny::Payload).unwrap();
                let step = newest.checkpoint.unwrap().meta().step;
                if status.success() {
                    // It never came to the point so often.
                    assert_eq!(step, 2, "{point}");
                    continue;
                }
                kills += 1;
                assert_eq!(status.signal(), Some(libc::SIGKILL), "{point}");
                // The manifest is the fifth and last file to be named.
                let renamed = operation == "rename" && (passed, place) == (4, "after");
                assert_eq!(step, if renamed { 2 } else { 1 }, "{point}");
                // The run goes on.
                remove_stale(root.path(), None).unwrap();
                save_small_as(root.path(), 2, "2-2");
                assert_eq!(names(root.path()).len(), 2, "{point}");
            }
        }
    }
    println!("{kills} kills");
    assert!(kills > 30, "{kills}");
}

#[test]
fn a_full_disk_of_another_rank_or_step_is_not_ours() {
    for (fault, works) in [
        ("enospc@1", true),
        ("enospc#3", true),
        ("enospc@0#2", false),
    ] {
        let root = tempfile::tempdir().unwrap();
        let status =
            save_in_a_process(root.path(), &format!("disk::write::within=return({fault})"));
        assert_eq!(status.success(), works, "{fault}");
        let dir = root.path().join(folder_name(2));
        assert_eq!(names(&dir).len(), if works { 3 } else { 0 });
    }
}
