//! What is accepted from a folder, and what is refused.

use super::*;

fn open(config: &Value, tensors: &[Tensor]) -> Result<LlamaConfig, Error> {
    let root = tempfile::tempdir().unwrap();
    write_folder(root.path(), config, tensors);
    HfFolder::open(root.path()).map(|folder| folder.config().clone())
}

/// Opens the tiny folder with some keys changed.
fn open_with(changes: &[(&str, Value)]) -> Result<LlamaConfig, Error> {
    let mut config = legacy_config(false);
    for (key, value) in changes {
        config[*key] = value.clone();
    }
    open(&config, &tensors(&sizes(false), FileDtype::BF16))
}

#[test]
fn the_config_is_understood() {
    let config = open_with(&[]).unwrap();
    assert_eq!(config.sizes, sizes(false));
    assert_eq!((config.rope_base, config.rms_norm_eps), (500_000.0, 1e-5));
    assert_eq!((config.max_seq_len, config.init_std), (4096, 0.01));
    let tokens = &config.special_tokens;
    assert_eq!(
        (tokens.bos, tokens.eos.as_slice(), tokens.pad),
        (Some(1), &[2, 9][..], None)
    );
}

#[test]
fn both_rope_styles_are_read() {
    let theta = |changes: &[(&str, Value)]| open_with(changes).unwrap().rope_base;
    let null = Value::Null;
    let plain = json!({"rope_type": "default", "rope_theta": 1e6});
    assert_eq!(
        theta(&[
            ("rope_theta", null.clone()),
            ("rope_parameters", plain.clone())
        ]),
        1e6
    );
    // In 5.x, `rope_scaling` is another name of `rope_parameters`.
    assert_eq!(
        theta(&[
            ("rope_theta", null.clone()),
            ("rope_scaling", plain.clone())
        ]),
        1e6
    );
    assert_eq!(
        theta(&[
            ("rope_theta", json!(1e6)),
            ("rope_parameters", plain.clone())
        ]),
        1e6
    );
    assert_eq!(
        theta(&[("rope_scaling", json!({"type": "default"}))]),
        500_000.0
    );
    assert_eq!(theta(&[("rope_theta", null)]), 10_000.0);
    let error = open_with(&[("rope_parameters", plain)])
        .unwrap_err()
        .to_string();
    assert!(error.contains("`rope_parameters.rope_theta`") && error.contains("contradicts"));
}

#[test]
fn absent_keys_have_their_defaults() {
    let mut config = legacy_config(false);
    for key in [
        "num_key_value_heads",
        "head_dim",
        "rope_scaling",
        "initializer_range",
    ] {
        config.as_object_mut().unwrap().remove(key);
    }
    config["num_attention_heads"] = json!(4);
    let sizes = LlamaSizes {
        num_heads: 4,
        num_kv_heads: 4,
        head_dim: 2,
        ..sizes(false)
    };
    let read = open(&config, &tensors(&sizes, FileDtype::F32)).unwrap();
    assert_eq!(read.sizes, sizes);
    assert_eq!(read.init_std, 0.02);
}

#[test]
fn every_refusal_names_its_key() {
    let refusals = [
        ("model_type", json!("gemma")),
        ("model_type", json!(null)),
        ("hidden_act", json!("gelu")),
        ("attention_bias", json!(true)),
        ("mlp_bias", json!(true)),
        ("attention_dropout", json!(0.1)),
        ("partial_rotary_factor", json!(0.5)),
        ("quantization_config", json!({"quant_method": "gptq"})),
        ("rope_scaling", json!({"type": "linear", "factor": 2.0})),
        (
            "rope_scaling",
            json!({"rope_type": "llama3", "factor": 8.0}),
        ),
        ("rope_scaling", json!({"type": "dynamic", "factor": 1.0})),
        ("rope_scaling", json!({"factor": 2.0})),
        ("rope_scaling", json!({"type": 7})),
        (
            "rope_parameters",
            json!({"rope_type": "yarn", "factor": 4.0}),
        ),
        (
            "rope_parameters",
            json!({"full_attention": {"rope_theta": 1e6}}),
        ),
    ];
    for (key, value) in refusals {
        let error = open_with(&[(key, value.clone())]).unwrap_err();
        assert!(
            matches!(error, Error::Unsupported { .. }),
            "{key} = {value}: {error}"
        );
        let text = error.to_string();
        assert!(
            text.contains("config.json") && text.contains(key),
            "{key} = {value}: {text}"
        );
    }
    let malformed = [
        ("vocab_size", json!("11"), "invalid type"),
        ("vocab_size", json!(-1), "invalid value"),
        ("vocab_size", Value::Null, "`vocab_size` is missing"),
        ("num_hidden_layers", json!(0), "num_layers = 0"),
        ("num_hidden_layers", json!(usize::MAX), "num_layers = "),
        ("hidden_size", json!(usize::MAX), "hidden_size = "),
        ("num_key_value_heads", json!(4), "cannot share"),
        ("head_dim", json!(3), "head_dim = 3 is odd"),
        ("rms_norm_eps", json!(0.0), "must be positive"),
        ("rope_theta", json!(-1.0), "must be positive"),
        ("rope_scaling", json!("none"), "is not a table"),
    ];
    for (key, value, message) in malformed {
        let error = open_with(&[(key, value.clone())]).unwrap_err().to_string();
        assert!(error.contains(message), "{key} = {value}: {error}");
    }
}

#[test]
fn tensors_that_do_not_fit_are_listed() {
    let config = legacy_config(false);
    let all = tensors(&sizes(false), FileDtype::BF16);
    let error = |tensors: &[Tensor]| open(&config, tensors).unwrap_err().to_string();

    let missing = error(&all[1..]);
    assert!(
        missing.contains("`model.embed_tokens.weight` [11, 8] is missing"),
        "{missing}"
    );
    let no_head = error(&all[..all.len() - 1]);
    assert!(
        no_head.contains("`lm_head.weight` [11, 8] is missing"),
        "{no_head}"
    );

    let mut more = all.clone();
    more.push(Tensor {
        name: "model.layers.0.self_attn.q_proj.bias".into(),
        ..all[1].clone()
    });
    more.push(Tensor {
        name: "model.layers.7.mlp.up_proj.weight".into(),
        ..all[1].clone()
    });
    let unexpected = error(&more);
    assert!(unexpected.contains("`model.layers.0.self_attn.q_proj.bias` is unexpected"));
    assert!(unexpected.contains("`model.layers.7.mlp.up_proj.weight` is unexpected"));

    let mut turned = all.clone();
    turned[2].shape.reverse();
    let shape = error(&turned);
    assert!(
        shape.contains("has shape [8, 24], [24, 8] was expected"),
        "{shape}"
    );

    let mut integer = all.clone();
    integer[1].dtype = FileDtype::I16;
    let dtype = error(&integer);
    assert!(
        dtype.contains("is I16; F32, BF16 or F16 was expected"),
        "{dtype}"
    );

    let many = error(&[]);
    assert!(many.contains("and 16 more differences"), "{many}");
}

#[test]
fn rotary_buffers_are_ignored() {
    let mut all = tensors(&sizes(false), FileDtype::BF16);
    let name = "model.layers.0.self_attn.rotary_emb.inv_freq".to_owned();
    let bytes = vec![0; 8];
    all.push(Tensor {
        name,
        dtype: FileDtype::F32,
        shape: vec![2],
        bytes,
    });
    open(&legacy_config(false), &all).unwrap();
}

#[test]
fn a_tied_head_may_be_stored_if_it_is_the_embedding() {
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    let original = tensors(&sizes(true), FileDtype::BF16);
    let mut all = original.clone();
    all.push(Tensor {
        name: "lm_head.weight".to_owned(),
        ..original[0].clone()
    });
    write_folder(&at("same"), &legacy_config(true), &all);
    assert!(HfFolder::open(at("same")).unwrap().has_redundant_head());
    from_hf(&at("same"), &at("ckpt"), &mut quiet).unwrap();
    export(&at("ckpt"), &at("out"), Dtype::Bf16, 1 << 30);
    assert_same(&at("out"), &original);

    all.last_mut().unwrap().bytes[9] ^= 1;
    write_folder(&at("other"), &legacy_config(true), &all);
    let error = from_hf(&at("other"), &at("never"), &mut quiet)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("`lm_head.weight` differs") && error.contains("element 4"),
        "{error}"
    );
    assert!(!at("never").exists());

    all.last_mut().unwrap().shape.reverse();
    write_folder(&at("turned"), &legacy_config(true), &all);
    assert!(HfFolder::open(at("turned")).is_err());
}

#[test]
fn mixed_types_are_read_as_f32() {
    let root = tempfile::tempdir().unwrap();
    let mut all = tensors(&sizes(false), FileDtype::BF16);
    let norm = all
        .iter_mut()
        .find(|tensor| tensor.name == "model.norm.weight")
        .unwrap();
    let norm_values = [1.0f32, -2.5, 3e-8, 7.0, 0.1, 1e9, -0.0, 5.0];
    norm.dtype = FileDtype::F32;
    norm.bytes = norm_values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    write_folder(root.path(), &legacy_config(false), &all);
    let folder = HfFolder::open(root.path()).unwrap();
    let mut out = [0.0; 3];
    folder
        .read_f32("model.norm.weight", 4..7, &mut out)
        .unwrap();
    assert_eq!(out, norm_values[4..7]);
    let mut embedding = [0.0; 5];
    folder
        .read_f32("model.embed_tokens.weight", 3..8, &mut embedding)
        .unwrap();
    for (index, value) in embedding.iter().enumerate() {
        let raw = [
            all[0].bytes[2 * (index + 3)],
            all[0].bytes[2 * (index + 3) + 1],
        ];
        assert_eq!(*value, half::bf16::from_le_bytes(raw).to_f32());
    }
    assert!(
        folder
            .read_f32("model.norm.weight", 6..9, &mut out)
            .is_err()
    );
    assert!(
        folder
            .read_f32("model.norm.weight", 0..2, &mut out)
            .is_err()
    );
    assert!(folder.read_f32("absent", 0..3, &mut out).is_err());
}
