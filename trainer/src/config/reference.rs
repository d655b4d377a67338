//! The reference of all keys as Markdown tables, from the same table that the check reads.

use super::keys;
use super::schema::{Fallback, Key, Kind, join};

/// Every section with its table of keys, in the order of the reference page: `("run", "| key | …")`.
/// The name of a section inside another is its path (`data.source`).
pub fn reference() -> Vec<(String, String)> {
    let mut sections = Vec::new();
    collect(keys::ROOT, "", &mut sections);
    sections
}

fn collect(keys: &[Key], path: &str, sections: &mut Vec<(String, String)>) {
    for key in keys {
        if let Kind::Section(inner) | Kind::Sections(inner) = key.kind {
            let path = join(path, key.name);
            sections.push((path.clone(), table(inner)));
            collect(inner, &path, sections);
        }
    }
}

fn table(keys: &[Key]) -> String {
    let mut text =
        String::from("| key | type | default | unit | meaning |\n|---|---|---|---|---|\n");
    for key in keys {
        if matches!(key.kind, Kind::Section(_) | Kind::Sections(_)) {
            continue;
        }
        let kind = match key.kind {
            Kind::Choice(_) => {
                format!("`{}`", key.kind.describe().replace(" or ", "` or `")).replace(", ", "`, `")
            }
            Kind::ChoiceOrInteger(choices, low, high) => {
                let quoted: Vec<String> = choices.iter().map(|c| format!("`{c:?}`")).collect();
                let number = Kind::Integer(low, high).describe();
                format!("{} or {number}", quoted.join(", "))
            }
            kind => kind.describe(),
        };
        let default = match key.fallback {
            Fallback::Required => "**required**".to_owned(),
            Fallback::Is(value) => format!("`{value}`"),
            Fallback::From(other) => format!("the value of `{other}`"),
            Fallback::Rule(rule) => rule.to_owned(),
            Fallback::Absent(meaning) => format!("absent: {meaning}"),
        };
        let Key {
            name,
            unit,
            meaning,
            ..
        } = key;
        text.push_str(&format!(
            "| `{name}` | {kind} | {default} | {unit} | {meaning} |\n"
        ));
    }
    text
}
