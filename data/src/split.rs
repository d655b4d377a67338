//! Which documents are kept for validation.
//!
//! The choice hangs on the document id alone, never on seed or position: a document stays on its
//! side when shards are written anew, mixed differently or read in another order, and two copies
//! of a document (ids of plain text are content hashes) fall on the same side.

use crate::mix;

/// Separates this use of the hash from others; changing it changes every split.
const SALT: u64 = 0x7661_6c69_6461_7465;

/// Whether the document `doc_id` belongs to the validation set of this size.
pub fn is_validation(doc_id: &str, fraction: f64) -> bool {
    mix::below_fraction(mix::mix64(mix::name_word(doc_id) ^ SALT), fraction)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn the_share_is_kept_and_larger_sets_contain_smaller_ones() {
        let ids: Vec<String> = (0..20_000).map(|i| format!("doc {i}")).collect();
        let chosen = |f: f64| {
            ids.iter()
                .filter(|id| is_validation(id, f))
                .collect::<Vec<_>>()
        };
        let (small, large) = (chosen(0.01), chosen(0.05));
        assert!((150..250).contains(&small.len()), "{}", small.len());
        assert!((900..1100).contains(&large.len()), "{}", large.len());
        assert!(small.iter().all(|id| large.contains(id)));
        assert!(chosen(0.0).is_empty());
    }
}
