//! `--set a.b=c`: one key changed from the command line.
//!
//! The path is the key's path, with a position (from 0) for a `[[stage]]` or a `[[data.source]]`:
//! `--set stage.0.seq_len=8192`. The value is read as TOML; what is not TOML is taken as a string,
//! so that `--set run.name=first` needs no quotes inside quotes. A later `--set` wins over an
//! earlier one, and all of them win over the file. Unknown keys and wrong types are found by the
//! same check as those of the file.

use super::error::ConfigError;
use super::source::{Layer, Origin, Sources};
use super::tree::{Entry, Node, Table, Value, parse_value};

/// Applies one `--set` to the tree of the file.
pub(super) fn apply(root: &mut Node, set: &str, sources: &mut Sources) -> Result<(), ConfigError> {
    let source = sources.add("--set", set, Layer::Set);
    let at = |start: usize, end: usize| Origin {
        source: Some(source),
        span: start..end,
    };
    let malformed = |origin: &Origin, message: String| {
        sources.problem(
            origin,
            message,
            "write `--set key=value`, such as `--set run.seed=7`",
        )
    };

    let Some(equals) = set.find('=') else {
        return Err(malformed(&at(0, set.len()), "a `--set` without `=`".to_owned()).into());
    };
    let path = &set[..equals];
    let text = set[equals + 1..].trim();
    let start = set.len() - set[equals + 1..].trim_start().len();
    let value_origin = at(start, start + text.len());
    let node = parse_value(text, source, start, sources)?.unwrap_or_else(|| Node {
        value: Value::Text(text.to_owned()),
        origin: value_origin,
    });

    let mut segments = Vec::new();
    let mut start = 0;
    for segment in path.split('.') {
        let name = segment.trim();
        if name.is_empty() {
            let message = format!("the key `{path}` has an empty part");
            return Err(malformed(&at(0, equals), message).into());
        }
        segments.push((name, at(start, start + segment.len())));
        start += segment.len() + 1;
    }
    insert(root, &segments, String::new(), node, sources)
}

/// Walks down, making tables where there are none, and puts the node at the end of the path.
fn insert(
    parent: &mut Node,
    path: &[(&str, Origin)],
    walked: String,
    node: Node,
    sources: &Sources,
) -> Result<(), ConfigError> {
    let Some(((name, origin), rest)) = path.split_first() else {
        *parent = node;
        return Ok(());
    };
    let here = if walked.is_empty() {
        (*name).to_owned()
    } else {
        format!("{walked}.{name}")
    };
    let found = parent.describe();
    match &mut parent.value {
        Value::List(list) => {
            let count = list.len();
            let position = name.parse::<usize>().ok();
            let Some(child) = position.and_then(|index| list.get_mut(index)) else {
                let message = format!("`{here}` does not exist: `{walked}` has {count} entries");
                let help = match count {
                    0 => format!("add a `[[{walked}]]` to the config file first"),
                    _ => format!("use a position from 0 to {}", count - 1),
                };
                return Err(sources.problem(origin, message, help).into());
            };
            insert(child, rest, here, node, sources)
        }
        Value::Table(table) => {
            let entry = table.entry((*name).to_owned()).or_insert_with(|| Entry {
                key: origin.clone(),
                node: Node {
                    value: Value::Table(Table::new()),
                    origin: origin.clone(),
                },
            });
            if rest.is_empty() {
                entry.key = origin.clone();
            }
            insert(&mut entry.node, rest, here, node, sources)
        }
        _ => {
            let message = format!("`{walked}` is {found}; it has no key `{name}`");
            Err(sources
                .problem(origin, message, format!("set `{walked}` itself"))
                .into())
        }
    }
}
