//! Exact texts of refusals: what a user reads is part of the interface.

use super::{MINIMAL, load, load_with, minimal_with, refusal};
use crate::config::Config;

#[track_caller]
fn assert_text(found: &str, expected: &str) {
    assert!(
        found == expected,
        "--- found\n{found}\n--- expected\n{expected}\n---"
    );
}

#[test]
fn a_misspelt_key_gets_the_nearest_one() {
    assert_text(
        &refusal(&minimal_with("seq_len =", "seq_lenght =")),
        "unknown key `stage.0.seq_lenght`
  --> run.toml:13:1
   |
13 | seq_lenght = 4096
   | ^^^^^^^^^^
   = help: did you mean `seq_len`?",
    );
}

#[test]
fn a_key_without_a_neighbour_gets_the_list() {
    assert_text(
        &refusal(&format!("{MINIMAL}\n[checkpoint]\nzzz = 1\n")),
        "unknown key `checkpoint.zzz`
  --> run.toml:18:1
   |
18 | zzz = 1
   | ^^^
   = help: the keys here are: every_steps, at_end, keep, keep_every, ephemeral_every_steps, async, when_busy, dir",
    );
}

#[test]
fn a_wrong_type_shows_value_and_place() {
    assert_text(
        &refusal(&minimal_with("steps = 100", "steps = \"100\"")),
        "`stage.0.steps` is the string \"100\", it must be a whole number from 1 to 1000000000
  --> run.toml:14:9
   |
14 | steps = \"100\"
   |         ^^^^^
   = help: write `steps = 100`, without quotes",
    );
    assert_text(
        &refusal(&minimal_with("steps = 100", "tokens = 1e9")),
        "`stage.0.tokens` is 1000000000.0, it must be a whole number from 1 to 4611686018427387904
  --> run.toml:14:10
   |
14 | tokens = 1e9
   |          ^^^
   = help: write it without a point or exponent: `tokens = 1000000000`",
    );
}

#[test]
fn a_bad_choice_gets_the_nearest_one() {
    assert_text(
        &refusal(&minimal_with("lr = 1e-3", "lr = 1e-3\nschedule = \"cosin\"")),
        "`optimizer.schedule` is \"cosin\", it must be \"cosine\", \"linear\", \"constant\" or \"wsd\"
  --> run.toml:10:12
   |
10 | schedule = \"cosin\"
   |            ^^^^^^^
   = help: did you mean \"cosine\"?",
    );
}

#[test]
fn a_choice_beside_numbers_is_a_choice_or_a_number() {
    let parallel = |line: &str| refusal(&format!("{MINIMAL}\n[parallel]\n{line}\n"));
    assert_text(
        &parallel("shard_size = \"nodes\""),
        "`parallel.shard_size` is \"nodes\", it must be \"node\", \"world\" or a whole number from 1 \
to 1048576
  --> run.toml:18:14
   |
18 | shard_size = \"nodes\"
   |              ^^^^^^^
   = help: did you mean \"node\"?",
    );
    assert_text(
        &parallel("shard_size = \"2\""),
        "`parallel.shard_size` is the string \"2\", it must be \"node\", \"world\" or a whole number \
from 1 to 1048576
  --> run.toml:18:14
   |
18 | shard_size = \"2\"
   |              ^^^
   = help: write `shard_size = 2`, without quotes",
    );
    assert_text(
        &parallel("shard_size = 0"),
        "`parallel.shard_size` is 0, it must be \"node\", \"world\" or a whole number from 1 to 1048576
  --> run.toml:18:14
   |
18 | shard_size = 0
   |              ^
   = help: give `shard_size` \"node\", \"world\" or a whole number from 1 to 1048576",
    );
    assert_text(
        &parallel("shard_size = 2.0"),
        "`parallel.shard_size` is 2.0, it must be \"node\", \"world\" or a whole number from 1 to \
1048576
  --> run.toml:18:14
   |
18 | shard_size = 2.0
   |              ^^^
   = help: write it without a point or exponent: `shard_size = 2`",
    );
}

#[test]
fn a_shard_size_without_sharding_is_refused() {
    let text = format!("{MINIMAL}\n[parallel]\nzero_stage = 0\nshard_size = \"node\"\n");
    assert_text(
        &refusal(&text),
        "`parallel.shard_size` is \"node\", but nothing is sharded with `zero_stage = 0`
  --> run.toml:19:14
   |
19 | shard_size = \"node\"
   |              ^^^^^^
   = help: remove it, or set `zero_stage` to 1, 2 or 3",
    );
}

#[test]
fn traced_steps_are_two_and_in_order() {
    let run = |line: &str| refusal(&format!("{MINIMAL}\n[run]\n{line}\n"));
    assert_text(
        &run("trace_steps = [5, 3]"),
        "`run.trace_steps` is [5, 3], its first step must not be after its last
  --> run.toml:18:15
   |
18 | trace_steps = [5, 3]
   |               ^^^^^^
   = help: use [3, 5]",
    );
    assert_text(
        &run("trace_steps = [0, 3]"),
        "`run.trace_steps` is the list [0, 3], it must be a list of two whole numbers from 1 to \
1000000000
  --> run.toml:18:15
   |
18 | trace_steps = [0, 3]
   |               ^^^^^^
   = help: give `trace_steps` a list of two whole numbers from 1 to 1000000000",
    );
}

#[test]
fn a_length_of_time_has_units() {
    let run = |line: &str| refusal(&format!("{MINIMAL}\n[run]\n{line}\n"));
    assert_text(
        &run("time_limit = \"11.5h\""),
        "`run.time_limit` is the string \"11.5h\", which has the unknown unit \".\"; it must be a \
length of time
  --> run.toml:18:14
   |
18 | time_limit = \"11.5h\"
   |              ^^^^^^^
   = help: write numbers with the units d, h, m, s and ms, the greatest first, such as \"11h30m\" or \
\"45s\", or whole seconds without quotes",
    );
    assert!(run("time_limit = \"90\"").contains("which has no unit after 90"));
    assert!(run("time_limit = 0").contains("is 0, which is no time at all"));
    assert_text(
        &run("time_limit = 1.5"),
        "`run.time_limit` is 1.5, it must be a length of time such as `\"11h30m\"`, or whole seconds
  --> run.toml:18:14
   |
18 | time_limit = 1.5
   |              ^^^
   = help: give `time_limit` a length of time such as `\"11h30m\"`, or whole seconds",
    );
    assert!(run("time_limit = -5").contains("is -5, it must be a length of time"));
}

#[test]
fn samples_to_leave_out_are_half_open_ranges() {
    let guard = |line: &str| refusal(&format!("{MINIMAL}\n[guard]\n{line}\n"));
    assert_text(
        &guard("skip_samples = [[1, 2], [7, 7]]"),
        "`guard.skip_samples.1` is [7, 7], its end, which is not left out itself, must be after its \
first
  --> run.toml:18:25
   |
18 | skip_samples = [[1, 2], [7, 7]]
   |                         ^^^^^^
   = help: use [7, 8]",
    );
    assert_text(
        &guard("skip_samples = [[1, 2, 3]]"),
        "`guard.skip_samples.0` is the list [1, 2, 3], it must be a list of two whole numbers from 0 \
to 4611686018427387904
  --> run.toml:18:17
   |
18 | skip_samples = [[1, 2, 3]]
   |                 ^^^^^^^^^
   = help: give `guard.skip_samples.0` a list of two whole numbers from 0 to 4611686018427387904",
    );
    // 100 steps of 16 samples.
    load(&format!("{MINIMAL}\n[guard]\nskip_samples = [[7, 1607]]\n")).unwrap();
    assert_text(
        &guard("skip_samples = [[7, 1608]]"),
        "`guard.skip_samples.0` leaves out 1601 samples, more than the 1600 that all stages train on
  --> run.toml:18:17
   |
18 | skip_samples = [[7, 1608]]
   |                 ^^^^^^^^^
   = help: give indices of samples, counted from 0, without the end",
    );
    assert!(guard("skip_samples = [3, 9]").contains("`guard.skip_samples.0` is 3, it must be"));
    assert!(guard("spike_window = 15").contains("a whole number from 16 to"));
    assert!(guard("spike_zscore = 0").contains("a number > 0"));
}

#[test]
fn saves_fit_into_each_other() {
    let checkpoint = |lines: &str| refusal(&format!("{MINIMAL}\n[checkpoint]\n{lines}\n"));
    assert_text(
        &checkpoint("every_steps = 100\nkeep_every = 250"),
        "`checkpoint.keep_every` is 250, it must be a multiple of `checkpoint.every_steps` (100)
  --> run.toml:19:14
   |
19 | keep_every = 250
   |              ^^^
   = help: use 200 or 300",
    );
    assert_text(
        &checkpoint("ephemeral_every_steps = 500"),
        "`checkpoint.ephemeral_every_steps` is 500, it must be less than `checkpoint.every_steps` \
(500): no save would lie in between
  --> run.toml:18:25
   |
18 | ephemeral_every_steps = 500
   |                         ^^^
   = help: use a smaller number, or remove it",
    );
    assert!(checkpoint("when_busy = \"wiat\"").contains("did you mean \"wait\"?"));
}

#[test]
fn moments_in_bf16_need_a_decay_that_survives_rounding() {
    let with = |lines: &str| minimal_with("lr = 1e-3", &format!("lr = 1e-3\n{lines}"));
    assert_text(
        &refusal(&with("betas = [0.9, 0.999]\nmoments_dtype = \"bf16\"")),
        "`optimizer.betas` is [0.9, 0.999], with `moments_dtype = \"bf16\"` neither must be greater \
than 0.99609375: a moment that decays by less than 1/256 per step would round back to what it was
  --> run.toml:10:9
   |
10 | betas = [0.9, 0.999]
   |         ^^^^^^^^^^^^
   = help: use smaller betas such as [0.9, 0.95], or `moments_dtype = \"fp32\"`",
    );
    load(&with("betas = [0.9, 0.999]")).unwrap();
    load(&with("betas = [0.9, 0.99]\nmoments_dtype = \"bf16\"")).unwrap();
}

#[test]
fn offload_needs_memory_other_than_the_processors() {
    let with = |device: &str| {
        let text = minimal_with("lr = 1e-3", "lr = 1e-3\noffload = true");
        format!("{text}\n[run]\ndevice = \"{device}\"\n")
    };
    let auto = minimal_with("lr = 1e-3", "lr = 1e-3\noffload = true");
    assert_text(
        &refusal(&auto),
        "`optimizer.offload` is true with `run.device` \"auto\", which may be the processor: it computes \
in host memory already, and there is no other to move the optimizer's state to
  --> run.toml:10:11
   |
10 | offload = true
   |           ^^^^
   = help: remove `offload`, or set `device = \"cuda\"`",
    );
    assert!(refusal(&with("cpu")).contains("with `run.device` \"cpu\": it computes"));
    assert!(load(&with("cuda")).unwrap().optimizer.offload);
}

#[test]
fn a_number_out_of_range_is_refused() {
    assert_text(
        &refusal(&minimal_with("lr = 1e-3", "lr = nan")),
        "`optimizer.lr` is NaN, it must be a number > 0
 --> run.toml:9:6
  |
9 | lr = nan
  |      ^^^
  = help: give `lr` a number > 0",
    );
}

#[test]
fn a_batch_must_be_a_multiple_of_the_sequence() {
    assert_text(
        &refusal(&minimal_with("65536", "65000")),
        "`stage.0.batch_tokens` is 65000, it must be a multiple of `seq_len` (4096)
  --> run.toml:15:16
   |
15 | batch_tokens = 65000
   |                ^^^^^
   = help: use 61440 or 65536",
    );
}

#[test]
fn steps_and_tokens_exclude_each_other() {
    assert_text(
        &refusal(&minimal_with("steps = 100", "steps = 100\ntokens = 65536")),
        "`stage.0` has both `steps` and `tokens`
  --> run.toml:15:1
   |
15 | tokens = 65536
   | ^^^^^^
   = help: keep the one that you mean and remove the other",
    );
    assert_text(
        &refusal(&minimal_with("steps = 100\n", "")),
        "`stage.0` has neither `steps` nor `tokens`
  --> run.toml:11:1
   |
11 | [[stage]]
   | ^^^^^^^^^
   = help: add `steps = …` or `tokens = …`",
    );
}

#[test]
fn heads_must_divide() {
    assert_text(
        &refusal(&minimal_with("\"tiny\"", "\"tiny\"\nnum_kv_heads = 3")),
        "`model.num_kv_heads` is 3, it must divide `model.num_heads` (8)
 --> run.toml:3:16
  |
3 | num_kv_heads = 3
  |                ^
  = help: use one of 1, 2, 4, 8",
    );
    assert_text(
        &refusal(&minimal_with("\"tiny\"", "\"tiny\"\nhidden_size = 100")),
        "`model.hidden_size` is 100, it must be a multiple of `model.num_heads` (8)
 --> run.toml:3:15
  |
3 | hidden_size = 100
  |               ^^^
  = help: use 96 or 104, or set `model.head_dim`",
    );
}

#[test]
fn missing_sections_and_keys_are_named() {
    assert_text(
        &refusal(&minimal_with("[optimizer]\nlr = 1e-3\n", "")),
        "run.toml: the section `[optimizer]` is missing
  = help: add `[optimizer]` with `lr`",
    );
    assert_text(
        &refusal(&minimal_with(
            "[[data.source]]\nname = \"web\"\npath = \"shards/*.parquet\"\n",
            "",
        )),
        "run.toml: the section `[data]` is missing
  = help: add `[data]` with `[[data.source]]`",
    );
    assert_text(
        &refusal(&minimal_with(
            "[[data.source]]\nname = \"web\"\npath = \"shards/*.parquet\"\n",
            "[data]",
        )),
        "`data` lacks `[[data.source]]`
 --> run.toml:4:1
  |
4 | [data]
  | ^^^^^^
  = help: add `[[data.source]]` with `name`, `path`",
    );
    assert_text(
        &refusal(&minimal_with(
            "preset = \"tiny\"",
            "vocab_size = 8\nhidden_size = 8\nnum_layers = 1",
        )),
        "`model` lacks `intermediate_size`, `num_heads`
 --> run.toml:1:1
  |
1 | [model]
  | ^^^^^^^
  = help: add `intermediate_size` (a whole number from 1 to 4194304), `num_heads` (a whole number \
from 1 to 65536); or take all sizes from a `preset`",
    );
    assert_text(
        &refusal(&minimal_with("seq_len = 4096\n", "")),
        "`stage.0` lacks `seq_len`
  --> run.toml:11:1
   |
11 | [[stage]]
   | ^^^^^^^^^
   = help: add `seq_len` (a whole number from 1 to 16777216)",
    );
}

#[test]
fn stage_names_differ() {
    let again = "\n[[stage]]\nname = \"4k\"\nseq_len = 8192\nsteps = 1\nbatch_tokens = 65536\n";
    assert_text(
        &refusal(&format!("{MINIMAL}{again}")),
        "`stage.1.name` is \"4k\", as is `stage.0.name`; names must differ
  --> run.toml:18:8
   |
18 | name = \"4k\"
   |        ^^^^
   = help: give one of them another name",
    );
}

#[test]
fn an_unknown_preset_gets_the_nearest_one() {
    assert_text(
        &refusal(&minimal_with("\"tiny\"", "\"internlm-1.8b\"")),
        "`model.preset` is \"internlm-1.8b\", which is not a preset
 --> run.toml:2:10
  |
2 | preset = \"internlm-1.8b\"
  |          ^^^^^^^^^^^^^^^
  = help: did you mean \"internlm2-1.8b\"? The presets are: tiny, demo, internlm2-1.8b, \
llama-7b, internlm2-7b, internlm2-20b",
    );
}

#[test]
fn an_unreadable_file_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("absent.toml");
    let error = Config::load(&path, &[]).unwrap_err();
    assert_text(
        &error.to_string(),
        &format!(
            "cannot read the config {}: No such file or directory (os error 2)
  = help: name a TOML file that exists and is readable",
            path.display()
        ),
    );
    let path = folder.path().join("latin1.toml");
    std::fs::write(&path, b"# ok\n# \xe9\n").unwrap();
    let error = Config::load(&path, &[]).unwrap_err();
    assert_text(
        &error.to_string(),
        &format!(
            "{} is not UTF-8 text: wrong byte at offset 7, line 2
  = help: save the file as UTF-8",
            path.display()
        ),
    );
}

#[test]
fn a_misspelt_set_points_into_the_command_line() {
    let error = load_with(MINIMAL, &["stage.0.seq_lenght=4096"]).unwrap_err();
    assert_text(
        &error.to_string(),
        "unknown key `stage.0.seq_lenght`
 --> --set:1:9
  |
1 | stage.0.seq_lenght=4096
  |         ^^^^^^^^^^
  = help: did you mean `seq_len`?",
    );
}

#[test]
fn broken_syntax_has_a_place() {
    assert_text(
        &refusal("[model\n"),
        "not valid TOML: unclosed table, expected `]`
 --> run.toml:1:7
  |
1 | [model
  |       ^
  = help: correct the syntax (https://toml.io)",
    );
}

#[test]
fn a_stage_that_is_shorter_than_its_warmup_blames_the_line_it_inherits() {
    assert_text(
        &refusal(&minimal_with("lr = 1e-3", "lr = 1e-3\nwarmup_steps = 200")),
        "`stage.0.warmup_steps` is 200, more than the 100 steps of the stage
  --> run.toml:10:16
   |
10 | warmup_steps = 200
   |                ^^^
   = help: set `warmup_steps` of this stage to at most 100",
    );
}

#[test]
fn all_findings_are_shown_in_the_order_of_the_text() {
    let text = minimal_with("lr = 1e-3", "lr = -1\nlrr = 2").replace("steps = 100", "stesp = 1");
    let error = load(&text).unwrap_err();
    let lines: Vec<usize> = error
        .problems()
        .iter()
        .map(|problem| problem.place.as_ref().unwrap().line)
        .collect();
    assert_eq!(lines, [9, 10, 15]);
    assert_eq!(error.to_string().matches("\n\n").count(), 2);
}

#[test]
fn other_refusals_name_the_key() {
    let cases = [
        (
            "name = \"4k\"",
            "name = \"4k\"\nweights = { wbe = 1 }",
            "did you mean `web`?",
        ),
        (
            "name = \"4k\"",
            "name = \"4k\"\nweights = { web = 0 }",
            "gives every source a share of 0",
        ),
        (
            "name = \"4k\"",
            "name = \"4k\"\ndecay_steps = 5",
            "has no effect with schedule",
        ),
        ("name = \"4k\"", "name = \"a/b\"", "must be a name"),
        (
            "lr = 1e-3",
            "lr = 1e-3\nbetas = [0.9]",
            "a list of two numbers, each ≥ 0 and < 1",
        ),
        (
            "lr = 1e-3",
            "lr = 1e-3\nno_decay = [\"a[\"]",
            "`optimizer.no_decay.0` is not a pattern",
        ),
        (
            "lr = 1e-3",
            "lr = 99999999999999999999",
            "does not fit into 64 bits",
        ),
        ("lr = 1e-3", "lr = 2026-01-01", "is the date 2026-01-01"),
        ("\"tiny\"", "\"tiny\"\nhead_dim = 7", "it must be even"),
        (
            "[[stage]]",
            "[stage]",
            "`stage` is a table, it must be a list of tables",
        ),
        (
            "[[data.source]]",
            "[data]\nwindow_tokens = 64\n[[data.source]]",
            "no sample would fit",
        ),
        (
            "steps = 100",
            "tokens = 4611686018427387904",
            "more than 1000000000",
        ),
        (
            "steps = 100",
            "steps = 10\nschedule = \"wsd\"\ndecay_steps = 11",
            "that warm-up leaves",
        ),
        ("lr = 1e-3", "lr = 1e-3\nlr = 1e-3", "duplicate key"),
    ];
    for (piece, other, expected) in cases {
        let text = refusal(&minimal_with(piece, other));
        assert!(text.contains(expected), "{other:?} gave\n{text}");
        assert!(
            text.contains("run.toml:") && text.contains("= help: "),
            "{text}"
        );
    }
}
