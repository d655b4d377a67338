//! Hugging Face folders through the binary: import, export, generation, inspection.

#![allow(clippy::unwrap_used)]

#[path = "support/mod.rs"]
mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use support::{Fixture, golden, run};
use tokenizers::Tokenizer;

/// Folders that `save_pretrained` of two releases of transformers wrote: one tied in one file, one
/// untied in two with an index.
const FOLDERS: [&str; 2] = ["hf-tiny-5", "hf-tiny-4"];

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// Every tensor of every safetensors file in a folder, bit by bit.
fn tensors(folder: &Path) -> Tensors {
    let mut tensors = Tensors::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            let bytes = fs::read(path).unwrap();
            for (name, view) in SafeTensors::deserialize(&bytes).unwrap().iter() {
                let tensor = (view.dtype(), view.shape().to_vec(), view.data().to_vec());
                assert!(
                    tensors.insert(name.to_owned(), tensor).is_none(),
                    "{name} twice"
                );
            }
        }
    }
    tensors
}

#[track_caller]
fn assert_same(found: &Tensors, expected: &Tensors) {
    let names = |tensors: &Tensors| tensors.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(found), names(expected));
    for (name, tensor) in expected {
        assert!(found[name] == *tensor, "{name} differs");
    }
}

#[test]
fn import_export_import_is_bit_equal() {
    let fixture = Fixture::without_data();
    for name in FOLDERS {
        let original = tensors(&golden(name));
        let text = |suffix: &str| fixture.text(&format!("{name}{suffix}"));
        let [first, export, second, again] = ["-1", "-hf", "-2", "-hf-again"].map(text);
        let folder = golden(name);
        let source = folder.to_str().unwrap();
        run(&["convert", "from-hf", source, &first]).done();
        run(&["convert", "to-hf", &first, &export, "--dtype", "fp32"]).done();
        assert_same(&tensors(Path::new(&export)), &original);

        run(&["convert", "from-hf", &export, &second]).done();
        let weights = |checkpoint: &str| {
            let mut weights = tensors(Path::new(checkpoint));
            weights.retain(|_, (dtype, ..)| *dtype == Dtype::F32);
            weights
        };
        assert!(!weights(&first).is_empty());
        assert_same(&weights(&second), &weights(&first));

        // In small files with an index, too.
        let shards = ["--dtype", "fp32", "--max-shard-size", "40KB"];
        run(&[&["convert", "to-hf", &second, &again][..], &shards].concat()).done();
        assert!(
            Path::new(&again)
                .join("model.safetensors.index.json")
                .exists()
        );
        assert_same(&tensors(Path::new(&again)), &original);

        // The tokenizer travels unchanged, and the config keeps what the model computes with.
        for folder in [&export, &again] {
            let read = |file: &str| fs::read(Path::new(folder).join(file)).unwrap();
            let tokenizer = fs::read(golden(name).join("tokenizer.json")).unwrap();
            assert_eq!(read("tokenizer.json"), tokenizer);
            let config: Value = serde_json::from_slice(&read("config.json")).unwrap();
            let facts = facts(name);
            let theta = facts["model"]["rope_theta"].as_f64();
            assert_eq!(config["rope_theta"].as_f64(), theta);
            assert_eq!(config["tie_word_embeddings"], facts["model"]["tied"]);
        }
    }
}

#[test]
fn an_existing_output_is_left_alone() {
    let fixture = Fixture::without_data();
    let folder = golden("hf-tiny-5");
    let source = folder.to_str().unwrap();
    let out = fixture.text("out");
    fs::create_dir(&out).unwrap();
    fs::write(fixture.path("out/mine"), "").unwrap();
    run(&["convert", "from-hf", source, &out]).refused(1, &[&out, "exists already; remove it"]);
    assert_eq!(fixture.files(), ["out", "out/mine"]);
}

fn facts(name: &str) -> Value {
    let bytes = fs::read(golden(&format!("{name}.json"))).unwrap();
    serde_json::from_slice(&bytes).unwrap()
}

#[test]
fn greedy_generation_says_what_transformers_says() {
    let fixture = Fixture::without_data();
    for name in FOLDERS {
        let folder = golden(name);
        let tokenizer = Tokenizer::from_file(folder.join("tokenizer.json")).unwrap();
        let ids = |list: &Value| -> Vec<u32> {
            let ids = list.as_array().unwrap().iter();
            ids.map(|id| id.as_u64().unwrap() as u32).collect()
        };
        let greedy = &facts(name)["greedy"];
        let (prompt, continuation) = (ids(&greedy["prompt"]), ids(&greedy["continuation"]));
        let text = |ids: &[u32]| tokenizer.decode(ids, true).unwrap();
        let (source, checkpoint) = (folder.to_str().unwrap(), fixture.text(name));
        run(&["convert", "from-hf", source, &checkpoint]).done();
        let said = |model: &str, tokens: usize| {
            let tokens = tokens.to_string();
            let how = ["--temperature", "0", "--max-tokens", &tokens];
            let prompt = text(&prompt);
            run(&[&["generate", model, "--prompt", &prompt][..], &how].concat())
                .done()
                .stdout
        };
        let expected = |tokens: usize| {
            let all = [&prompt[..], &continuation[..tokens]].concat();
            format!("{}\n", text(&all))
        };
        assert_eq!(said(source, 16), expected(16), "{name}");
        // Some of these tokens are parts of characters; a shorter text ends elsewhere.
        assert_eq!(said(&checkpoint, 9), expected(9), "{name}, imported");

        let prompt = text(&prompt);
        let request = ["generate", source, "--prompt", &prompt];
        let long = run(&[&request[..], &["--max-tokens", "500"]].concat());
        let long = long.refused(1, &["and 500 more exceed", "ask for at most 106 tokens"]);
        assert_eq!(long.stdout, "");
    }
}

#[test]
fn inspect_tells_what_a_checkpoint_holds_and_verifies_it() {
    let fixture = Fixture::without_data();
    let (folder, checkpoint) = (golden("hf-tiny-5"), fixture.text("checkpoint"));
    run(&["convert", "from-hf", folder.to_str().unwrap(), &checkpoint]).done();
    let plain = run(&["inspect", &checkpoint]).done().stdout;
    for fact in [
        "run        imported",
        "step       0\n",
        "tensors    20, 53040 parameters",
        "model.layers.1.self_attn.k_proj.weight ",
        "[16, 48]",
        "master F32 in 1",
        "tokenizer.json",
    ] {
        assert!(plain.contains(fact), "no {fact:?} in:\n{plain}");
    }
    let verified = run(&["inspect", &checkpoint, "--verify"]).done().stdout;
    let more = verified.strip_prefix(&plain).unwrap();
    assert!(
        more.contains("chunks") && more.contains("all checksums are right"),
        "{more}"
    );
}
