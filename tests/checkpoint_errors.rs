//! Checkpoints that are damaged, of another model, or of a run with another configuration: what is
//! said, and that nothing is touched.

#![allow(clippy::unwrap_used)]

#[path = "support/mod.rs"]
mod support;

use std::fs;

use support::{Fixture, ONE_STAGE, cut, golden, run, train};

#[test]
fn checkpoints_that_are_damaged_or_of_another_model_are_refused() {
    let fixture = Fixture::new();
    let config = fixture.config(ONE_STAGE);
    train(&config, &[]).done();
    let checkpoint = fixture.text("run/checkpoints/step-00000006");
    let payload = fixture.path("run/checkpoints/step-00000006/part-00000.1-1-6.safetensors");
    let name = payload.to_str().unwrap();
    let other = ["--set", "model.intermediate_size=96"];

    // Another configuration than the run's, in its own folder; and the same, insisted on.
    let before = fixture.files();
    train(&config, &other).refused(
        2,
        &[
            &fixture.text("run"),
            "model.intermediate_size: 176 → 96",
            "under another run.name or run.dir, or pass --allow-config-change",
        ],
    );
    let says = [
        &*checkpoint,
        "holds another model",
        "mlp.gate_proj.weight",
        "check [model]",
    ];
    train(&config, &[&other[..], &["--allow-config-change"]].concat()).refused(1, &says);
    assert_eq!(fixture.files(), before);

    // Weights of another model for a new run: a checkpoint, a Hugging Face folder.
    let new = ["--set", "run.dir=new", "--set"];
    let from = format!("model.init_from={checkpoint}");
    train(&config, &[&new[..], &[&from], &other].concat()).refused(1, &says);
    let hf = golden("hf-tiny-5");
    let from = format!("model.init_from={}", hf.display());
    train(&config, &[&new[..], &[&from]].concat()).refused(
        2,
        &[
            "hf-tiny-5",
            "model.embed_tokens.weight",
            "make [model] agree",
        ],
    );
    assert!(!fixture.path("new/metrics.jsonl").exists());
    assert!(!fixture.path("new/dataset.lock").exists());

    // A payload file cut short, then one of the right length with a wrong byte, then the manifest.
    let whole = fs::read(&payload).unwrap();
    let (out, short) = (fixture.text("out"), whole.len() as u64 / 2);
    let still_refused = |phrases: &[&str]| {
        train(&config, &[]).refused(1, phrases);
        assert_eq!(fixture.metrics().len(), 6);
    };
    cut(&payload, short);
    let says = [
        name,
        "bytes expected",
        "cut short",
        "use another checkpoint of the run or copy",
    ];
    run(&["inspect", &checkpoint]).refused(1, &says);
    run(&["convert", "to-hf", &checkpoint, &out]).refused(1, &says);
    run(&["generate", &checkpoint, "--prompt", "the"]).refused(1, &says);
    still_refused(&[&says[..], &["move this folder away to begin the run anew"]].concat());

    let mut wrong = whole.clone();
    wrong[whole.len() / 2] ^= 1;
    fs::write(&payload, wrong).unwrap();
    let says = [
        name,
        "have checksum",
        "the file is damaged: use another checkpoint",
    ];
    run(&["inspect", &checkpoint]).done();
    run(&["inspect", &checkpoint, "--verify"]).refused(1, &says);
    run(&["convert", "to-hf", &checkpoint, &out]).refused(1, &says);
    still_refused(&says);
    // Whoever says so reads it all the same.
    let unverified = fixture.text("unverified");
    run(&["convert", "to-hf", &checkpoint, &unverified, "--no-verify"]).done();
    let generate = ["generate", &checkpoint, "--prompt", "the"];
    run(&[&generate[..], &["--max-tokens", "2"]].concat()).refused(1, &says);
    run(&[&generate[..], &["--max-tokens", "2", "--no-verify"]].concat()).done();
    train(&config, &["--no-verify"]).done();
    fs::write(&payload, whole).unwrap();

    let manifest = fixture.path("run/checkpoints/step-00000006/manifest.json");
    let sound = fs::read(&manifest).unwrap();
    cut(&manifest, sound.len() as u64 / 2);
    let says = [
        "manifest.json: the manifest is damaged",
        "use another checkpoint of the run",
    ];
    run(&["inspect", &checkpoint]).refused(1, &says);
    still_refused(&says);
    assert!(!fixture.path("out").exists());

    fs::write(&manifest, sound).unwrap();
    train(&config, &[]).done();
    assert_eq!(fixture.metrics().len(), 6);
    run(&["inspect", &checkpoint, "--verify"]).done();
}
