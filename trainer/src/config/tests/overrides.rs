//! `--set` and the precedence of layers.

use super::{MINIMAL, load_with, minimal_with};
use crate::config::{DtypeChoice, ScheduleKind};

#[test]
fn values_are_toml_and_else_strings() {
    let config = load_with(
        MINIMAL,
        &[
            "run.name=first",
            "run.seed = 7",
            "optimizer.betas=[0.8, 0.99]",
            "stage.0.seq_len=8192",
            "stage.0.weights.web=0.5",
            "parallel.overlap=false",
            "data.source.0.name=\"web\"",
            "model.freeze=[\"*norm.weight\"]",
        ],
    )
    .unwrap();
    assert_eq!(config.run.name, "first");
    assert_eq!(config.run.seed, 7);
    assert_eq!(config.optimizer.betas, (0.8, 0.99));
    assert_eq!(config.stages[0].seq_len, 8192);
    assert_eq!(config.stages[0].weights["web"], 0.5);
    assert!(!config.parallel.overlap);
    assert!(config.model.freeze.matches("model.norm.weight"));
}

#[test]
fn later_wins_over_earlier_over_file_over_preset_over_default() {
    let text = minimal_with("\"tiny\"", "\"tiny\"\nnum_layers = 3\ndtype = \"bf16\"");
    let config = load_with(&text, &["model.dtype=auto", "model.dtype=fp32"]).unwrap();
    assert_eq!(config.model.dtype, DtypeChoice::Fp32);
    assert_eq!(config.model.num_layers, 3);
    assert_eq!(config.model.hidden_size, 64);
    assert_eq!(config.model.init_std, 0.02);
}

#[test]
fn a_preset_may_come_from_the_command_line() {
    let config = load_with(MINIMAL, &["model.preset=demo"]).unwrap();
    assert_eq!(config.model.vocab_size, 8192);
}

#[test]
fn the_command_line_replaces_steps_by_tokens_and_back() {
    let config = load_with(MINIMAL, &["stage.0.tokens=65537"]).unwrap();
    assert_eq!(config.stages[0].steps, 2);
    let text = minimal_with("steps = 100", "tokens = 1_000_000");
    assert_eq!(
        load_with(&text, &["stage.0.steps=3"]).unwrap().stages[0].steps,
        3
    );
    let error = load_with(MINIMAL, &["stage.0.tokens=65537", "stage.0.steps=3"]).unwrap_err();
    assert!(
        error.to_string().contains("both `steps` and `tokens`"),
        "{error}"
    );
}

#[test]
fn another_schedule_on_the_command_line_drops_the_decay_of_the_file() {
    let text = minimal_with(
        "steps = 100",
        "steps = 100\nschedule = \"wsd\"\ndecay_steps = 20",
    );
    let stage = &load_with(&text, &[]).unwrap().stages[0];
    assert_eq!(
        (stage.schedule, stage.decay_steps),
        (ScheduleKind::Wsd, Some(20))
    );
    let stage = &load_with(&text, &["stage.0.schedule=cosine"])
        .unwrap()
        .stages[0];
    assert_eq!(
        (stage.schedule, stage.decay_steps),
        (ScheduleKind::Cosine, None)
    );
}

#[test]
fn what_cannot_be_set_is_refused() {
    let cases = [
        ("run.seed", "a `--set` without `=`"),
        ("run..seed=1", "has an empty part"),
        ("=1", "has an empty part"),
        (
            "stage.1.steps=1",
            "`stage.1` does not exist: `stage` has 1 entries",
        ),
        ("stage.last.steps=1", "`stage.last` does not exist"),
        (
            "optimizer.lr.peak=1",
            "`optimizer.lr` is 0.001; it has no key `peak`",
        ),
        ("stage.0.seq_len=4o96", "is the string \"4o96\""),
        ("run.name=", "is the string \"\", it must be a name"),
        ("run.name=1", "write it as a string: `name = \"1\"`"),
        (
            "model.num_heads=7",
            "`model.hidden_size` is 64, it must be a multiple",
        ),
        (
            "model.num_heads=1",
            "`model.num_kv_heads` is 2, it must divide",
        ),
        (
            "stage.0.seq_len=5000",
            "`stage.0.batch_tokens` is 65536, it must be a multiple",
        ),
        (
            "data.window_tokens=4095",
            "`data.window_tokens` is 4095, less than",
        ),
        ("optmizer.lr=1", "did you mean `optimizer`?"),
    ];
    for (set, expected) in cases {
        let error = load_with(MINIMAL, &[set]).unwrap_err().to_string();
        assert!(
            error.contains(expected) && error.contains("--> --set:1:"),
            "{set}:\n{error}"
        );
    }
}
