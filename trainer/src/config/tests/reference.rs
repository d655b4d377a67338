//! The reference page against the key table.

use std::path::Path;

use super::load_with;
use crate::config::{ScheduleKind, reference};

const PAGE: &str = "../docs/src/config.md";

/// The page with the tables of the code put between the markers of each section.
fn with_tables(page: &str) -> String {
    let mut page = page.to_owned();
    for (section, table) in reference() {
        let marker = format!("<!-- keys: {section} -->\n");
        let start = page.find(&marker).map(|at| at + marker.len());
        let start = start.unwrap_or_else(|| panic!("the page has no marker {marker}"));
        let end = start + page[start..].find("<!-- end -->").expect("an end marker");
        page.replace_range(start..end, &format!("\n{table}\n"));
    }
    page
}

/// Every key, type, default, unit and meaning of the page is the one of the code, and the reverse.
/// `OXITRON_BLESS=1` writes the tables instead.
#[test]
fn the_page_has_exactly_the_keys_of_the_code() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(PAGE);
    let page = std::fs::read_to_string(&path).unwrap();
    let expected = with_tables(&page);
    if std::env::var_os("OXITRON_BLESS").is_some() {
        std::fs::write(&path, &expected).unwrap();
        return;
    }
    let markers = page.matches("<!-- keys: ").count();
    assert_eq!(markers, reference().len(), "a marker without a section");
    for (found, wanted) in page.lines().zip(expected.lines()) {
        assert_eq!(
            found, wanted,
            "run the test with OXITRON_BLESS=1 to rewrite the tables"
        );
    }
    assert_eq!(
        page, expected,
        "run the test with OXITRON_BLESS=1 to rewrite the tables"
    );
}

/// The example of the page is a config.
#[test]
fn the_example_of_the_page_loads() {
    let page = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(PAGE)).unwrap();
    let start = page.find("```toml\n").unwrap() + "```toml\n".len();
    let example = &page[start..start + page[start..].find("```").unwrap()];
    load_with(example, &[]).unwrap();
}

/// Every choice of the key table is one that the types know.
#[test]
fn every_choice_is_a_value_of_its_type() {
    let choices = [
        ("run.device", &["auto", "cpu"][..]),
        ("model.family", &["llama"]),
        ("model.dtype", &["auto", "bf16", "fp32"]),
        ("model.residual_dtype", &["fp32", "bf16"]),
        ("parallel.shard_size", &["node", "world"]),
        ("parallel.grad_reduce_dtype", &["fp32", "bf16"]),
        ("parallel.recompute", &["none", "attention", "full"]),
        ("data.packing", &["concat"]),
        (
            "optimizer.schedule",
            &["cosine", "linear", "constant", "wsd"],
        ),
        ("optimizer.decay_shape", &["sqrt", "linear", "cosine"]),
        ("optimizer.moments_dtype", &["fp32", "bf16"]),
        ("checkpoint.when_busy", &["wait", "skip"]),
        ("guard.spike_policy", &["off", "skip", "rollback"]),
        ("stage.0.optimizer", &["keep", "reset"]),
    ];
    let table: String = reference().into_iter().map(|(_, table)| table).collect();
    for (key, values) in choices {
        for value in values {
            assert!(
                table.contains(&format!("`\"{value}\"`")),
                "{value} is not in the reference"
            );
            let config = load_with(super::MINIMAL, &[&format!("{key}={value}")]).unwrap();
            let resolved: toml::Table = config.resolved_toml().unwrap().parse().unwrap();
            let resolved = toml::Value::Table(resolved);
            let mut found = &resolved;
            for segment in key.split('.') {
                found = match segment.parse::<usize>() {
                    Ok(index) => &found[index],
                    Err(_) => &found[segment],
                };
            }
            assert_eq!(found.as_str(), Some(*value), "{key}");
        }
    }
    let config = load_with(super::MINIMAL, &["stage.0.schedule=wsd"]).unwrap();
    assert_eq!(config.stages[0].schedule, ScheduleKind::Wsd);
}
