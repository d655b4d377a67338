//! Fills a checked tree: preset, defaults, derived values, absolute paths.
//!
//! Afterwards every key that is not optional is there, so that the tree turns into typed structs
//! without further rules. Values keep the place they were written at; one that was inherited keeps
//! the place of the value it came from.

use std::path::Path;

use super::error::{ConfigError, Problem, refuse_if_any};
use super::keys;
use super::presets::{self, PRESETS};
use super::schema::{Fallback, Key, Kind, join, may_be_in_name, nearest};
use super::source::{Layer, Origin, Sources};
use super::tree::{Entry, Node, Table, Value, parse_document, parse_value};

/// Fills the tree of a config called `name` whose relative paths start from `folder`.
pub(super) fn resolve(
    root: &mut Node,
    name: &Path,
    folder: &Path,
    sources: &mut Sources,
) -> Result<(), ConfigError> {
    apply_preset(root, sources)?;
    require(root, name, sources)?;
    fill(root, keys::ROOT, sources)?;
    inherit(root);
    run_defaults(root, name);
    super::derive::derive(root, sources)?;
    make_paths_absolute(root, keys::ROOT, folder)?;
    place_inside_run_dir(root);
    Ok(())
}

/// Puts a value under a key that is absent.
pub(super) fn insert_default(table: &mut Table, key: &str, node: Node) {
    let entry = Entry {
        key: Origin::default(),
        node,
    };
    table.entry(key.to_owned()).or_insert(entry);
}

fn apply_preset(root: &mut Node, sources: &mut Sources) -> Result<(), ConfigError> {
    let Some(asked) = root.get("model.preset") else {
        return Ok(());
    };
    let name = asked.text().unwrap_or_default().to_owned();
    let Some(preset) = presets::find(&name) else {
        let known: Vec<&str> = PRESETS.iter().map(|preset| preset.name).collect();
        let help = match nearest(&name, known.iter().copied()) {
            Some(near) => format!(
                "did you mean {near:?}? The presets are: {}",
                known.join(", ")
            ),
            None => format!("the presets are: {}", known.join(", ")),
        };
        let message = format!("`model.preset` is {name:?}, which is not a preset");
        return Err(sources.problem(&asked.origin, message, help).into());
    };
    let source = sources.add(format!("preset {name}"), preset.text, Layer::Preset);
    let tree = parse_document(preset.text, source, sources)?;
    super::schema::check(&tree, keys::ROOT, sources)?;
    let preset = tree
        .get("model")
        .and_then(Node::table)
        .cloned()
        .unwrap_or_default();
    if let Some(model) = section_mut(root, "model") {
        for (key, entry) in preset {
            model.entry(key).or_insert(entry);
        }
    }
    Ok(())
}

/// Refuses a tree that lacks required sections or keys.
fn require(root: &Node, name: &Path, sources: &Sources) -> Result<(), ConfigError> {
    let missing = keys::ROOT
        .iter()
        .filter(|key| is_missing(key, root.get(key.name)));
    let problem = |key: &Key| Problem {
        message: format!(
            "{}: the section {} is missing",
            name.display(),
            header(key, key.name)
        ),
        place: None,
        help: format!("add {}", how_to_add(key, key.name)),
    };
    refuse_if_any(missing.map(problem).collect())?;
    let mut problems = Vec::new();
    require_keys(root, keys::ROOT, "", sources, &mut problems);
    refuse_if_any(problems)
}

fn is_missing(key: &Key, node: Option<&Node>) -> bool {
    let absent = match (key.kind, node) {
        (Kind::Sections(_), Some(node)) => node.items().is_empty(),
        (_, node) => node.is_none(),
    };
    absent && matches!(key.fallback, Fallback::Required)
}

/// The key as it stands in a file: `[model]`, `[[data.source]]` or `seq_len`, in backticks.
fn header(key: &Key, path: &str) -> String {
    match key.kind {
        Kind::Section(_) => format!("`[{path}]`"),
        Kind::Sections(_) => format!("`[[{path}]]`"),
        _ => format!("`{}`", key.name),
    }
}

fn how_to_add(key: &Key, path: &str) -> String {
    let header = header(key, path);
    let (Kind::Section(inner) | Kind::Sections(inner)) = key.kind else {
        return format!("{header} ({})", key.kind.describe());
    };
    if path == "model" {
        return format!("{header} with a `preset`, or with all sizes");
    }
    let required = inner
        .iter()
        .filter(|key| matches!(key.fallback, Fallback::Required));
    let required: Vec<String> = required
        .map(|key| self::header(key, &join(path, key.name)))
        .collect();
    format!("{header} with {}", required.join(", "))
}

fn require_keys(
    node: &Node,
    keys: &[Key],
    path: &str,
    sources: &Sources,
    problems: &mut Vec<Problem>,
) {
    let mut missing = Vec::new();
    for key in keys {
        let child = node.get(key.name);
        let path = join(path, key.name);
        if is_missing(key, child) {
            missing.push(key);
            continue;
        }
        match (key.kind, child) {
            (Kind::Section(keys), Some(child)) => {
                require_keys(child, keys, &path, sources, problems);
            }
            (Kind::Sections(keys), Some(child)) => {
                for (index, item) in child.items().iter().enumerate() {
                    require_keys(item, keys, &format!("{path}.{index}"), sources, problems);
                }
            }
            _ => {}
        }
    }
    if missing.is_empty() {
        return;
    }
    let list = |text: fn(&Key, &str) -> String| -> String {
        let texts: Vec<String> = missing
            .iter()
            .map(|key| text(key, &join(path, key.name)))
            .collect();
        texts.join(", ")
    };
    let preset = if path == "model" {
        "; or take all sizes from a `preset`"
    } else {
        ""
    };
    let message = format!("`{path}` lacks {}", list(header));
    let help = format!("add {}{preset}", list(how_to_add));
    problems.push(sources.problem(&node.origin, message, help));
}

/// Writes the defaults that are plain values, and the sections that are absent.
fn fill(node: &mut Node, keys: &[Key], sources: &mut Sources) -> Result<(), ConfigError> {
    for key in keys {
        let Some(table) = node.table_mut() else {
            return Ok(());
        };
        match (key.kind, key.fallback) {
            (Kind::Section(keys), _) => {
                insert_default(
                    table,
                    key.name,
                    Node::default_value(Value::Table(Table::new())),
                );
                if let Some(entry) = table.get_mut(key.name) {
                    fill(&mut entry.node, keys, sources)?;
                }
            }
            (Kind::Sections(keys), _) => {
                if let Some(entry) = table.get_mut(key.name) {
                    for item in entry.node.items_mut() {
                        fill(item, keys, sources)?;
                    }
                }
            }
            (_, Fallback::Is(text)) if !table.contains_key(key.name) => {
                let source = sources.add("default", text, Layer::Default);
                if let Some(mut node) = parse_value(text, source, 0, sources)? {
                    node.origin = Origin::default();
                    insert_default(table, key.name, node);
                }
            }
            _ => {}
        }
    }
    Ok(())
}

/// Copies the values that are taken from another key: within `[model]`, and from `[model]` and
/// `[optimizer]` to each stage.
fn inherit(root: &mut Node) {
    let before = root.clone();
    let copy = |table: &mut Table, keys: &[Key], from: &Node| {
        for key in keys {
            if let Fallback::From(path) = key.fallback
                && let Some(node) = from.get(path)
            {
                insert_default(table, key.name, node.clone());
            }
        }
    };
    if let Some(model) = section_mut(root, "model") {
        copy(model, keys::MODEL, &before);
    }
    for stage in sections_mut(root, "stage") {
        if let Some(stage) = stage.table_mut() {
            copy(stage, keys::STAGE, &before);
        }
    }
}

fn run_defaults(root: &mut Node, name: &Path) {
    let stem = name
        .file_stem()
        .and_then(|stem| stem.to_str())
        .unwrap_or("run");
    let stem: String = stem
        .chars()
        .map(|c| if may_be_in_name(c) { c } else { '-' })
        .collect();
    let stem = stem.trim_start_matches('.');
    let stem = if stem.is_empty() { "run" } else { stem };
    let Some(run) = section_mut(root, "run") else {
        return;
    };
    insert_default(
        run,
        "name",
        Node::default_value(Value::Text(stem.to_owned())),
    );
    let name = run
        .get("name")
        .and_then(|entry| entry.node.text())
        .unwrap_or(stem);
    let dir = format!("runs/{name}");
    insert_default(run, "dir", Node::default_value(Value::Text(dir)));
}

/// The paths that lie in the run directory unless they are given.
fn place_inside_run_dir(root: &mut Node) {
    let dir = root
        .get("run.dir")
        .and_then(Node::text)
        .unwrap_or_default()
        .to_owned();
    for (section, key, file) in [
        ("data", "lock", "dataset.lock"),
        ("checkpoint", "dir", "checkpoints"),
    ] {
        if let Some(table) = section_mut(root, section) {
            let path = format!("{}/{file}", dir.trim_end_matches('/'));
            insert_default(table, key, Node::default_value(Value::Text(path)));
        }
    }
}

fn make_paths_absolute(node: &mut Node, keys: &[Key], folder: &Path) -> Result<(), ConfigError> {
    for key in keys {
        let Some(entry) = node.table_mut().and_then(|table| table.get_mut(key.name)) else {
            continue;
        };
        let node = &mut entry.node;
        match (key.kind, &mut node.value) {
            (Kind::Section(keys), _) => make_paths_absolute(node, keys, folder)?,
            (Kind::Sections(keys), Value::List(list)) => {
                for item in list {
                    make_paths_absolute(item, keys, folder)?;
                }
            }
            (Kind::Path, Value::Text(text)) => *text = absolute(folder, text, false)?,
            (Kind::FilePattern, Value::Text(text)) => *text = absolute(folder, text, true)?,
            _ => {}
        }
    }
    Ok(())
}

/// Joins a path to the folder of the config file and removes `.` and `..`.
///
/// In a file pattern the folder's own `*`, `?` and `[` are escaped: they are characters of a name.
fn absolute(folder: &Path, path: &str, pattern: bool) -> Result<String, ConfigError> {
    if Path::new(path).is_absolute() {
        return Ok(path.to_owned());
    }
    let Some(folder) = folder.to_str() else {
        return Err(Problem {
            message: format!("the path {} is not UTF-8", folder.display()),
            place: None,
            help: "move the config file into a folder whose path is UTF-8".to_owned(),
        }
        .into());
    };
    let folder = if pattern {
        escape_pattern(folder)
    } else {
        folder.to_owned()
    };
    let mut parts: Vec<&str> = folder.split('/').filter(|part| !part.is_empty()).collect();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            other => parts.push(other),
        }
    }
    Ok(format!("/{}", parts.join("/")))
}

fn escape_pattern(text: &str) -> String {
    let mut escaped = String::new();
    for c in text.chars() {
        match c {
            '*' | '?' | '[' => escaped.extend(['[', c, ']']),
            _ => escaped.push(c),
        }
    }
    escaped
}

/// A section's entries.
pub(super) fn section_mut<'a>(root: &'a mut Node, name: &str) -> Option<&'a mut Table> {
    root.table_mut()?.get_mut(name)?.node.table_mut()
}

/// The elements of a list of sections.
pub(super) fn sections_mut<'a>(root: &'a mut Node, name: &str) -> &'a mut [Node] {
    match root.table_mut().and_then(|table| table.get_mut(name)) {
        Some(entry) => entry.node.items_mut(),
        None => &mut [],
    }
}
