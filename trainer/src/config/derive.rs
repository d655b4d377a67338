//! Values that follow from several keys: head width, shard size, steps, decay, mixture.

use super::error::{ConfigError, Problem, refuse_if_any};
use super::keys::MAX_STEPS;
use super::resolve::{insert_default, section_mut, sections_mut};
use super::schema::nearest;
use super::source::Sources;
use super::tree::{Entry, Node, Table, Value};

/// Fills in what the schema calls a rule, except paths.
pub(super) fn derive(root: &mut Node, sources: &Sources) -> Result<(), ConfigError> {
    let mut problems = Vec::new();
    head_dim(root, sources, &mut problems);
    shard_size(root, sources, &mut problems);
    let shares = source_shares(root);
    let optimizer = section_mut(root, "optimizer").cloned().unwrap_or_default();
    for (index, stage) in sections_mut(root, "stage").iter_mut().enumerate() {
        let at = Stage {
            index,
            header: stage.clone(),
            sources,
        };
        let Some(stage) = stage.table_mut() else {
            continue;
        };
        problems.extend(at.steps(stage));
        problems.extend(at.decay(stage, &optimizer));
        problems.extend(at.weights(stage, &shares));
    }
    refuse_if_any(problems)
}

fn head_dim(root: &mut Node, sources: &Sources, problems: &mut Vec<Problem>) {
    let Some(model) = section_mut(root, "model") else {
        return;
    };
    if model.contains_key("head_dim") {
        return;
    }
    let (Some(hidden), Some(heads)) = (get(model, "hidden_size"), get(model, "num_heads")) else {
        return;
    };
    let (Some(width), Some(count)) = (hidden.unsigned(), heads.unsigned()) else {
        return;
    };
    if !width.is_multiple_of(count) {
        let message = format!(
            "`model.hidden_size` is {width}, it must be a multiple of `model.num_heads` ({count})"
        );
        let below = width / count * count;
        let near = if below == 0 { count } else { below };
        let help = format!("use {near} or {}, or set `model.head_dim`", near + count);
        let origin = sources.blame([&hidden.origin, &heads.origin]);
        problems.push(sources.problem(&origin, message, help));
        return;
    }
    insert_default(model, "head_dim", integer(width / count));
}

/// Refuses groups of ranks that share where nothing is shared out: `"node"` or a number greater
/// than 1 with `zero_stage = 0`. Where `zero_stage` was given on the command line, a size of the
/// file goes back to its default.
fn shard_size(root: &mut Node, sources: &Sources, problems: &mut Vec<Problem>) {
    let Some(parallel) = section_mut(root, "parallel") else {
        return;
    };
    let (Some(stage), Some(size)) = (get(parallel, "zero_stage"), get(parallel, "shard_size"))
    else {
        return;
    };
    let harmless = size.text() == Some("world") || size.unsigned() == Some(1);
    if stage.unsigned() != Some(0) || harmless {
        return;
    }
    if sources.layer(&stage.origin) > sources.layer(&size.origin) {
        parallel.remove("shard_size");
        let world = Node::default_value(Value::Text("world".to_owned()));
        insert_default(parallel, "shard_size", world);
        return;
    }
    let message = format!(
        "`parallel.shard_size` is {}, but nothing is sharded with `zero_stage = 0`",
        size.to_toml()
    );
    let help = "remove it, or set `zero_stage` to 1, 2 or 3";
    problems.push(sources.problem(&size.origin, message, help));
}

/// Name and weight of each source, in order.
fn source_shares(root: &Node) -> Vec<(String, Node)> {
    let sources = root.get("data.source").map(Node::items).unwrap_or_default();
    let named = |source: &Node| {
        let name = source.get("name")?.text()?.to_owned();
        Some((name, source.get("weight")?.clone()))
    };
    sources.iter().filter_map(named).collect()
}

/// One stage's rules; each returns what it has to object to.
struct Stage<'a> {
    index: usize,
    header: Node,
    sources: &'a Sources,
}

impl Stage<'_> {
    fn path(&self, key: &str) -> String {
        format!("stage.{}.{key}", self.index)
    }

    /// Leaves exactly `steps`. Where one of `steps` and `tokens` was given on the command line and
    /// the other in the file, the command line wins.
    fn steps(&self, stage: &mut Table) -> Option<Problem> {
        if let (Some(steps), Some(tokens)) = (stage.get("steps"), stage.get("tokens")) {
            let layers = [&steps.key, &tokens.key].map(|key| self.sources.layer(key));
            if layers[0] == layers[1] {
                let message = format!("`stage.{}` has both `steps` and `tokens`", self.index);
                let second = if steps.key.span.start > tokens.key.span.start
                    || steps.key.source > tokens.key.source
                {
                    steps
                } else {
                    tokens
                };
                let help = "keep the one that you mean and remove the other";
                return Some(self.sources.problem(&second.key, message, help));
            }
            stage.remove(if layers[0] > layers[1] {
                "tokens"
            } else {
                "steps"
            });
        }
        let Some(tokens) = stage.remove("tokens") else {
            if stage.contains_key("steps") {
                return None;
            }
            let message = format!("`stage.{}` has neither `steps` nor `tokens`", self.index);
            let help = "add `steps = …` or `tokens = …`";
            return Some(self.sources.problem(&self.header.origin, message, help));
        };
        let batch = get(stage, "batch_tokens")
            .and_then(Node::unsigned)
            .unwrap_or(1);
        let wanted = tokens.node.unsigned().unwrap_or(1);
        let steps = wanted.div_ceil(batch);
        if steps > MAX_STEPS {
            let message = format!(
                "`{}` is {wanted}, which makes {steps} steps of {batch} tokens, more than \
                 {MAX_STEPS}",
                self.path("tokens")
            );
            let help = "use fewer `tokens` or a larger `batch_tokens`";
            return Some(self.sources.problem(&tokens.node.origin, message, help));
        }
        let mut node = integer(steps);
        node.origin = tokens.node.origin;
        stage.insert(
            "steps".to_owned(),
            Entry {
                key: tokens.key,
                node,
            },
        );
        None
    }

    /// Leaves `decay_steps` and `decay_shape` exactly where the schedule is `wsd`. Where another
    /// schedule was given on the command line, those of the file are dropped.
    fn decay(&self, stage: &mut Table, optimizer: &Table) -> Option<Problem> {
        let schedule = get(stage, "schedule")?.clone();
        let kind = schedule.text().unwrap_or_default();
        if kind == "wsd" {
            let steps = get(stage, "steps").and_then(Node::unsigned).unwrap_or(1);
            let tenth = integer((steps / 10).max(1));
            let length = get(optimizer, "decay_steps").cloned().unwrap_or(tenth);
            insert_default(stage, "decay_steps", length);
            if let Some(shape) = get(optimizer, "decay_shape") {
                insert_default(stage, "decay_shape", shape.clone());
            }
            return None;
        }
        for key in ["decay_steps", "decay_shape"] {
            let Some(entry) = stage.remove(key) else {
                continue;
            };
            if self.sources.layer(&schedule.origin) > self.sources.layer(&entry.key) {
                continue;
            }
            let message = format!("`{}` has no effect with schedule {kind:?}", self.path(key));
            let help = "remove it, or set `schedule = \"wsd\"`";
            return Some(self.sources.problem(&entry.key, message, help));
        }
        None
    }

    /// Leaves a share for every source: those of the sources themselves, or the stage's own and
    /// zero for the sources that it does not name.
    fn weights(&self, stage: &mut Table, shares: &[(String, Node)]) -> Option<Problem> {
        let Some(Value::Table(given)) = stage.get_mut("weights").map(|e| &mut e.node.value) else {
            let mut all = Table::new();
            for (name, weight) in shares {
                insert_default(&mut all, name, weight.clone());
            }
            insert_default(stage, "weights", Node::default_value(Value::Table(all)));
            return None;
        };
        let names = || shares.iter().map(|(name, _)| name.as_str());
        for (name, entry) in given.iter() {
            if names().any(|known| known == name) {
                continue;
            }
            let message = format!(
                "`{}` names no source",
                self.path(&format!("weights.{name}"))
            );
            let help = match nearest(name, names()) {
                Some(near) => format!("did you mean `{near}`?"),
                None => format!(
                    "the sources are: {}",
                    names().collect::<Vec<_>>().join(", ")
                ),
            };
            return Some(self.sources.problem(&entry.key, message, help));
        }
        for (name, _) in shares {
            insert_default(given, name, Node::default_value(Value::Float(0.0)));
        }
        None
    }
}

fn get<'a>(table: &'a Table, key: &str) -> Option<&'a Node> {
    table.get(key).map(|entry| &entry.node)
}

fn integer(number: u64) -> Node {
    // The schema keeps every number far below this limit.
    Node::default_value(Value::Integer(i64::try_from(number).unwrap_or(i64::MAX)))
}
