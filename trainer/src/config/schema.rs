//! What a key may hold, and the check of a tree against the table of all keys.
//!
//! The table itself is in [`super::keys`]. One entry there is the only declaration of a key's name,
//! type, range, default and meaning: this check, the defaults and the reference page
//! (`docs/src/config.md`, compared by a test) all read it.

use super::error::{ConfigError, Problem, refuse_if_any};
use super::source::{Origin, Sources};
use super::time_span::TimeSpan;
use super::tree::{Node, Table, Value};

/// One key of a section.
#[derive(Debug)]
pub(super) struct Key {
    pub name: &'static str,
    pub kind: Kind,
    pub fallback: Fallback,
    /// Unit of a number, or nothing.
    pub unit: &'static str,
    /// One sentence for the reference page, in Markdown.
    pub meaning: &'static str,
}

/// What a key holds.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    /// A whole number in this range, ends included.
    Integer(u64, u64),
    /// A finite number, whole or not.
    Number(Bounds),
    /// Two numbers in a list.
    Pair(Bounds),
    /// Two whole numbers of this range in a list; which of them is greater is not looked at here.
    IntegerPair(u64, u64),
    /// A list of such pairs.
    IntegerPairs(u64, u64),
    /// A length of time: a text such as `11h30m`, or a whole number of seconds.
    TimeSpan,
    Boolean,
    /// A name used in paths and tables: letters, digits, `_`, `-` and `.`, not beginning with `.`.
    Name,
    Text,
    /// A file or folder.
    Path,
    /// A file, or a pattern that files match.
    FilePattern,
    /// A list of patterns for tensor names.
    Patterns,
    /// One of these strings.
    Choice(&'static [&'static str]),
    /// One of these strings, or a whole number in this range, ends included.
    ChoiceOrInteger(&'static [&'static str], u64, u64),
    /// A table from a name to a share.
    Shares,
    /// `[name]`
    Section(&'static [Key]),
    /// `[[name]]`, at least one.
    Sections(&'static [Key]),
}

/// The numbers allowed.
#[derive(Debug, Clone, Copy)]
pub(super) enum Bounds {
    /// Greater than 0.
    Positive,
    /// 0 or greater.
    NotNegative,
    /// From 0 to 1, ends included.
    UpToOne,
    /// From 0, less than 1.
    BelowOne,
    /// Greater than 1.
    AboveOne,
}

/// What holds when a key is absent.
#[derive(Debug, Clone, Copy)]
pub(super) enum Fallback {
    /// The key must be there.
    Required,
    /// This value, as TOML.
    Is(&'static str),
    /// The value of another key (full path).
    From(&'static str),
    /// What the rule says (Markdown); computed in [`super::resolve`].
    Rule(&'static str),
    /// The key stays absent, which means this (Markdown).
    Absent(&'static str),
}

impl Bounds {
    fn allow(self, number: f64) -> bool {
        number.is_finite()
            && match self {
                Self::Positive => number > 0.0,
                Self::NotNegative => number >= 0.0,
                Self::UpToOne => (0.0..=1.0).contains(&number),
                Self::BelowOne => (0.0..1.0).contains(&number),
                Self::AboveOne => number > 1.0,
            }
    }

    /// The range in symbols.
    pub fn describe(self) -> &'static str {
        match self {
            Self::Positive => "> 0",
            Self::NotNegative => "≥ 0",
            Self::UpToOne => "from 0 to 1",
            Self::BelowOne => "≥ 0 and < 1",
            Self::AboveOne => "> 1",
        }
    }
}

impl Kind {
    /// What the key must be, for messages and for the reference page.
    pub fn describe(self) -> String {
        match self {
            Self::Integer(low, high) if low == high => format!("{low}"),
            Self::Integer(low, high) => format!("a whole number from {low} to {high}"),
            Self::Number(bounds) => format!("a number {}", bounds.describe()),
            Self::Pair(bounds) => format!("a list of two numbers, each {}", bounds.describe()),
            Self::IntegerPair(low, high) => {
                format!("a list of two whole numbers from {low} to {high}")
            }
            Self::IntegerPairs(low, high) => {
                format!("a list of pairs of whole numbers from {low} to {high}")
            }
            Self::TimeSpan => "a length of time such as `\"11h30m\"`, or whole seconds".to_owned(),
            Self::Boolean => "true or false".to_owned(),
            Self::Name => "a name (string of letters, digits, `_`, `-`, `.`)".to_owned(),
            Self::Text => "a string".to_owned(),
            Self::Path => "a path (string)".to_owned(),
            Self::FilePattern => "a path or file pattern (string)".to_owned(),
            Self::Patterns => "a list of patterns (strings)".to_owned(),
            Self::Choice(choices) => {
                let quoted: Vec<String> = choices.iter().map(|c| format!("{c:?}")).collect();
                match quoted.split_last() {
                    Some((last, rest)) if !rest.is_empty() => {
                        format!("{} or {last}", rest.join(", "))
                    }
                    _ => quoted.concat(),
                }
            }
            Self::ChoiceOrInteger(choices, low, high) => {
                let quoted: Vec<String> = choices.iter().map(|c| format!("{c:?}")).collect();
                let number = Self::Integer(low, high).describe();
                format!("{} or {number}", quoted.join(", "))
            }
            Self::Shares => "a table from source names to numbers ≥ 0".to_owned(),
            Self::Section(_) => "a table".to_owned(),
            Self::Sections(_) => "a list of tables".to_owned(),
        }
    }
}

/// Refuses unknown keys and values of a wrong type or out of range; reports all of them, in the
/// order of the text. Absent keys are not looked at.
pub(super) fn check(root: &Node, keys: &[Key], sources: &Sources) -> Result<(), ConfigError> {
    let mut check = Check {
        sources,
        problems: Vec::new(),
    };
    match root.table() {
        Some(table) => check.section(table, keys, ""),
        None => check.wrong(root, "", "a table"),
    }
    refuse_if_any(check.problems)
}

/// Joins a section's path and a key.
pub(super) fn join(section: &str, key: &str) -> String {
    if section.is_empty() {
        key.to_owned()
    } else {
        format!("{section}.{key}")
    }
}

/// The candidate nearest to a misspelt name, if one is near enough to be meant.
pub(super) fn nearest<'a>(
    name: &str,
    candidates: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    // Jaro-Winkler likes a shared beginning (`warmup` for `warmup_steps`) but is harsh on short
    // names with two letters swapped, which is one edit.
    let similarity = |candidate: &str| match strsim::damerau_levenshtein(name, candidate) {
        0 | 1 => 1.0,
        _ => strsim::jaro_winkler(name, candidate),
    };
    candidates
        .into_iter()
        .map(|candidate| (similarity(candidate), candidate))
        .filter(|(similarity, _)| *similarity > 0.8)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}

struct Check<'a> {
    sources: &'a Sources,
    problems: Vec<Problem>,
}

impl Check<'_> {
    fn section(&mut self, table: &Table, keys: &[Key], path: &str) {
        for (name, entry) in table {
            let path = join(path, name);
            match keys.iter().find(|key| key.name == name) {
                Some(key) => self.value(&entry.node, key.kind, &path),
                None => self.unknown(&entry.key, name, &path, keys),
            }
        }
    }

    fn unknown(&mut self, origin: &Origin, name: &str, path: &str, keys: &[Key]) {
        let names = keys.iter().map(|key| key.name);
        let help = match nearest(name, names.clone()) {
            Some(near) => format!("did you mean `{near}`?"),
            None => format!(
                "the keys here are: {}",
                names.collect::<Vec<_>>().join(", ")
            ),
        };
        let message = format!("unknown key `{path}`");
        self.problems
            .push(self.sources.problem(origin, message, help));
    }

    fn value(&mut self, node: &Node, kind: Kind, path: &str) {
        let fits = match (kind, &node.value) {
            (Kind::Integer(low, high), _) => node
                .unsigned()
                .is_some_and(|number| (low..=high).contains(&number)),
            (Kind::Number(bounds), value) => number(value).is_some_and(|n| bounds.allow(n)),
            (Kind::Pair(bounds), Value::List(list)) => {
                let allowed = |item: &Node| number(&item.value).is_some_and(|n| bounds.allow(n));
                list.len() == 2 && list.iter().all(allowed)
            }
            (Kind::IntegerPair(low, high), Value::List(list)) => {
                let allowed =
                    |item: &Node| item.unsigned().is_some_and(|n| (low..=high).contains(&n));
                list.len() == 2 && list.iter().all(allowed)
            }
            (Kind::IntegerPairs(low, high), Value::List(list)) => {
                for (index, item) in list.iter().enumerate() {
                    self.value(
                        item,
                        Kind::IntegerPair(low, high),
                        &format!("{path}.{index}"),
                    );
                }
                true
            }
            (Kind::TimeSpan, Value::Text(text)) => {
                if let Err(reason) = TimeSpan::parse(text) {
                    return self.time_span(node, &reason, path);
                }
                true
            }
            (Kind::TimeSpan, Value::Integer(_)) => {
                match node.unsigned().map(TimeSpan::of_seconds) {
                    Some(Err(reason)) => return self.time_span(node, &reason, path),
                    seconds => seconds.is_some(),
                }
            }
            (Kind::Boolean, Value::Boolean(_)) => true,
            (Kind::Name, Value::Text(text)) => is_name(text),
            (Kind::Text | Kind::Path | Kind::FilePattern, Value::Text(text)) => !text.is_empty(),
            (Kind::Choice(choices), Value::Text(text)) => {
                if !choices.contains(&text.as_str()) {
                    return self.choice(node, text, choices, kind, path);
                }
                true
            }
            // A number in quotes is not a misspelt choice: what is wrong with it is the quotes.
            (Kind::ChoiceOrInteger(choices, ..), Value::Text(text)) if !is_numeric(text) => {
                if !choices.contains(&text.as_str()) {
                    return self.choice(node, text, choices, kind, path);
                }
                true
            }
            (Kind::ChoiceOrInteger(_, low, high), Value::Integer(_)) => node
                .unsigned()
                .is_some_and(|number| (low..=high).contains(&number)),
            (Kind::Patterns, Value::List(list)) => {
                for (index, item) in list.iter().enumerate() {
                    self.pattern(item, &format!("{path}.{index}"));
                }
                true
            }
            (Kind::Shares, Value::Table(table)) => {
                for (name, entry) in table {
                    let kind = Kind::Number(Bounds::NotNegative);
                    self.value(&entry.node, kind, &join(path, name));
                }
                true
            }
            (Kind::Section(keys), Value::Table(table)) => {
                self.section(table, keys, path);
                true
            }
            (Kind::Sections(keys), Value::List(list)) => {
                for (index, item) in list.iter().enumerate() {
                    let path = format!("{path}.{index}");
                    match item.table() {
                        Some(table) => self.section(table, keys, &path),
                        None => self.wrong(item, &path, "a table"),
                    }
                }
                true
            }
            _ => false,
        };
        if !fits {
            self.wrong(node, path, &kind.describe());
        }
    }

    fn wrong(&mut self, node: &Node, path: &str, expected: &str) {
        let message = format!("`{path}` is {}, it must be {expected}", node.describe());
        // An element of a list has no name of its own.
        let key = match path.rsplit('.').next() {
            Some(name) if !is_numeric(name) => name,
            _ => path,
        };
        let help = match &node.value {
            Value::Text(text) if is_numeric(text) => {
                format!("write `{key} = {text}`, without quotes")
            }
            Value::Float(number) if expected.contains("whole") && number.fract() == 0.0 => {
                format!("write it without a point or exponent: `{key} = {number}`")
            }
            // Whoever asks whether means one of several ways.
            Value::Boolean(on) if expected.contains("\"none\"") => {
                let ways = expected.replace("\"none\", ", "");
                match on {
                    false => format!("write `{key} = \"none\"`"),
                    true => format!("write which: `{key}` is {ways}"),
                }
            }
            Value::Integer(_) | Value::Float(_) | Value::Boolean(_)
                if expected.contains("string") =>
            {
                format!("write it as a string: `{key} = \"{}\"`", node.describe())
            }
            _ => format!("give `{key}` {expected}"),
        };
        self.problems
            .push(self.sources.problem(&node.origin, message, help));
    }

    fn choice(&mut self, node: &Node, text: &str, choices: &[&str], kind: Kind, path: &str) {
        let message = format!("`{path}` is {text:?}, it must be {}", kind.describe());
        let help = match nearest(text, choices.iter().copied()) {
            Some(near) => format!("did you mean {near:?}?"),
            None => "use one of these values".to_owned(),
        };
        self.problems
            .push(self.sources.problem(&node.origin, message, help));
    }

    fn time_span(&mut self, node: &Node, reason: &str, path: &str) {
        let message = format!(
            "`{path}` is {}, which {reason}; it must be a length of time",
            node.describe()
        );
        let help = "write numbers with the units d, h, m, s and ms, the greatest first, such as \
                    \"11h30m\" or \"45s\", or whole seconds without quotes";
        self.problems
            .push(self.sources.problem(&node.origin, message, help));
    }

    fn pattern(&mut self, node: &Node, path: &str) {
        let Some(text) = node.text() else {
            return self.wrong(node, path, "a pattern (string)");
        };
        if let Err(error) = globset::Glob::new(text) {
            let message = format!("`{path}` is not a pattern: {error}");
            let help = "`*` stands for any characters, `?` for one, `{a,b}` for either";
            self.problems
                .push(self.sources.problem(&node.origin, message, help));
        }
    }
}

fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Integer(number) => Some(*number as f64),
        Value::Float(number) => Some(*number),
        _ => None,
    }
}

/// Whether a text reads as a number.
fn is_numeric(text: &str) -> bool {
    text.parse::<f64>().is_ok()
}

fn is_name(text: &str) -> bool {
    !text.is_empty() && !text.starts_with('.') && text.chars().all(may_be_in_name)
}

/// Whether a [`Kind::Name`] may contain the character.
pub(super) fn may_be_in_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.')
}
