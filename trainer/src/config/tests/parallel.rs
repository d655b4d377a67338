//! How a step is spread over ranks, and what is watched meanwhile.

use std::path::Path;

use super::{MINIMAL, load, load_with};
use crate::config::{Config, ParallelConfig, ShardSize, TraceSteps};

fn parallel(sets: &[&str]) -> ParallelConfig {
    load_with(MINIMAL, sets).unwrap().parallel
}

fn set_refusal(set: &str) -> String {
    load_with(MINIMAL, &[set])
        .expect_err("the set should be refused")
        .to_string()
}

#[test]
fn defaults_shard_the_optimizer_over_all_ranks() {
    let config = load(MINIMAL).unwrap();
    assert_eq!(config.parallel.zero_stage, 1);
    assert_eq!(config.parallel.shard_size, ShardSize::World);
    assert_eq!(config.parallel.prefetch_units, 1);
    assert_eq!(config.run.trace_steps, None);
    assert!(!config.run.deterministic);
    assert_eq!(config.guard.replica_check_steps, 100);
}

#[test]
fn both_ends_of_each_range_are_allowed_and_nothing_beyond() {
    for (set, allowed) in [
        ("parallel.zero_stage=0", true),
        ("parallel.zero_stage=3", true),
        ("parallel.zero_stage=4", false),
        ("parallel.zero_stage=-1", false),
        ("parallel.zero_stage=full", false),
        ("parallel.shard_size=1", true),
        ("parallel.shard_size=1048576", true),
        ("parallel.shard_size=1048577", false),
        ("parallel.shard_size=0", false),
        ("parallel.shard_size=-2", false),
        ("parallel.shard_size=true", false),
        ("parallel.shard_size=[2]", false),
        ("parallel.prefetch_units=0", true),
        ("parallel.prefetch_units=64", true),
        ("parallel.prefetch_units=65", false),
        ("run.trace_steps=[1, 1000000000]", true),
        ("run.trace_steps=[7, 7]", true),
        ("run.trace_steps=[1, 1000000001]", false),
        ("run.trace_steps=[8, 7]", false),
        ("run.trace_steps=[1]", false),
        ("run.trace_steps=[1, 2, 3]", false),
        ("run.trace_steps=[1.0, 2.0]", false),
        ("run.trace_steps=5", false),
        ("guard.replica_check_steps=0", true),
        ("guard.replica_check_steps=1000000000", true),
        ("guard.replica_check_steps=-1", false),
        ("guard.replica_checks=1", false),
    ] {
        let loaded = load_with(MINIMAL, &[set]);
        match loaded {
            Ok(_) => assert!(allowed, "{set} was allowed"),
            Err(error) => {
                assert!(!allowed, "{set}:\n{error}");
                let text = error.to_string();
                assert!(
                    text.contains("--> --set:1:") && text.contains("= help: "),
                    "{set}:\n{text}"
                );
            }
        }
    }
}

#[test]
fn refusals_say_what_to_write() {
    for (set, expected) in [
        ("parallel.zero_stage=4", "a whole number from 0 to 3"),
        ("parallel.shard_size=wrold", "did you mean \"world\"?"),
        ("parallel.shard_size=all", "use one of these values"),
        (
            "parallel.shard_size=\"4\"",
            "write `shard_size = 4`, without quotes",
        ),
        ("parallel.prefetch=2", "did you mean `prefetch_units`?"),
        ("parallel.recompute=false", "write `recompute = \"none\"`"),
        (
            "parallel.recompute=true",
            "write which: `recompute` is \"attention\" or \"full\"",
        ),
        ("parallel.recompute=atention", "did you mean \"attention\"?"),
        ("run.trace_step=[1, 2]", "did you mean `trace_steps`?"),
        (
            "guard.replica_check=5",
            "did you mean `replica_check_steps`?",
        ),
        ("gaurd.replica_check_steps=5", "did you mean `guard`?"),
    ] {
        let text = set_refusal(set);
        assert!(text.contains(expected), "{set}:\n{text}");
    }
}

#[test]
fn every_shape_survives_the_round_trip() {
    for (set, written) in [
        ("parallel.shard_size=node", "shard_size = \"node\""),
        ("parallel.shard_size=\"world\"", "shard_size = \"world\""),
        ("parallel.shard_size=2", "shard_size = 2"),
        ("parallel.zero_stage=3", "zero_stage = 3"),
        ("parallel.prefetch_units=9", "prefetch_units = 9"),
        ("guard.replica_check_steps=7", "replica_check_steps = 7"),
        ("run.trace_steps=[3, 5]", "trace_steps = ["),
    ] {
        let config = load_with(MINIMAL, &[set]).unwrap();
        let text = config.resolved_toml().unwrap();
        assert!(text.contains(written), "{written} is not in\n{text}");
        let again = Config::from_text(&text, "config.toml", Path::new("/"), &[]).unwrap();
        assert_eq!(again, config, "{set}");
    }
}

#[test]
fn the_command_line_wins_over_the_file() {
    let text = format!(
        "{MINIMAL}\n[parallel]\nzero_stage = 2\nshard_size = 4\n\n[run]\ntrace_steps = [1, 2]\n"
    );
    let config = load(&text).unwrap();
    assert_eq!(config.parallel.shard_size, ShardSize::Ranks(4));
    for (set, size) in [
        ("parallel.shard_size=2", ShardSize::Ranks(2)),
        ("parallel.shard_size=node", ShardSize::Node),
        ("parallel.shard_size=world", ShardSize::World),
    ] {
        let config = load_with(&text, &[set]).unwrap();
        assert_eq!(config.parallel.shard_size, size);
        assert_eq!(config.parallel.zero_stage, 2);
    }
    let config = load_with(&text, &["run.trace_steps=[10, 12]"]).unwrap();
    let expected = TraceSteps {
        first: 10,
        last: 12,
    };
    assert_eq!(config.run.trace_steps, Some(expected));
}

#[test]
fn without_sharding_no_size_but_the_harmless_ones() {
    for size in ["world", "1"] {
        let size = format!("parallel.shard_size={size}");
        assert_eq!(parallel(&["parallel.zero_stage=0", &size]).zero_stage, 0);
    }
    for size in ["node", "2"] {
        let size = format!("parallel.shard_size={size}");
        let error = load_with(MINIMAL, &["parallel.zero_stage=0", &size]).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("nothing is sharded"), "{text}");
        assert!(text.contains("--> --set:1:21"), "{text}");
    }
    // One layer overrules the other, in one direction only.
    let file = format!("{MINIMAL}\n[parallel]\nzero_stage = 2\nshard_size = \"node\"\n");
    let overruled = load_with(&file, &["parallel.zero_stage=0"]).unwrap();
    assert_eq!(overruled.parallel.shard_size, ShardSize::World);
    let file = format!("{MINIMAL}\n[parallel]\nzero_stage = 0\n");
    load_with(&file, &["parallel.shard_size=2"]).unwrap_err();
}

#[test]
fn a_shard_size_becomes_a_number_of_ranks() {
    for (size, world, local, ranks) in [
        (ShardSize::World, 1, 1, 1),
        (ShardSize::World, 12, 4, 12),
        (ShardSize::Node, 12, 4, 4),
        (ShardSize::Node, 4, 4, 4),
        (ShardSize::Ranks(1), 7, 7, 1),
        (ShardSize::Ranks(6), 12, 4, 6),
        (ShardSize::Ranks(7), 7, 1, 7),
    ] {
        assert_eq!(size.ranks(world, local).unwrap(), ranks, "{size:?}");
    }
    let none = parallel(&["parallel.zero_stage=0"]);
    assert_eq!(none.shard_ranks(12, 4).unwrap(), 1);
    for stage in 1..=3 {
        let stage = format!("parallel.zero_stage={stage}");
        let hybrid = parallel(&[&stage, "parallel.shard_size=node"]);
        assert_eq!(hybrid.shard_ranks(12, 4).unwrap(), 4);
        assert!(hybrid.shard_ranks(12, 5).is_err());
    }
}

#[test]
fn shard_groups_that_would_not_be_equal_are_refused() {
    assert_eq!(
        ShardSize::Ranks(5).ranks(12, 4).unwrap_err().to_string(),
        "`parallel.shard_size` is 5; it must divide the number of all ranks (12)\n  \
         = help: use one of 1, 2, 3, 4, 6, 12, or \"world\""
    );
    assert_eq!(
        ShardSize::Node.ranks(8, 3).unwrap_err().to_string(),
        "`parallel.shard_size` is \"node\", which has 3 ranks here; it must divide the number of \
         all ranks (8)\n  = help: use one of 1, 2, 4, 8, or \"world\""
    );
    for (size, world, local) in [
        (ShardSize::Ranks(16), 8, 8),
        (ShardSize::Ranks(0), 8, 8),
        (ShardSize::Ranks(usize::MAX), 8, 8),
        (ShardSize::Node, 8, 0),
        (ShardSize::Node, 2, 4),
    ] {
        assert!(size.ranks(world, local).is_err(), "{size:?} of {world}");
    }
}

#[test]
fn traced_steps_include_both_ends() {
    let steps = TraceSteps { first: 3, last: 5 };
    let traced: Vec<u64> = (0..9).filter(|step| steps.contains(*step)).collect();
    assert_eq!(traced, [3, 4, 5]);
}

#[test]
fn replicas_are_compared_at_every_interval_or_never() {
    let guard = |set: &str| load_with(MINIMAL, &[set]).unwrap().guard;
    let every_three = guard("guard.replica_check_steps=3");
    let steps: Vec<u64> = (1..10)
        .filter(|step| every_three.checks_replicas_after(*step))
        .collect();
    assert_eq!(steps, [3, 6, 9]);
    let never = guard("guard.replica_check_steps=0");
    assert!((1..1000).all(|step| !never.checks_replicas_after(step)));
}
