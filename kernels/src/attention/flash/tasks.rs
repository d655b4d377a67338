//! Which task is which: a walk over documents.

use crate::DocumentStarts;

use super::plan::GRAIN;

/// A document, and a task within it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    /// Its sample.
    pub(super) sample: usize,
    /// Its first token in the sample.
    pub(super) first: usize,
    /// Its tokens.
    pub(super) len: usize,
    /// Columns of all long documents before it, each one's tokens rounded up to [`GRAIN`].
    pub(super) columns: usize,
    /// Blocks of all long documents before it.
    pub(super) blocks: usize,
    /// The task, counted from the document's first.
    pub(super) task: usize,
}

/// Finds documents of rising task numbers without a table.
pub(super) struct Walk<'a> {
    documents: &'a DocumentStarts,
    /// Tokens of a block.
    block: usize,
    /// A document of more tokens is long: it has places in the areas that threads share.
    short: usize,
    at: usize,
    tasks: usize,
    columns: usize,
    blocks: usize,
}

impl<'a> Walk<'a> {
    pub(super) fn new(documents: &'a DocumentStarts, block: usize, short: usize) -> Self {
        Walk {
            documents,
            block,
            short,
            at: 0,
            tasks: 0,
            columns: 0,
            blocks: 0,
        }
    }

    /// The place of a task, not below any one asked for before; `tasks_of` gives the tasks of a
    /// document with so many tokens and blocks. `None` past the last task.
    pub(super) fn seek(
        &mut self,
        task: usize,
        tasks_of: impl Fn(usize, usize) -> usize,
    ) -> Option<Place> {
        loop {
            let (sample, tokens) = self.documents.documents().get(self.at)?;
            let blocks = tokens.len().div_ceil(self.block);
            let tasks = tasks_of(tokens.len(), blocks);
            if task < self.tasks + tasks {
                return Some(Place {
                    sample: *sample,
                    first: tokens.start,
                    len: tokens.len(),
                    columns: self.columns,
                    blocks: self.blocks,
                    task: task - self.tasks,
                });
            }
            self.at += 1;
            self.tasks += tasks;
            if tokens.len() > self.short {
                self.columns += tokens.len().next_multiple_of(GRAIN);
                self.blocks += blocks;
            }
        }
    }
}
