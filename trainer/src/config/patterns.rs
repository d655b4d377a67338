//! Patterns over tensor names: which tensors are frozen, which are not decayed.

use globset::{Glob, GlobSet, GlobSetBuilder};
use serde::{Deserialize, Serialize};

/// A list of patterns, matched against whole canonical (Hugging Face) tensor names such as
/// `model.layers.0.self_attn.q_proj.weight`.
///
/// `*` stands for any characters, dots included; `?` for one; `[0-9]` for one of a class; `{a,b}`
/// for either.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(try_from = "Vec<String>", into = "Vec<String>")]
pub struct Patterns {
    texts: Vec<String>,
    set: GlobSet,
}

impl Patterns {
    /// Compiles a list of patterns.
    ///
    /// # Errors
    /// The first pattern that is malformed.
    pub fn new(texts: Vec<String>) -> Result<Self, globset::Error> {
        let mut set = GlobSetBuilder::new();
        for text in &texts {
            set.add(Glob::new(text)?);
        }
        Ok(Self {
            set: set.build()?,
            texts,
        })
    }

    /// Whether any pattern matches the whole name.
    pub fn matches(&self, tensor: &str) -> bool {
        self.set.is_match(tensor)
    }

    /// The patterns as written.
    pub fn texts(&self) -> &[String] {
        &self.texts
    }

    /// The patterns that match none of the names: most likely a misspelling.
    pub fn unused<'a>(&self, tensors: impl IntoIterator<Item = &'a str>) -> Vec<&str> {
        let mut used = vec![false; self.texts.len()];
        for tensor in tensors {
            for index in self.set.matches(tensor) {
                used[index] = true;
            }
        }
        let unused = self.texts.iter().zip(used).filter(|(_, used)| !used);
        unused.map(|(text, _)| text.as_str()).collect()
    }
}

impl PartialEq for Patterns {
    fn eq(&self, other: &Self) -> bool {
        self.texts == other.texts
    }
}

impl TryFrom<Vec<String>> for Patterns {
    type Error = globset::Error;

    fn try_from(texts: Vec<String>) -> Result<Self, Self::Error> {
        Self::new(texts)
    }
}

impl From<Patterns> for Vec<String> {
    fn from(patterns: Patterns) -> Self {
        patterns.texts
    }
}
