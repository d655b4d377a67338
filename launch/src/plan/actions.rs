//! Actions in words.

use oxitron_trainer::plan::{Action, Exchange, Role, ShardMap, Units};

/// An action as it is printed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// What is done.
    pub verb: &'static str,
    /// The layer, unit or piece it is done to; empty for the agreement of all ranks.
    pub object: String,
    /// What else there is to say.
    pub remark: &'static str,
    /// Of computations.
    pub micro_batch: Option<usize>,
}

impl Line {
    /// Puts an action of a plan into words.
    pub fn new(action: Action, units: &Units, map: &ShardMap) -> Self {
        let compute = |verb, layer: usize, micro_batch| Self {
            verb,
            object: units.layers[layer].name.clone(),
            remark: "",
            micro_batch: Some(micro_batch),
        };
        let piece = |verb, piece: usize, remark| Self {
            verb,
            object: map.name(units, piece),
            remark,
            micro_batch: None,
        };
        match action {
            Action::Forward { micro_batch, layer } => compute("forward", layer, micro_batch),
            Action::Evaluate { micro_batch } => {
                compute("evaluate", units.layers.len() - 1, micro_batch)
            }
            Action::Recompute { micro_batch, layer } => compute("recompute", layer, micro_batch),
            Action::Backward { micro_batch, layer } => compute("backward", layer, micro_batch),
            Action::Exchange(exchange) => match exchange {
                Exchange::Hold { unit, role } => Self::of_unit("hold", units, unit, role),
                Exchange::Drop { unit, role } => Self::of_unit("drop", units, unit, role),
                Exchange::Gather { piece: index } => piece("gather", index, ""),
                Exchange::Reduce {
                    piece: index,
                    accumulate: false,
                } => piece("reduce", index, ""),
                Exchange::Reduce {
                    piece: index,
                    accumulate: true,
                } => piece("reduce", index, "added to earlier micro-batches"),
                Exchange::Replicate { piece: index } => piece("replicate", index, ""),
                Exchange::Await { piece: index, role } => piece("await", index, name(role)),
            },
            Action::Norm { piece: index } => piece("norm", index, ""),
            Action::Control => Self {
                verb: "control",
                object: String::new(),
                remark: "",
                micro_batch: None,
            },
            Action::Update { piece: index } => piece("update", index, ""),
        }
    }

    fn of_unit(verb: &'static str, units: &Units, unit: usize, role: Role) -> Self {
        Self {
            verb,
            object: units.units[unit].name.clone(),
            remark: name(role),
            micro_batch: None,
        }
    }

    fn text(&self, object: &str) -> String {
        let mut text = format!("{:<9}  {object}", self.verb);
        if let Some(micro_batch) = self.micro_batch {
            text += &format!(", micro-batch {micro_batch}");
        }
        if !self.remark.is_empty() {
            text += &format!(", {}", self.remark);
        }
        text.trim_end().to_owned()
    }
}

fn name(role: Role) -> &'static str {
    match role {
        Role::Weights => "weights",
        Role::Gradients => "gradients",
    }
}

/// How often each verb occurs, in the order of first occurrence.
pub fn counts(lines: &[Line]) -> Vec<(&'static str, usize)> {
    let mut counts: Vec<(&'static str, usize)> = Vec::new();
    for line in lines {
        match counts.iter_mut().find(|(verb, _)| *verb == line.verb) {
            Some((_, count)) => *count += 1,
            None => counts.push((line.verb, 1)),
        }
    }
    counts
}

/// One text per action.
pub fn list(lines: &[Line]) -> Vec<String> {
    lines.iter().map(|line| line.text(&line.object)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verbs_are_counted_and_lines_say_what_there_is_to_say() {
        let line = |verb, object: &str, remark, micro_batch| Line {
            verb,
            object: object.to_owned(),
            remark,
            micro_batch,
        };
        let lines = [
            line("forward", "embedding", "", Some(0)),
            line("forward", "block.0", "", Some(0)),
            line("drop", "block.0", "weights", None),
            line("control", "", "", None),
        ];
        assert_eq!(
            list(&lines),
            [
                "forward    embedding, micro-batch 0",
                "forward    block.0, micro-batch 0",
                "drop       block.0, weights",
                "control",
            ]
        );
        assert_eq!(
            counts(&lines),
            [("forward", 2), ("drop", 1), ("control", 1)]
        );
    }
}
