//! Samples that are left out: the others stay what they were, however the run is cut.

use super::*;
use crate::{LoaderOptions, SkipRanges, assign};
use proptest::prelude::*;
use std::ops::Range;

const SEQ_LEN: usize = 24;
const WEIGHTS: [f64; 2] = [0.7, 0.3];

fn limited(made: &Made, seed: u64) -> Dataset {
    let mut spec = made.spec(seed);
    spec.sources
        .iter_mut()
        .for_each(|source| source.max_epochs = Some(1.5));
    Dataset::open(&spec).unwrap()
}

/// Some ranges of the first 120 samples; the data hold more.
fn ranges() -> impl Strategy<Value = Vec<Range<u64>>> {
    let range = (0u64..120, 0u64..25).prop_map(|(first, length)| first..first + length);
    prop::collection::vec(range, 0..5)
}

/// Batches of `size` until the data end, and where the stream stands after each.
fn drain_leaving_out(
    dataset: &Dataset,
    (cursor, next_sample): (&Cursor, u64),
    skip: &SkipRanges,
    size: usize,
) -> Vec<(BatchIndex, Cursor, u64)> {
    let stream = dataset.stream(cursor, SEQ_LEN, &WEIGHTS).unwrap();
    let mut stream = stream.leaving_out(next_sample, skip.clone());
    let mut batches = Vec::new();
    while let Ok(batch) = stream.next_batch(size) {
        batches.push((batch, stream.cursor(), stream.next_sample()));
    }
    // What did not suffice for a batch is still there.
    let last = batches.last().map_or(next_sample, |batch| batch.2);
    assert_eq!(stream.next_sample(), last);
    batches
}

fn samples_of(batches: &[(BatchIndex, Cursor, u64)]) -> Vec<SampleIndex> {
    let samples = batches.iter().flat_map(|(batch, ..)| &batch.samples);
    samples.cloned().collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// With nothing left out this is the order that the other tests pin.
    #[test]
    fn the_other_samples_stay_and_fill_the_batches(seed: u64, given in ranges(), size in 1usize..6) {
        let made = Made::new();
        let dataset = limited(&made, seed);
        let skip = SkipRanges::new(given.clone());
        let whole = samples(drain(&dataset, &dataset.start(), SEQ_LEN, &WEIGHTS, 1));
        prop_assert!(whole.len() > 150, "{}", whole.len());
        let outside = |index: &u64| !given.iter().any(|range| range.contains(index));
        let kept: Vec<&SampleIndex> = (0..whole.len() as u64)
            .filter(outside)
            .map(|index| &whole[index as usize])
            .collect();
        let found = drain_leaving_out(&dataset, (&dataset.start(), 0), &skip, size);
        prop_assert!(found.iter().all(|(batch, ..)| batch.samples.len() == size));
        prop_assert_eq!(found.len(), kept.len() / size);
        let found = samples_of(&found);
        prop_assert!(found.iter().eq(kept.into_iter().take(found.len())));
    }

    /// After any batch, and also at any single sample, inside a range too.
    #[test]
    fn resuming_is_going_on(
        seed: u64,
        given in ranges(),
        size in 1usize..6,
        place: prop::sample::Index,
    ) {
        let made = Made::new();
        let dataset = limited(&made, seed);
        let skip = SkipRanges::new(given);
        let found = drain_leaving_out(&dataset, (&dataset.start(), 0), &skip, size);
        let at = place.index(found.len());
        let (_, cursor, next_sample) = &found[at];
        let again = drain_leaving_out(&limited(&made, seed), (cursor, *next_sample), &skip, size);
        prop_assert_eq!(&found[at + 1..], &again[..]);

        let single = drain(&dataset, &dataset.start(), SEQ_LEN, &WEIGHTS, 1);
        let drawn = place.index(single.len()) as u64 + 1;
        let kept: Vec<SampleIndex> = (drawn..single.len() as u64)
            .filter(|&index| !skip.contains(index))
            .map(|index| single[index as usize].0.samples[0].clone())
            .collect();
        let cursor = &single[drawn as usize - 1].1;
        let rest = drain_leaving_out(&dataset, (cursor, drawn), &skip, 1);
        prop_assert_eq!(samples_of(&rest), kept);
    }

    /// Leaving out a range later, as after a rollback, gives what leaving it out from the start
    /// would have given from there on.
    #[test]
    fn a_range_that_is_added_later_counts_from_there(
        seed: u64,
        first in 1usize..20,
        added in (0u64..40, 1u64..30),
        size in 1usize..5,
    ) {
        let made = Made::new();
        let dataset = limited(&made, seed);
        let nothing = SkipRanges::default();
        let before = drain_leaving_out(&dataset, (&dataset.start(), 0), &nothing, size);
        let (_, cursor, stood_at) = &before[first - 1];
        let bad = stood_at + added.0..stood_at + added.0 + added.1;
        let skip = SkipRanges::new([bad]);
        let after = drain_leaving_out(&dataset, (cursor, *stood_at), &skip, size);
        let whole = drain_leaving_out(&dataset, (&dataset.start(), 0), &skip, size);
        prop_assert_eq!(&whole[first..], &after[..]);
    }

    #[test]
    fn samples_left_are_those_that_can_be_drawn(seed: u64, given in ranges(), enough in 0u64..300) {
        let made = Made::new();
        let dataset = limited(&made, seed);
        let skip = SkipRanges::new(given);
        let all = drain_leaving_out(&dataset, (&dataset.start(), 0), &skip, 1);
        let middle = &all[all.len() / 2];
        for (cursor, stands_at, left) in [
            (&dataset.start(), 0, all.len()),
            (&middle.1, middle.2, all.len() - all.len() / 2 - 1),
        ] {
            let stream = dataset.stream(cursor, SEQ_LEN, &WEIGHTS).unwrap();
            let mut stream = stream.leaving_out(stands_at, skip.clone());
            prop_assert_eq!(stream.samples_left(u64::MAX).unwrap(), left as u64);
            prop_assert_eq!(stream.samples_left(enough).unwrap(), enough.min(left as u64));
        }
    }

    /// The loaders of any number of ranks with any micro-batch read the same batches, and say where
    /// they lie in the run.
    #[test]
    fn loaders_agree_on_any_split(
        given in ranges(),
        (ranks, micro_batch, size) in (1usize..5, 1usize..4, 1usize..9),
        start in 0u64..50,
    ) {
        let made = Made::new();
        let dataset = made.open(11);
        let skip = SkipRanges::new(given);
        let stream = || {
            let stream = dataset.stream(&dataset.start(), SEQ_LEN, &WEIGHTS).unwrap();
            stream.leaving_out(start, skip.clone())
        };
        let options = |rank| LoaderOptions {
            samples_per_batch: size,
            ranks,
            rank,
            micro_batch,
            batches: 6,
            ahead: 2,
        };
        let mut loaders: Vec<Loader> = (0..ranks)
            .map(|rank| Loader::start(stream(), options(rank)).unwrap())
            .collect();
        let mut direct = stream();
        let mut stood_at = start;
        for _ in 0..6 {
            let index = direct.next_batch(size).unwrap();
            let assignment = assign(&index, ranks, micro_batch);
            let used: Vec<u64> = (stood_at..).filter(|&i| !skip.contains(i)).take(size).collect();
            let (first, next) = (used[0], used[size - 1] + 1);
            for (rank, loader) in loaders.iter_mut().enumerate() {
                let batch = next_batch(loader);
                prop_assert_eq!((batch.first_sample, batch.next_sample), (first, next));
                prop_assert_eq!(batch.left_out, next - stood_at - size as u64);
                prop_assert_eq!(batch.samples, size);
                prop_assert_eq!(&batch.cursor, &direct.cursor());
                for (slots, samples) in assignment.rank(rank).iter().zip(&batch.micro_batches) {
                    let expected: Vec<_> = slots
                        .iter()
                        .map(|slot| slot.map(|s| dataset.read(&index.samples[s]).unwrap()))
                        .collect();
                    prop_assert_eq!(samples, &expected);
                }
            }
            stood_at = next;
        }
    }
}
