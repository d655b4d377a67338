//! The texts a configuration is made of, and the way back from a value to its line.
//!
//! A value may come from the config file, from a preset, from `--set`, or from a default. Each
//! carries an [`Origin`], so that an error found after all of them were merged still points at the
//! characters the user wrote.

use std::ops::Range;

use super::error::{Place, Problem};

/// Where a value or a key was written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Origin {
    /// Index into [`Sources`]; `None` for a default.
    pub source: Option<usize>,
    /// Bytes of that text.
    pub span: Range<usize>,
}

/// What kind of text a source is. The order is that of precedence: a later one overrides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Layer {
    /// A default of the schema.
    Default,
    /// A model preset of the binary.
    Preset,
    /// The config file.
    File,
    /// A `--set` of the command line.
    Set,
}

#[derive(Debug)]
struct Source {
    name: String,
    text: String,
    layer: Layer,
}

/// Every text that was read, in order.
#[derive(Debug, Default)]
pub(super) struct Sources {
    list: Vec<Source>,
}

impl Sources {
    /// Adds a text and returns its index.
    pub fn add(&mut self, name: impl Into<String>, text: &str, layer: Layer) -> usize {
        self.list.push(Source {
            name: name.into(),
            text: text.to_owned(),
            layer,
        });
        self.list.len() - 1
    }

    /// The layer that a value came from.
    pub fn layer(&self, origin: &Origin) -> Layer {
        origin
            .source
            .and_then(|index| self.list.get(index))
            .map_or(Layer::Default, |source| source.layer)
    }

    /// Of several origins that contradict each other the one to blame: that of the highest layer,
    /// and among equals the first.
    pub fn blame<'o>(&self, origins: impl IntoIterator<Item = &'o Origin>) -> Origin {
        let mut blamed = Origin::default();
        for origin in origins {
            if self.layer(origin) > self.layer(&blamed) {
                blamed = origin.clone();
            }
        }
        blamed
    }

    /// Line, column and text of an origin; `None` for a default.
    pub fn place(&self, origin: &Origin) -> Option<Place> {
        let source_index = origin.source?;
        let source = self.list.get(source_index)?;
        let text = source.text.as_str();
        let start = floor_char_boundary(text, origin.span.start);
        let end = floor_char_boundary(text, origin.span.end).max(start);
        let line_start = text[..start].rfind('\n').map_or(0, |newline| newline + 1);
        let line_end = text[start..]
            .find('\n')
            .map_or(text.len(), |newline| start + newline);
        // Control characters would shift the caret or act on the terminal.
        let shown = |part: &str| -> String {
            part.trim_end_matches('\r')
                .chars()
                .map(|c| if c.is_control() { ' ' } else { c })
                .collect()
        };
        Some(Place {
            source: source.name.clone(),
            line: text[..start].matches('\n').count() + 1,
            column: text[line_start..start].chars().count() + 1,
            text: shown(&text[line_start..line_end]),
            width: shown(&text[start..end.min(line_end)]).chars().count(),
            source_index,
        })
    }

    /// A finding at an origin.
    pub fn problem(
        &self,
        origin: &Origin,
        message: impl Into<String>,
        help: impl Into<String>,
    ) -> Problem {
        Problem {
            message: message.into(),
            place: self.place(origin),
            help: help.into(),
        }
    }
}

fn floor_char_boundary(text: &str, index: usize) -> usize {
    let mut index = index.min(text.len());
    while !text.is_char_boundary(index) {
        index -= 1;
    }
    index
}
