//! Decoded row groups, kept while they are in use.
//!
//! The documents of a window are read in permuted order, so all row groups of the windows in use
//! should fit; the budget is set from the window size and the least recently used go first.

use crate::error::{Error, Result};
use crate::shard::{RowGroupTokens, Shard};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

/// A bounded store of decoded row groups, shared by threads.
#[derive(Debug)]
pub(crate) struct RowGroupCache {
    budget_tokens: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    clock: u64,
    tokens: usize,
    groups: HashMap<(u32, u32), (u64, Arc<RowGroupTokens>)>,
}

impl RowGroupCache {
    /// Keeps row groups of together at most `budget_tokens` (four bytes each), and always the one
    /// read last.
    pub fn new(budget_tokens: usize) -> Self {
        Self {
            budget_tokens,
            state: Mutex::new(State::default()),
        }
    }

    /// Row group `row_group` of shard number `number`, decoded now or before.
    pub fn get(
        &self,
        number: u32,
        shard: &Shard,
        row_group: u32,
        vocab_size: usize,
    ) -> Result<Arc<RowGroupTokens>> {
        let key = (number, row_group);
        if let Some(found) = self.lock()?.find(key) {
            return Ok(found);
        }
        // Decoded outside the lock: two threads may decode the same group once each, but no
        // thread waits for another's file.
        let decoded = Arc::new(shard.read_tokens(row_group as usize, vocab_size)?);
        self.lock()?
            .insert(key, decoded.clone(), self.budget_tokens);
        Ok(decoded)
    }

    fn lock(&self) -> Result<std::sync::MutexGuard<'_, State>> {
        self.state.lock().map_err(|_| Error::Thread("data loading"))
    }
}

impl State {
    fn find(&mut self, key: (u32, u32)) -> Option<Arc<RowGroupTokens>> {
        self.clock += 1;
        let (used, group) = self.groups.get_mut(&key)?;
        *used = self.clock;
        Some(group.clone())
    }

    fn insert(&mut self, key: (u32, u32), group: Arc<RowGroupTokens>, budget: usize) {
        while self.tokens + group.tokens() > budget {
            let Some(oldest) = self.groups.iter().min_by_key(|(_, (used, _))| *used) else {
                break;
            };
            let oldest = *oldest.0;
            if let Some((_, evicted)) = self.groups.remove(&oldest) {
                self.tokens -= evicted.tokens();
            }
        }
        self.tokens += group.tokens();
        if let Some((_, replaced)) = self.groups.insert(key, (self.clock, group)) {
            self.tokens -= replaced.tokens();
        }
    }
}
