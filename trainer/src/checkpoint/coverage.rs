//! Is every element of a tensor held by exactly one piece?

use super::geometry::Region;

/// Pieces of one tensor state that may be strided, that is, not a contiguous range of the tensor.
/// Their boxes are compared pairwise, so a manifest must not be able to ask for endless work.
const MAX_STRIDED_PIECES: usize = 4096;

/// Says which elements `regions` leave out or hold twice, if any. Each region has passed
/// [`Region::check`]; `count` is the number of elements of `shape`.
pub(super) fn check(shape: &[usize], count: usize, regions: &[&Region]) -> Result<(), String> {
    let flat: Option<Vec<_>> = regions.iter().map(|region| region.as_flat(shape)).collect();
    if let Some(mut ranges) = flat {
        ranges.sort_unstable_by_key(|range| range.start);
        let mut covered = 0;
        for range in ranges {
            if range.start > covered {
                return Err(format!(
                    "elements {covered}..{} are in no piece",
                    range.start
                ));
            }
            if range.start < covered {
                let end = covered.min(range.end);
                return Err(format!("elements {}..{end} are in two pieces", range.start));
            }
            covered = range.end;
        }
        if covered < count {
            return Err(format!("elements {covered}..{count} are in no piece"));
        }
        return Ok(());
    }
    check_strided(shape, count, regions)
}

/// The general case: no two boxes meet and the sizes add up, hence each element is held once.
fn check_strided(shape: &[usize], count: usize, regions: &[&Region]) -> Result<(), String> {
    if regions.len() > MAX_STRIDED_PIECES {
        return Err(format!(
            "{} pieces, some of them strided; at most {MAX_STRIDED_PIECES} are supported",
            regions.len()
        ));
    }
    let mut boxes = Vec::new();
    for region in regions {
        whole_boxes(region, &mut boxes);
    }
    boxes.sort_unstable_by_key(|block| block.first().map_or(0, |side| side.0));
    for (position, left) in boxes.iter().enumerate() {
        for right in &boxes[position + 1..] {
            if let (Some(left), Some(right)) = (left.first(), right.first())
                && right.0 >= left.0 + left.1
            {
                break;
            }
            let meet = left
                .iter()
                .zip(right)
                .all(|(l, r)| l.0 < r.0 + r.1 && r.0 < l.0 + l.1);
            if meet {
                return Err(format!(
                    "two pieces overlap: the boxes (start, extent per dimension) {left:?} and \
                     {right:?}"
                ));
            }
        }
    }
    let held = regions
        .iter()
        .try_fold(0usize, |sum, region| sum.checked_add(region.len()));
    match held {
        Some(held) if held == count => Ok(()),
        _ => Err(format!(
            "the pieces hold {} elements of the {count} of shape {shape:?}",
            held.map_or("too many".to_owned(), |held| held.to_string())
        )),
    }
}

/// A box as (start, extent) per dimension.
type Block = Vec<(usize, usize)>;

/// Splits a region, a row-major range of a box, into whole boxes: at most two per dimension more
/// than one.
fn whole_boxes(region: &Region, boxes: &mut Vec<Block>) {
    let sides: Block = region
        .start
        .iter()
        .copied()
        .zip(region.extent.iter().copied())
        .collect();
    split(&sides, 0, region.range[0], region.range[1], boxes);
}

/// Splits the range `from..to` of the box `sides`, whose dimensions before `dimension` have extent
/// 1.
fn split(sides: &Block, dimension: usize, from: usize, to: usize, boxes: &mut Vec<Block>) {
    if from >= to {
        return;
    }
    let elements: usize = sides[dimension..].iter().map(|side| side.1).product();
    if from == 0 && to == elements {
        boxes.push(sides.clone());
        return;
    }
    let (start, extent) = sides[dimension];
    let slab = elements / extent;
    let part = |first: usize, slabs: usize| {
        let mut part = sides.clone();
        part[dimension] = (start + first, slabs);
        part
    };
    let (mut first, last) = (from / slab, to / slab);
    if first == last {
        split(
            &part(first, 1),
            dimension + 1,
            from % slab,
            to % slab,
            boxes,
        );
        return;
    }
    if !from.is_multiple_of(slab) {
        split(&part(first, 1), dimension + 1, from % slab, slab, boxes);
        first += 1;
    }
    if first < last {
        boxes.push(part(first, last - first));
    }
    if !to.is_multiple_of(slab) {
        split(&part(last, 1), dimension + 1, 0, to % slab, boxes);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn region(start: [usize; 2], extent: [usize; 2], range: [usize; 2]) -> Region {
        Region {
            start: start.to_vec(),
            extent: extent.to_vec(),
            range,
        }
    }

    fn verdict(shape: &[usize], regions: &[Region]) -> Result<(), String> {
        check(
            shape,
            shape.iter().product(),
            &regions.iter().collect::<Vec<_>>(),
        )
    }

    #[test]
    fn holes_and_overlaps_of_flat_pieces_are_named() {
        let shape = [4, 4];
        let piece = |range| Region::flat(&shape, range);
        verdict(&shape, &[piece(8..16), piece(0..8)]).unwrap();
        assert_eq!(
            verdict(&shape, &[piece(0..7), piece(8..16)]).unwrap_err(),
            "elements 7..8 are in no piece"
        );
        assert_eq!(
            verdict(&shape, &[piece(0..9), piece(8..16)]).unwrap_err(),
            "elements 8..9 are in two pieces"
        );
        assert_eq!(
            verdict(&shape, &[piece(0..9)]).unwrap_err(),
            "elements 9..16 are in no piece"
        );
        assert_eq!(
            verdict(&shape, &[]).unwrap_err(),
            "elements 0..16 are in no piece"
        );
    }

    #[test]
    fn columns_split_over_two_owners_cover() {
        let shape = [3, 4];
        let left = region([0, 0], [3, 2], [0, 6]);
        let right_head = region([0, 2], [3, 2], [0, 3]);
        let right_tail = region([0, 2], [3, 2], [3, 6]);
        verdict(
            &shape,
            &[left.clone(), right_head.clone(), right_tail.clone()],
        )
        .unwrap();
        assert!(verdict(&shape, &[left.clone(), right_head.clone()]).is_err());
        let too_wide = region([0, 1], [3, 2], [0, 6]);
        assert!(
            verdict(&shape, &[left, too_wide])
                .unwrap_err()
                .contains("overlap")
        );
        assert!(verdict(&shape, &[right_head, right_tail]).is_err());
    }

    proptest! {
        /// Agrees with counting element by element.
        #[test]
        fn agrees_with_counting(
            shape in [1usize..4, 1usize..5, 1usize..5],
            raw in proptest::collection::vec(
                ([0usize..4, 0usize..5, 0usize..5], [1usize..5, 1usize..6, 1usize..6], 0usize..60, 1usize..60),
                0..6,
            ),
        ) {
            let mut regions = Vec::new();
            for (start, extent, from, len) in raw {
                let start: Vec<usize> = start.iter().zip(shape).map(|(s, n)| s % n).collect();
                let extent: Vec<usize> =
                    extent.iter().zip(&start).zip(shape).map(|((e, s), n)| *e.min(&(n - s))).collect();
                let elements: usize = extent.iter().product();
                let from = from % elements;
                regions.push(Region { start, extent, range: [from, (from + len).min(elements)] });
            }
            let mut held = vec![0; shape.iter().product()];
            for region in &regions {
                prop_assert!(region.check(&shape).is_ok());
                for index in region.range[0]..region.range[1] {
                    held[region.tensor_index(&shape, index)] += 1;
                }
            }
            let once = held.iter().all(|times| *times == 1);
            prop_assert_eq!(verdict(&shape, &regions).is_ok(), once);
        }
    }
}
