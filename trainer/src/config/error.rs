//! What is said when a configuration cannot be used.
//!
//! Every message has the same four parts: what is wrong (with the key's path and the value found),
//! the place in the text it came from, that line with a caret under it, and what to do.

use std::fmt;
use std::path::PathBuf;

/// Why a configuration was refused. Nothing has been opened or written when this is returned.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read at all.
    #[error(
        "cannot read the config {path}: {reason}\n  = help: name a TOML file that exists and is \
         readable",
        path = path.display()
    )]
    Read {
        /// The file asked for.
        path: PathBuf,
        /// What the system answered. Part of the message, hence not a `source`.
        reason: std::io::Error,
    },
    /// The text was read, but something in it is wrong; all findings of the first failing check.
    #[error("{}", join(.0))]
    Invalid(Vec<Problem>),
}

impl ConfigError {
    /// The findings; empty when the file could not be read.
    pub fn problems(&self) -> &[Problem] {
        match self {
            Self::Read { .. } => &[],
            Self::Invalid(problems) => problems,
        }
    }
}

impl From<Problem> for ConfigError {
    fn from(problem: Problem) -> Self {
        Self::Invalid(vec![problem])
    }
}

/// Turns a list of findings into the result of a check.
pub(super) fn refuse_if_any(mut problems: Vec<Problem>) -> Result<(), ConfigError> {
    if problems.is_empty() {
        return Ok(());
    }
    problems.sort_by_key(|problem| problem.place.as_ref().map(Place::order));
    Err(ConfigError::Invalid(problems))
}

fn join(problems: &[Problem]) -> String {
    let texts: Vec<String> = problems.iter().map(Problem::to_string).collect();
    texts.join("\n\n")
}

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// What is wrong: the key's path, the value found, what is allowed.
    pub message: String,
    /// Where; `None` when no text is to blame.
    pub place: Option<Place>,
    /// What to do about it.
    pub help: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        let mut margin = 1;
        if let Some(place) = &self.place {
            margin = place.line.to_string().len();
            write!(
                f,
                "\n{:margin$}--> {}:{}:{}",
                "", place.source, place.line, place.column
            )?;
            write!(f, "\n{:margin$} |", "")?;
            write!(f, "\n{} | {}", place.line, place.text)?;
            write!(
                f,
                "\n{:margin$} | {:indent$}",
                "",
                "",
                indent = place.column - 1
            )?;
            write!(f, "{}", "^".repeat(place.width.max(1)))?;
        }
        write!(f, "\n{:margin$} = help: {}", "", self.help)
    }
}

/// A stretch of one line of a source text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The file's path as it was given, `preset NAME`, or `--set`.
    pub source: String,
    /// Line, counted from 1.
    pub line: usize,
    /// Column in characters, counted from 1.
    pub column: usize,
    /// The whole line.
    pub text: String,
    /// Characters marked, at least 1 when shown.
    pub width: usize,
    /// Rank of the source among all that were read.
    pub(super) source_index: usize,
}

impl Place {
    fn order(&self) -> (usize, usize, usize) {
        (self.source_index, self.line, self.column)
    }
}
