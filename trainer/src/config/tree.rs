//! The configuration before it is typed: a tree in which every value knows where it was written.
//!
//! The file, the preset, the `--set`s and the defaults are merged as trees, because a merge of
//! typed structs could not tell a default from a value that the user wrote, and would lose the
//! places that error messages need.

use std::collections::BTreeMap;

use toml::de::{DeTable, DeValue};

use super::error::{ConfigError, Problem};
use super::source::{Origin, Sources};

/// A value and where it was written.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub value: Value,
    pub origin: Origin,
}

/// A TOML value. Dates exist only to be refused by name.
#[derive(Debug, Clone)]
pub(super) enum Value {
    Integer(i64),
    Float(f64),
    Boolean(bool),
    Text(String),
    Date(String),
    List(Vec<Node>),
    Table(Table),
}

/// Entries by key.
pub(super) type Table = BTreeMap<String, Entry>;

/// A key's place and its value.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub key: Origin,
    pub node: Node,
}

impl Node {
    /// A value that nobody wrote.
    pub fn default_value(value: Value) -> Self {
        Self {
            value,
            origin: Origin::default(),
        }
    }

    /// The value under a path such as `stage.0.seq_len`; a number steps into a list.
    pub fn get(&self, path: &str) -> Option<&Node> {
        path.split('.')
            .try_fold(self, |node, segment| match &node.value {
                Value::Table(table) => table.get(segment).map(|entry| &entry.node),
                Value::List(list) => list.get(segment.parse::<usize>().ok()?),
                _ => None,
            })
    }

    /// The entries, if this is a table.
    pub fn table(&self) -> Option<&Table> {
        match &self.value {
            Value::Table(table) => Some(table),
            _ => None,
        }
    }

    /// The entries, if this is a table.
    pub fn table_mut(&mut self) -> Option<&mut Table> {
        match &mut self.value {
            Value::Table(table) => Some(table),
            _ => None,
        }
    }

    /// The elements, if this is a list; otherwise none.
    pub fn items(&self) -> &[Node] {
        match &self.value {
            Value::List(list) => list,
            _ => &[],
        }
    }

    /// The elements, if this is a list; otherwise none.
    pub fn items_mut(&mut self) -> &mut [Node] {
        match &mut self.value {
            Value::List(list) => list,
            _ => &mut [],
        }
    }

    /// The number, if this is an integer that is not negative.
    pub fn unsigned(&self) -> Option<u64> {
        match self.value {
            Value::Integer(number) => u64::try_from(number).ok(),
            _ => None,
        }
    }

    /// The text, if this is a string.
    pub fn text(&self) -> Option<&str> {
        match &self.value {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// Whether this is a single value that a message can show.
    fn is_plain(&self) -> bool {
        !matches!(self.value, Value::List(_) | Value::Table(_))
    }

    /// The value in words, for messages: `the string "abc"`.
    pub fn describe(&self) -> String {
        match &self.value {
            Value::Integer(number) => format!("{number}"),
            Value::Float(number) => format!("{number:?}"),
            Value::Boolean(flag) => format!("{flag}"),
            Value::Text(text) => format!("the string {text:?}"),
            Value::Date(text) => format!("the date {text}"),
            Value::List(list) if list.len() <= 4 && list.iter().all(Node::is_plain) => {
                format!("the list {}", self.to_toml())
            }
            Value::List(_) => "a list".to_owned(),
            Value::Table(_) => "a table".to_owned(),
        }
    }

    /// Drops the places.
    pub fn to_toml(&self) -> toml::Value {
        match &self.value {
            Value::Integer(number) => toml::Value::Integer(*number),
            Value::Float(number) => toml::Value::Float(*number),
            Value::Boolean(flag) => toml::Value::Boolean(*flag),
            Value::Text(text) | Value::Date(text) => toml::Value::String(text.clone()),
            Value::List(list) => toml::Value::Array(list.iter().map(Node::to_toml).collect()),
            Value::Table(table) => {
                let entries = table
                    .iter()
                    .map(|(key, entry)| (key.clone(), entry.node.to_toml()));
                toml::Value::Table(entries.collect())
            }
        }
    }
}

/// Parses a whole document that was added to `sources` as `source`.
pub(super) fn parse_document(
    text: &str,
    source: usize,
    sources: &Sources,
) -> Result<Node, ConfigError> {
    let reader = Reader {
        source,
        offset: 0,
        sources,
    };
    let document = DeTable::parse(text).map_err(|error| reader.syntax(&error))?;
    let span = document.span();
    let value = reader.table(document.into_inner())?;
    Ok(Node {
        value,
        origin: reader.origin(span),
    })
}

/// Parses one value that stands at byte `offset` of a source; `None` if it is not TOML.
pub(super) fn parse_value(
    text: &str,
    source: usize,
    offset: usize,
    sources: &Sources,
) -> Result<Option<Node>, ConfigError> {
    if text.trim().is_empty() {
        return Ok(None);
    }
    let reader = Reader {
        source,
        offset,
        sources,
    };
    match DeValue::parse(text) {
        Ok(value) => reader.node(value).map(Some),
        Err(_) => Ok(None),
    }
}

/// Turns the parser's borrowed tree into ours.
struct Reader<'a> {
    source: usize,
    offset: usize,
    sources: &'a Sources,
}

impl Reader<'_> {
    fn origin(&self, span: std::ops::Range<usize>) -> Origin {
        let span = span.start + self.offset..span.end + self.offset;
        Origin {
            source: Some(self.source),
            span,
        }
    }

    fn syntax(&self, error: &toml::de::Error) -> Problem {
        let origin = self.origin(error.span().unwrap_or(0..0));
        let message = format!("not valid TOML: {}", error.message());
        self.sources
            .problem(&origin, message, "correct the syntax (https://toml.io)")
    }

    fn node(&self, value: serde_spanned::Spanned<DeValue<'_>>) -> Result<Node, ConfigError> {
        let origin = self.origin(value.span());
        let value = match value.into_inner() {
            DeValue::String(text) => Value::Text(text.into_owned()),
            DeValue::Boolean(flag) => Value::Boolean(flag),
            DeValue::Datetime(date) => Value::Date(date.to_string()),
            DeValue::Integer(number) => i64::from_str_radix(number.as_str(), number.radix())
                .map(Value::Integer)
                .map_err(|_| self.too_large(&origin, &number.to_string()))?,
            DeValue::Float(number) => number
                .as_str()
                .parse()
                .map(Value::Float)
                .map_err(|_| self.too_large(&origin, number.as_str()))?,
            DeValue::Array(list) => Value::List(
                list.into_iter()
                    .map(|item| self.node(item))
                    .collect::<Result<_, _>>()?,
            ),
            DeValue::Table(table) => self.table(table)?,
        };
        Ok(Node { value, origin })
    }

    fn table(&self, table: DeTable<'_>) -> Result<Value, ConfigError> {
        let mut entries = Table::new();
        for (key, value) in table {
            let origin = self.origin(key.span());
            let entry = Entry {
                key: origin,
                node: self.node(value)?,
            };
            entries.insert(key.into_inner().into_owned(), entry);
        }
        Ok(Value::Table(entries))
    }

    fn too_large(&self, origin: &Origin, number: &str) -> Problem {
        let message = format!("{number} does not fit into 64 bits");
        self.sources
            .problem(origin, message, "write a smaller number")
    }
}
