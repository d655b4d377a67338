//! Import, export and import again.

use super::*;
use crate::checkpoint::{
    Attachment, ManifestMeta, PieceData, SpecialTokens, StageMark, StateKind, commit, save_part,
};
use std::time::Duration;

/// The round trip is bit-equal in every type, tied or not, in one file or many.
#[test]
fn import_export_import_is_bit_equal() {
    let types = [
        (FileDtype::F32, Dtype::F32),
        (FileDtype::BF16, Dtype::Bf16),
        (FileDtype::F16, Dtype::F16),
    ];
    for (file_dtype, dtype) in types {
        for tied in [false, true] {
            let root = tempfile::tempdir().unwrap();
            let at = |name: &str| root.path().join(name);
            let original = tensors(&sizes(tied), file_dtype);
            write_folder(&at("hf"), &legacy_config(tied), &original);
            let imported = from_hf(&at("hf"), &at("a"), &mut quiet).unwrap();
            assert_eq!(imported.tensors, original.len());
            export(&at("a"), &at("hf2"), dtype, DEFAULT_SHARD_BYTES);
            assert_same(&at("hf2"), &original);
            export(&at("a"), &at("hf3"), dtype, 500);
            assert_same(&at("hf3"), &original);
            from_hf(&at("hf3"), &at("b"), &mut quiet).unwrap();
            let (a, b) = (
                Checkpoint::open(at("a")).unwrap(),
                Checkpoint::open(at("b")).unwrap(),
            );
            assert_eq!(a.meta(), b.meta());
            for tensor in a.tensors() {
                let bits = |checkpoint: &Checkpoint| -> Vec<u32> {
                    let values = checkpoint.read_whole(&tensor.name, StateKind::Master);
                    values.unwrap().into_iter().map(f32::to_bits).collect()
                };
                assert_eq!(bits(&a), bits(&b), "{}", tensor.name);
            }
        }
    }
}

#[test]
fn shards_have_an_index_and_the_limit_holds() {
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    let original = tensors(&sizes(false), FileDtype::F32);
    write_folder(&at("hf"), &legacy_config(false), &original);
    from_hf(&at("hf"), &at("ckpt"), &mut quiet).unwrap();
    let limit = 800;
    let written = export(&at("ckpt"), &at("out"), Dtype::F32, limit);
    assert!(written.shards > 3);
    let index: Value =
        serde_json::from_slice(&fs::read(at("out/model.safetensors.index.json")).unwrap()).unwrap();
    let total: usize = original.iter().map(|tensor| tensor.bytes.len()).sum();
    assert_eq!(index["metadata"]["total_size"], json!(total));
    assert_eq!(written.tensor_bytes, total as u64);
    let map = index["weight_map"].as_object().unwrap();
    assert_eq!(map.len(), original.len());
    let mut seen = 0;
    for shard in 1..=written.shards {
        let name = format!("model-{shard:05}-of-{:05}.safetensors", written.shards);
        let bytes = fs::read(at("out").join(&name)).unwrap();
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        assert_eq!(header.metadata().as_ref().unwrap()["format"], "pt");
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let size: usize = file.iter().map(|(_, view)| view.data().len()).sum();
        // One tensor larger than the limit has a file of its own.
        assert!(size as u64 <= limit || file.len() == 1, "{name}: {size}");
        assert!(file.iter().all(|(tensor, _)| map[tensor] == json!(name)));
        seen += file.len();
    }
    assert_eq!(seen, original.len());
    // One file needs no index.
    assert_eq!(
        export(&at("ckpt"), &at("one"), Dtype::F32, 1 << 30).shards,
        1
    );
    assert!(!at("one/model.safetensors.index.json").exists());
}

/// A run's checkpoint of a tied model, with the values 0, 1, 2, … in every tensor.
fn run_checkpoint(dir: &Path, special: SpecialTokens, attachments: &[Attachment]) {
    let config = "[run]\nname = \"x\"\n[model]\nvocab_size = 11\nhidden_size = 8\n\
                  intermediate_size = 12\nnum_layers = 2\nnum_heads = 6\nnum_kv_heads = 2\n\
                  head_dim = 4\nrms_norm_eps = 1e-6\ntie_word_embeddings = true\n\
                  dtype = \"bf16\"\ninit_std = 0.02\n[[stage]]\nname = \"8k\"\n";
    let list = list_of_tensors(&sizes(true));
    let data: Vec<Vec<f32>> = list
        .iter()
        .map(|(_, shape)| {
            (0..shape.iter().product())
                .map(|index: usize| index as f32)
                .collect()
        })
        .collect();
    let pieces: Vec<PieceData<'_>> = list
        .iter()
        .zip(&data)
        .map(|((name, shape), data)| PieceData {
            tensor: name,
            state: StateKind::Master,
            shape,
            range: 0..data.len(),
            data,
        })
        .collect();
    save_part(dir, 0, 1, "1-9", &pieces).unwrap();
    let meta = ManifestMeta {
        step: 9,
        stage: Some(StageMark {
            index: 1,
            name: "8k".to_owned(),
            seq_len: 8192,
            rope_base: 200_000.0,
        }),
        special_tokens: special,
        config: config.to_owned(),
        ..ManifestMeta::default()
    };
    commit(dir, 1, "1-9", &meta, attachments, Duration::ZERO).unwrap();
}

#[test]
fn a_runs_checkpoint_exports_what_it_was_trained_with() {
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": [
            {"id": 0, "content": "<|begin|>", "special": true},
            {"id": 3, "content": "<|end|>", "special": true},
        ],
        "model": {"type": "BPE"},
    });
    fs::write(at("tokenizer.json"), tokenizer.to_string()).unwrap();
    let special = SpecialTokens {
        bos: Some(0),
        eos: vec![3],
        pad: None,
    };
    run_checkpoint(&at("ckpt"), special, &tokenizer_attachments(root.path()));
    let mut last = (0, 0);
    let checkpoint = Checkpoint::open(at("ckpt")).unwrap();
    to_hf(
        &checkpoint,
        &at("out/model"),
        &ExportOptions::default(),
        &mut |done, total| {
            assert!(done >= last.0 && done <= total);
            last = (done, total);
        },
    )
    .unwrap();
    assert_eq!(last.0, last.1);
    assert_eq!(
        names(&at("out/model")),
        [
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "special_tokens_map.json",
            "tokenizer.json",
            "tokenizer_config.json"
        ]
    );
    assert_eq!(names(&at("out")), ["model"]);
    let json = |name: &str| -> Value {
        serde_json::from_slice(&fs::read(at("out/model").join(name)).unwrap()).unwrap()
    };
    let config = json("config.json");
    for (key, value) in [
        ("architectures", json!(["LlamaForCausalLM"])),
        ("model_type", json!("llama")),
        ("rope_theta", json!(200_000.0)),
        ("rope_scaling", Value::Null),
        ("max_position_embeddings", json!(8192)),
        ("torch_dtype", json!("bfloat16")),
        ("head_dim", json!(4)),
        ("tie_word_embeddings", json!(true)),
        ("rms_norm_eps", json!(1e-6)),
        ("attention_bias", json!(false)),
        ("mlp_bias", json!(false)),
        ("initializer_range", json!(0.02)),
        ("bos_token_id", json!(0)),
        ("eos_token_id", json!(3)),
        ("pad_token_id", Value::Null),
    ] {
        assert_eq!(config.get(key), Some(&value), "{key}");
    }
    assert!(config.get("rope_parameters").is_none() && config.get("dtype").is_none());
    assert_eq!(json("generation_config.json")["eos_token_id"], json!(3));
    assert_eq!(json("tokenizer.json"), tokenizer);
    assert_eq!(json("tokenizer_config.json")["eos_token"], json!("<|end|>"));
    assert_eq!(
        json("special_tokens_map.json"),
        json!({"bos_token": "<|begin|>", "eos_token": "<|end|>"})
    );
    // The weights are there, and read back through our own reader too.
    let folder = HfFolder::open(at("out/model")).unwrap();
    let mut row = [0.0; 8];
    folder
        .read_f32("model.layers.1.mlp.up_proj.weight", 16..24, &mut row)
        .unwrap();
    assert_eq!(row, [16.0, 17.0, 18.0, 19.0, 20.0, 21.0, 22.0, 23.0]);
}

#[test]
fn carried_tokenizer_files_are_verbatim() {
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    write_folder(
        &at("hf"),
        &legacy_config(true),
        &tensors(&sizes(true), FileDtype::BF16),
    );
    let files = [
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ];
    for name in files {
        fs::write(
            at("hf").join(name),
            format!("{{ \"which\":   \"{name}\" }}"),
        )
        .unwrap();
    }
    fs::write(at("hf/README.md"), "not carried").unwrap();
    from_hf(&at("hf"), &at("ckpt"), &mut quiet).unwrap();
    export(&at("ckpt"), &at("out"), Dtype::Bf16, 1 << 30);
    for name in files {
        let read = |dir: &str| fs::read(at(dir).join(name)).unwrap();
        assert_eq!(read("hf"), read("out"), "{name}");
    }
    assert!(!at("out/README.md").exists());
}

#[test]
fn a_tokenizer_class_that_only_transformers_5_knows_is_renamed() {
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    write_folder(
        &at("hf"),
        &legacy_config(true),
        &tensors(&sizes(true), FileDtype::BF16),
    );
    let config = |class: &str| json!({"tokenizer_class": class, "backend": "tokenizers"});
    fs::write(
        at("hf/tokenizer_config.json"),
        config("TokenizersBackend").to_string(),
    )
    .unwrap();
    from_hf(&at("hf"), &at("ckpt"), &mut quiet).unwrap();
    export(&at("ckpt"), &at("out"), Dtype::Bf16, 1 << 30);
    let written = fs::read(at("out/tokenizer_config.json")).unwrap();
    let written: Value = serde_json::from_slice(&written).unwrap();
    assert_eq!(written, config("PreTrainedTokenizerFast"));
}

#[test]
fn failed_exports_leave_nothing() {
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    let mut original = tensors(&sizes(false), FileDtype::F32);
    let norm = original
        .iter_mut()
        .find(|tensor| tensor.name == "model.norm.weight")
        .unwrap();
    norm.bytes[..4].copy_from_slice(&70_000f32.to_le_bytes());
    write_folder(&at("hf"), &legacy_config(false), &original);
    from_hf(&at("hf"), &at("ckpt"), &mut quiet).unwrap();
    let checkpoint = Checkpoint::open(at("ckpt")).unwrap();
    let before = names(root.path());
    let options = ExportOptions {
        dtype: Dtype::F16,
        max_shard_bytes: 300,
    };
    let error = to_hf(&checkpoint, &at("out"), &options, &mut quiet)
        .unwrap_err()
        .to_string();
    assert!(error.contains("`model.norm.weight` holds 70000"), "{error}");
    assert_eq!(names(root.path()), before);

    fs::create_dir(at("taken")).unwrap();
    to_hf(
        &checkpoint,
        &at("taken"),
        &ExportOptions::default(),
        &mut quiet,
    )
    .unwrap();
    let again = to_hf(
        &checkpoint,
        &at("taken"),
        &ExportOptions::default(),
        &mut quiet,
    );
    assert!(matches!(again, Err(Error::OutputExists { .. })));
    assert!(matches!(
        from_hf(&at("hf"), &at("ckpt"), &mut quiet),
        Err(Error::OutputExists { .. })
    ));

    // A damaged checkpoint does not become a model.
    let part = at("ckpt").join("part-00000.import.safetensors");
    let mut bytes = fs::read(&part).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&part, bytes).unwrap();
    let checkpoint = Checkpoint::open(at("ckpt")).unwrap();
    let error = to_hf(
        &checkpoint,
        &at("out"),
        &ExportOptions::default(),
        &mut quiet,
    )
    .unwrap_err();
    assert!(error.to_string().contains("the file is damaged"), "{error}");
    assert!(!at("out").exists());
}

#[test]
fn checkpoints_without_a_model_or_of_another_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("ckpt");
    save_part(&dir, 0, 1, "s", &[]).unwrap();
    let attempt = |meta: &ManifestMeta, save_id: &str| {
        save_part(&dir, 0, 1, save_id, &[]).unwrap();
        commit(&dir, 1, save_id, meta, &[], Duration::ZERO).unwrap();
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let out = root.path().join("out");
        to_hf(&checkpoint, &out, &ExportOptions::default(), &mut quiet)
            .unwrap_err()
            .to_string()
    };
    let mut meta = ManifestMeta::default();
    assert!(attempt(&meta, "a").contains("missing field `model`"));
    meta.config = "[model]\nvocab_size = 11\n".to_owned();
    assert!(attempt(&meta, "b").contains("missing field `hidden_size`"));
    meta.config += "hidden_size = 8\nintermediate_size = 12\nnum_layers = 2\nnum_heads = 6\n\
                    num_kv_heads = 4\nhead_dim = 4\nrms_norm_eps = 1e-6\n\
                    tie_word_embeddings = true\n";
    assert!(attempt(&meta, "c").contains("saved before the first step"));
    meta.stage = Some(StageMark {
        seq_len: 64,
        rope_base: 1e4,
        ..StageMark::default()
    });
    assert!(attempt(&meta, "d").contains("6 query heads cannot share 4"));
    meta.config = meta.config.replace("num_kv_heads = 4", "num_kv_heads = 2");
    let error = attempt(&meta, "e");
    assert!(
        error.contains("`model.embed_tokens.weight` of shape [11, 8] is missing"),
        "{error}"
    );
}
