//! Keeping any one tree from filling the corpus.

use super::scan::CorpusFile;
use crate::error::{Error, Result};
use crate::mix;

/// Thins out trees until none has more than `share` of the bytes. `trees[i]` are the files of one
/// tree. Which files stay depends on their names and sizes alone.
pub(super) fn limit(trees: &mut [Vec<CorpusFile>], share: f64) -> Result<()> {
    if !(share > 0.0 && share <= 1.0) {
        return Err(Error::Option {
            option: "--max-tree-share",
            problem: format!("{share} is not above 0 and at most 1"),
        });
    }
    let whole = |trees: &[Vec<CorpusFile>]| trees.iter().map(|files| bytes(files)).sum::<u64>();
    loop {
        let allowed = (whole(trees) as f64 * share) as u64;
        let Some(largest) = trees.iter().map(|files| bytes(files)).max() else {
            return Ok(());
        };
        if largest <= allowed {
            return Ok(());
        }
        // The cap at which capped trees make up exactly their share; thinning whole files may
        // undershoot it, which lowers the total, hence the loop. It ends because every round
        // removes files.
        let sizes: Vec<u64> = trees.iter().map(|files| bytes(files)).collect();
        let cap = cap(&sizes, share).min(allowed);
        if cap == 0 {
            return Err(Error::Option {
                option: "--max-tree-share",
                problem: format!(
                    "{} trees cannot all stay within {share} of the corpus; give more inputs or a \
                     share of at least {:.3}",
                    trees.len(),
                    1.0 / trees.len() as f64
                ),
            });
        }
        trees.iter_mut().for_each(|files| thin(files, cap));
    }
}

fn bytes(files: &[CorpusFile]) -> u64 {
    files.iter().map(|file| file.bytes).sum()
}

/// The largest cap with `cap ≤ share · Σ min(size, cap)`; 0 if there is none.
fn cap(sizes: &[u64], share: f64) -> u64 {
    let mut sorted: Vec<u64> = sizes.to_vec();
    sorted.sort_unstable();
    // With the k largest trees capped: cap = share · (rest + k · cap).
    let mut rest: u64 = sorted.iter().sum();
    for (capped, &size) in sorted
        .iter()
        .rev()
        .enumerate()
        .map(|(n, size)| (n + 1, size))
    {
        rest -= size;
        let remaining = 1.0 - share * capped as f64;
        if remaining <= 0.0 {
            return 0;
        }
        let cap = (share * rest as f64 / remaining) as u64;
        let next_larger = sorted
            .len()
            .checked_sub(capped + 1)
            .map_or(0, |i| sorted[i]);
        if cap >= next_larger {
            return cap;
        }
    }
    0
}

/// Keeps files of together at most `cap` bytes, chosen by a hash of their names, in their order.
fn thin(files: &mut Vec<CorpusFile>, cap: u64) {
    if bytes(files) <= cap {
        return;
    }
    let mut order: Vec<usize> = (0..files.len()).collect();
    order.sort_by_key(|&i| mix::mix64(mix::name_word(&files[i].origin)));
    let mut keep = vec![false; files.len()];
    let mut kept = 0;
    for i in order {
        if kept + files[i].bytes <= cap {
            kept += files[i].bytes;
            keep[i] = true;
        }
    }
    let mut keep = keep.into_iter();
    files.retain(|_| keep.next().unwrap_or(false));
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::corpus::Format;
    use proptest::prelude::*;

    fn tree(number: usize, sizes: &[u64]) -> Vec<CorpusFile> {
        let file = |(i, &bytes): (usize, &u64)| CorpusFile {
            path: format!("t{number}/{i}").into(),
            origin: format!("t{number}/{i}"),
            bytes,
            format: Format::Text,
        };
        sizes.iter().enumerate().map(file).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn no_tree_exceeds_its_share(
            sizes in prop::collection::vec(prop::collection::vec(1u64..500, 1..30), 8..20),
        ) {
            let mut trees: Vec<_> = sizes.iter().enumerate().map(|(n, s)| tree(n, s)).collect();
            let before: Vec<u64> = trees.iter().map(|t| bytes(t)).collect();
            if limit(&mut trees, 0.25).is_ok() {
                let whole: u64 = trees.iter().map(|t| bytes(t)).sum();
                prop_assert!(trees.iter().all(|t| bytes(t) as f64 <= 0.25 * whole as f64));
                let untouched = trees.iter().zip(&before).any(|(t, &b)| bytes(t) == b);
                prop_assert!(untouched || whole == 0);
            }
        }
    }

    #[test]
    fn only_the_large_tree_shrinks() {
        let mut trees: Vec<_> = (0..10).map(|n| tree(n, &[10; 10])).collect();
        trees.push(tree(10, &[1; 5000]));
        limit(&mut trees, 0.2).unwrap();
        assert!(trees[..10].iter().all(|t| t.len() == 10));
        assert_eq!(trees[10].len(), 250);
    }

    #[test]
    fn too_few_trees_are_refused() {
        let mut trees = vec![tree(0, &[10]), tree(1, &[10])];
        assert!(
            limit(&mut trees, 0.05)
                .unwrap_err()
                .to_string()
                .contains("more inputs")
        );
    }
}
