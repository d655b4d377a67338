#![allow(clippy::unwrap_used)]

use std::fs;

use oxitron_trainer::metrics::{Event, MetricsWriter, StepRecord, StopReason};

use super::*;

const STEPS_PER_STAGE: u64 = 100;
const BATCH_TOKENS: u64 = 131_072;
const STAGES: [(&str, u64, f64); 4] = [
    ("4k", 4096, 1e4),
    ("8k", 8192, 5e4),
    ("16k", 16_384, 2.5e5),
    ("32k", 32_768, 1e6),
];

/// Noise between -1 and 1 that is the same on every machine.
fn noise(step: u64, salt: u64) -> f64 {
    let mut bits = (step ^ salt << 32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ bits >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (bits ^ bits >> 32) as u32 as f64 / f64::from(u32::MAX) * 2.0 - 1.0
}

/// The figures of a plausible step.
fn step(k: u64) -> StepRecord {
    let stage = ((k - 1) / STEPS_PER_STAGE).min(3);
    let (name, seq_len, _) = STAGES[stage as usize];
    let done = k as f64 / (4 * STEPS_PER_STAGE) as f64;
    let decay = 0.5 * (1.0 + (std::f64::consts::PI * done).cos());
    let tokens_per_second = 24_000.0 / (1.0 + 0.25 * stage as f64) * (1.0 + 0.03 * noise(k, 2));
    StepRecord {
        step: k,
        attempt: 0,
        stage: name.into(),
        seq_len,
        loss: 2.4 + 6.2 * (-(k as f64) / 45.0).exp() + 0.35 * decay + 0.09 * noise(k, 1),
        grad_norm: 0.4 + 2.5 * (-(k as f64) / 25.0).exp() + 0.1 * noise(k, 3).powi(3),
        lr: 6e-4 * (k as f64 / 20.0).min(1.0) * (0.1 + 0.9 * decay),
        tokens: k * BATCH_TOKENS,
        target_tokens: BATCH_TOKENS - 300,
        samples: BATCH_TOKENS / seq_len,
        tokens_per_second,
        tgs: tokens_per_second / 2.0,
        mfu: Some(0.38 + 0.01 * noise(k, 4)),
        mfu_full: Some(0.42),
        hfu: Some(0.45),
        step_seconds: BATCH_TOKENS as f64 / tokens_per_second,
        data_wait_seconds: 0.004,
        comm_seconds: 0.6,
        exposed_comm_seconds: 0.05,
        optimizer_seconds: 0.09,
        peak_bytes: 5 << 30,
        skipped: k == 231,
    }
}

/// A run of four stages that was killed at step 170, resumed at 150, and finished.
fn synthetic_run(run: &Path) {
    let mut writer = MetricsWriter::open(run, 1).unwrap();
    writer.event(Event::Start {
        run_id: "0f3a".into(),
        world: 2,
        version: "0.1.0".into(),
    });
    let walk = |writer: &mut MetricsWriter, from: u64, to: u64| {
        for k in from..=to {
            let (stage, seq_len, rope_base) = STAGES[((k - 1) / STEPS_PER_STAGE) as usize];
            if k % STEPS_PER_STAGE == 1 {
                let before = ((k - 1) / STEPS_PER_STAGE).checked_sub(1);
                let from = before.map(|index| STAGES[index as usize].0.to_owned());
                let (step, tokens, to) = (k - 1, (k - 1) * BATCH_TOKENS, stage.to_owned());
                let switch = Event::StageSwitch {
                    step,
                    tokens,
                    from,
                    to,
                    seq_len,
                    rope_base,
                };
                writer.event(switch);
            }
            let record = step(k);
            writer.step(&record);
            let tokens = record.tokens;
            if k % 25 == 0 {
                let loss = 2.55 + 6.2 * (-(k as f64) / 45.0).exp() + 0.2 / (k as f64 / 100.0);
                let (step, stage) = (k, stage.to_owned());
                let (target_tokens, seconds) = (60_000, 1.9);
                let event = Event::Validation {
                    step,
                    tokens,
                    stage,
                    loss,
                    target_tokens,
                    seconds,
                };
                writer.event(event);
            }
            if k % 50 == 0 {
                let checkpoint = format!("checkpoints/step-{k:08}");
                let (step, bytes, seconds) = (k, 512 << 20, 0.8);
                writer.event(Event::SaveDurable {
                    step,
                    checkpoint,
                    bytes,
                    seconds,
                });
            }
        }
    };
    walk(&mut writer, 1, 170);
    let mut writer = MetricsWriter::open(run, 2).unwrap();
    let checkpoint = "checkpoints/step-00000150".to_owned();
    let tokens = 150 * BATCH_TOKENS;
    writer.event(Event::Resume {
        step: 150,
        tokens,
        checkpoint,
        world: 2,
    });
    walk(&mut writer, 151, 400);
    let (step, reason) = (400, StopReason::Finished);
    writer.event(Event::Stop {
        step,
        reason,
        detail: None,
    });
    fs::write(
        run.join("config.toml"),
        "[run]\nname = \"synthetic\" # </pre><script>alert('config')</script>\nseed = 17\n\n\
         [model]\npreset = \"demo\"\ndtype = \"bf16\"\n",
    )
    .unwrap();
}

/// Reports `run` and returns the page, what went to the terminal, and the warnings.
fn reported(run: &Path) -> Result<(String, String, String)> {
    let (mut out, mut warnings) = (Vec::new(), Vec::new());
    report(run, &mut out, &mut warnings)?;
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ok((
        fs::read_to_string(run.join(REPORT_FILE)).unwrap(),
        text(out),
        text(warnings),
    ))
}

/// To look at the page in a browser, name a new folder to keep the run in:
/// `OXITRON_KEEP_RUN=/tmp/run cargo test --release -p oxitron report`.
#[test]
fn a_run_becomes_a_table_and_a_page() {
    let folder = tempfile::tempdir().unwrap();
    let kept = std::env::var_os("OXITRON_KEEP_RUN").map(PathBuf::from);
    let run = kept.unwrap_or_else(|| folder.path().join("tiny & <b>bold</b>"));
    assert!(
        !run.exists(),
        "{}: name a folder that does not exist yet",
        run.display()
    );
    synthetic_run(&run);
    let (page, out, warnings) = reported(&run).unwrap();
    assert_eq!(warnings, "");

    let rows: Vec<Vec<&str>> = out
        .lines()
        .map(|l| l.split_whitespace().collect())
        .collect();
    assert_eq!(rows[2][..5], ["4k", "4,096", "10,000", "100", "13.1M"]);
    assert_eq!(rows[5][..5], ["32k", "32,768", "1,000,000", "100", "13.1M"]);
    assert!(
        out.contains("curves: ") && out.contains("report.html"),
        "{out}"
    );

    for id in ["loss", "rate", "speed", "norm"] {
        assert!(
            page.contains(&format!("<figure class=\"chart {id}\"")),
            "{id}"
        );
    }
    assert_eq!(
        page.matches("<rect class=\"band\"").count(),
        4 * STAGES.len()
    );
    assert_eq!(page.matches("class=\"mark resume\"").count(), 4);
    // Eight saves; the one at step 150 happened once, because the resume began there.
    assert_eq!(page.matches("class=\"mark checkpoint\"").count(), 4 * 8);
    assert_eq!(page.matches("class=\"mark skip\"").count(), 4);
    assert!(page.contains("Finished after step 400"));
}

#[test]
fn the_page_asks_nobody_and_runs_nothing_of_others() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("<img src=x onerror=alert(1)>");
    synthetic_run(&run);
    let evil = "<script>alert('event')</script>";
    let mut writer = MetricsWriter::open(&run, 3).unwrap();
    writer.event(Event::Restart {
        restarts: 1,
        failed_rank: Some(1),
        reason: evil.into(),
    });
    writer.step(&StepRecord {
        stage: "\"><svg onload=alert(2)>".into(),
        ..step(401)
    });
    let (page, _, _) = reported(&run).unwrap();
    assert_eq!(page.matches("<script").count(), 1, "only the page's own");
    for text in ["<img", "<svg onload", "</pre><script", "alert('"] {
        assert!(!page.contains(text), "{text}");
    }
    for text in ["http:", "https:", "url(", "@import", "src="] {
        let count = page.matches(text).count();
        // The run's name, escaped, is the only place where one of these words may stand.
        assert_eq!(
            count,
            page.matches("&lt;img src=x").count() * usize::from(text == "src=")
        );
    }
}

#[test]
fn one_step_and_figures_that_are_not_finite_make_a_page() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = MetricsWriter::open(folder.path(), 1).unwrap();
    let odd = StepRecord {
        loss: f64::NAN,
        grad_norm: f64::INFINITY,
        tokens: 0,
        ..step(1)
    };
    writer.step(&odd);
    let (page, out, warnings) = reported(folder.path()).unwrap();
    let attributes = page.split('"').skip(1).step_by(2);
    let is_place = |text: &&str| text.contains('%') || text.starts_with('M');
    let places: Vec<&str> = attributes.filter(is_place).collect();
    assert!(
        places.iter().any(|place| place.starts_with("M0.00")),
        "paths were looked at"
    );
    assert!(
        places
            .iter()
            .all(|place| !place.contains("NaN") && !place.contains("inf"))
    );
    assert!(out.contains("4k"), "{out}");
    assert!(warnings.contains("shows no config"), "{warnings}");
    writer.step(&StepRecord {
        loss: 3.0,
        ..step(2)
    });
    assert!(reported(folder.path()).is_ok());
}

#[test]
fn a_run_that_cannot_be_reported_says_why_and_leaves_no_page() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path();
    let message = |run: &Path| reported(run).unwrap_err().to_string();
    assert!(message(&run.join("none")).contains("no such folder"));
    assert!(message(run).contains("neither metrics.jsonl nor events.jsonl"));
    drop(MetricsWriter::open(run, 1).unwrap());
    assert!(message(run).contains("has not finished a step yet"));
    fs::write(run.join("metrics.jsonl"), "{\"step\":1}\n").unwrap();
    assert!(message(run).contains("metrics.jsonl, line 1: expected the record of a step"));
    assert!(!run.join(REPORT_FILE).exists());
}

#[test]
fn a_long_run_stays_a_small_page() {
    let folder = tempfile::tempdir().unwrap();
    let mut lines = String::new();
    for k in 1..=20_000 {
        let record = StepRecord {
            step: k,
            attempt: 1,
            tokens: k * 1000,
            ..step(k)
        };
        lines.push_str(&(serde_json::to_string(&record).unwrap() + "\n"));
    }
    fs::write(folder.path().join("metrics.jsonl"), lines).unwrap();
    let (page, _, warnings) = reported(folder.path()).unwrap();
    assert!(page.len() < 300_000, "{} bytes", page.len());
    assert!(warnings.contains("events.jsonl: is missing"), "{warnings}");
}
