//! Which source the next sample comes from.

/// Chooses the source that lags furthest behind its share of tokens, so that shares never stray
/// from the weights by more than about a sample. Pure and without state beyond the counts, hence
/// seekable.
///
/// `weights[i]` is `None` for a source that takes no part (weight zero, or used up);
/// `taken_tokens[i]` counts what the stage took from source `i`. Answers `None` when no source
/// takes part. Ties go to the first.
pub(crate) fn choose(
    weights: &[Option<f64>],
    taken_tokens: &[u64],
    sample_tokens: u64,
) -> Option<usize> {
    let whole: f64 = weights.iter().flatten().sum();
    // A source that leaves the mixture takes its tokens with it; the rest keep their proportions.
    let taken: u64 = weights
        .iter()
        .zip(taken_tokens)
        .filter(|(w, _)| w.is_some())
        .map(|(_, t)| t)
        .sum();
    let target = (taken + sample_tokens) as f64;
    let mut best: Option<(usize, f64)> = None;
    for (source, weight) in weights.iter().enumerate() {
        let Some(weight) = weight else { continue };
        let lag = weight / whole * target - taken_tokens[source] as f64;
        if best.is_none_or(|(_, most)| lag > most) {
            best = Some((source, lag));
        }
    }
    best.map(|(source, _)| source)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// No source is ever more than one sample ahead, nor (up to four sources) more than two
        /// samples behind; with two sources one sample either way.
        #[test]
        fn shares_stay_near_the_weights(raw in prop::collection::vec(0.05f64..1.0, 2..5)) {
            let whole: f64 = raw.iter().sum();
            let weights: Vec<_> = raw.iter().map(|&w| Some(w)).collect();
            let mut taken = vec![0u64; raw.len()];
            let behind = if raw.len() == 2 { 1.0 } else { 2.0 };
            for step in 1..400u64 {
                let source = choose(&weights, &taken, 10).unwrap();
                taken[source] += 10;
                for (t, w) in taken.iter().zip(&raw) {
                    let samples_ahead = *t as f64 / 10.0 - w / whole * step as f64;
                    prop_assert!(samples_ahead < 1.0 + 1e-9, "{samples_ahead} ahead");
                    prop_assert!(samples_ahead > -behind - 1e-9, "{samples_ahead} behind");
                }
            }
        }
    }

    #[test]
    fn absent_sources_are_never_chosen() {
        assert_eq!(choose(&[None, Some(1.0)], &[0, 1000], 8), Some(1));
        assert_eq!(choose(&[None, None], &[0, 0], 8), None);
    }
}
