//! What a stage says about steps, batches, learning rate and mixture.

use super::{MINIMAL, load, minimal_with};
use crate::config::{DecayShape, ScheduleKind, StageOptimizer};

#[test]
fn tokens_become_steps_rounded_up() {
    for (tokens, steps) in [(1, 1), (65535, 1), (65536, 1), (65537, 2), (6_553_600, 100)] {
        let config = load(&minimal_with("steps = 100", &format!("tokens = {tokens}"))).unwrap();
        assert_eq!(config.stages[0].steps, steps, "{tokens} tokens");
        assert!(config.stages[0].total_tokens() >= tokens);
    }
}

#[test]
fn accumulation_places_every_sample() {
    let mut stage = load(MINIMAL).unwrap().stages[0].clone();
    assert_eq!(stage.samples_per_batch(), 16);
    for (ranks, micro_batch, expected) in [
        (1, 1, 16),
        (2, 1, 8),
        (3, 1, 6),
        (4, 2, 2),
        (16, 1, 1),
        (17, 1, 1),
        (2, 5, 2),
        (1, 99, 1),
    ] {
        stage.micro_batch = micro_batch;
        assert_eq!(
            stage.accumulation(ranks),
            expected,
            "{ranks} ranks of {micro_batch}"
        );
    }
}

#[test]
fn stages_inherit_and_override_the_learning_rate() {
    let text = format!(
        "{}\n[[stage]]\nname = \"b\"\nseq_len = 8192\nsteps = 50\nbatch_tokens = 65536\n\
         lr = 5e-4\nwarmup_steps = 0\nschedule = \"wsd\"\noptimizer = \"reset\"\nrope_base = 50000\n",
        minimal_with(
            "lr = 1e-3",
            "lr = 1e-3\nwarmup_steps = 4\nschedule = \"linear\"\nmin_lr_ratio = 0"
        ),
    );
    let config = load(&text).unwrap();
    let [a, b] = &config.stages[..] else {
        panic!("two stages")
    };
    assert_eq!(
        (a.lr, a.warmup_steps, a.schedule),
        (1e-3, 4, ScheduleKind::Linear)
    );
    assert_eq!((a.decay_steps, a.decay_shape), (None, None));
    assert_eq!((a.optimizer, a.rope_base), (StageOptimizer::Keep, 10000.0));
    assert_eq!(a.lr_at(0), 0.25e-3);
    assert_eq!(a.lr_at(3), 1e-3);
    assert_eq!(a.lr_at(99), 0.0);
    assert_eq!(
        (b.lr, b.warmup_steps, b.schedule),
        (5e-4, 0, ScheduleKind::Wsd)
    );
    assert_eq!(
        (b.decay_steps, b.decay_shape),
        (Some(5), Some(DecayShape::Sqrt))
    );
    assert_eq!(
        (b.optimizer, b.rope_base, b.min_lr_ratio),
        (StageOptimizer::Reset, 50000.0, 0.0)
    );
    assert_eq!(b.lr_at(44), 5e-4);
    assert_eq!(b.lr_at(49), 0.0);
}

#[test]
fn a_mixture_names_its_sources() {
    let second = "[[data.source]]\nname = \"code\"\npath = \"c\"\nweight = 3\n\n[optimizer]";
    let text = minimal_with("[optimizer]", second);
    let config = load(&text).unwrap();
    assert_eq!(config.source_weights(&config.stages[0]), [1.0, 3.0]);
    let config =
        load(&text.replace("steps = 100", "steps = 100\nweights = { code = 0.4 }")).unwrap();
    assert_eq!(config.source_weights(&config.stages[0]), [0.0, 0.4]);
}

#[test]
fn norms_and_biases_are_not_decayed_by_default() {
    let optimizer = load(MINIMAL).unwrap().optimizer;
    for tensor in [
        "model.norm.weight",
        "model.layers.3.input_layernorm.weight",
        "model.layers.11.post_attention_layernorm.weight",
        "model.layers.0.self_attn.q_proj.bias",
    ] {
        assert_eq!(optimizer.weight_decay_of(tensor), 0.0, "{tensor}");
    }
    for tensor in [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.0.self_attn.q_proj.weight",
    ] {
        assert_eq!(optimizer.weight_decay_of(tensor), 0.1, "{tensor}");
    }
    assert_eq!(optimizer.clip(), Some(1.0));
}

#[test]
fn frozen_tensors_are_found_by_pattern() {
    let text = minimal_with(
        "\"tiny\"",
        "\"tiny\"\nfreeze = [\"model.embed_tokens.weight\", \"model.layers.[0-3].*\", \"*.k_prj.*\"]",
    );
    let freeze = load(&text).unwrap().model.freeze;
    assert!(freeze.matches("model.embed_tokens.weight"));
    assert!(freeze.matches("model.layers.2.mlp.up_proj.weight"));
    assert!(!freeze.matches("model.layers.12.mlp.up_proj.weight"));
    assert!(!freeze.matches("model.norm.weight"));
    let names = [
        "model.embed_tokens.weight",
        "model.layers.2.mlp.up_proj.weight",
    ];
    assert_eq!(freeze.unused(names), ["*.k_prj.*"]);
}
