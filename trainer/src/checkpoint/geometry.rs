//! Boxes of a tensor and the row-major ranges inside them.
//!
//! The one fact everything here rests on: walking a box in its own row-major order visits the
//! elements of the tensor in ascending tensor order. So the elements of a piece that fall into a
//! requested range of the tensor are one contiguous range of the piece, found by bisection, and are
//! one contiguous range of bytes in its file.

use std::ops::Range;

use serde::{Deserialize, Serialize};

/// The largest number of dimensions a tensor may have.
pub(super) const MAX_DIMS: usize = 8;

/// Elements of a tensor of this shape; `None` if there are none or they cannot be counted.
pub(crate) fn element_count(shape: &[usize]) -> Option<usize> {
    let count = shape
        .iter()
        .try_fold(1usize, |product, &extent| product.checked_mul(extent))?;
    // Offsets in bytes must fit as well, so that no later product can overflow.
    (count > 0 && count <= usize::MAX / 16).then_some(count)
}

/// Some elements of a tensor: those of a box, in the box's row-major order, from `range[0]` up to
/// but without `range[1]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Region {
    /// First coordinate of the box per dimension of the tensor.
    pub start: Vec<usize>,
    /// Size of the box per dimension.
    pub extent: Vec<usize>,
    /// Row-major element range inside the box, end exclusive.
    pub range: [usize; 2],
}

/// Elements that are contiguous in the tensor as well as in the box.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// Row-major index of the first element in the tensor.
    pub tensor: usize,
    /// Row-major index of the first element in the box.
    pub index: usize,
    /// Number of elements.
    pub len: usize,
}

impl Region {
    /// The row-major range `range` of a whole tensor, in the fewest rows that hold it.
    ///
    /// `range` lies inside the tensor; otherwise the region fails the check when it is saved.
    pub fn flat(shape: &[usize], range: Range<usize>) -> Self {
        let mut start = vec![0; shape.len()];
        let mut extent = shape.to_vec();
        let mut bounds = [range.start, range.end];
        let row: usize = shape.iter().skip(1).product();
        if row > 0 && !shape.is_empty() && range.start < range.end {
            let first = range.start / row;
            start[0] = first;
            extent[0] = range.end.div_ceil(row) - first;
            bounds = [range.start - first * row, range.end - first * row];
        }
        Self {
            start,
            extent,
            range: bounds,
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.range[1].saturating_sub(self.range[0])
    }

    /// Whether the region holds no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Says what is wrong with this region of a tensor of `shape`, if anything is. All other
    /// methods rely on this check.
    pub(super) fn check(&self, shape: &[usize]) -> Result<(), String> {
        if self.start.len() != shape.len() || self.extent.len() != shape.len() {
            return Err(format!(
                "a box with {} start and {} extent coordinates in a tensor of shape {shape:?}",
                self.start.len(),
                self.extent.len()
            ));
        }
        for (dimension, size) in shape.iter().enumerate() {
            let (start, extent) = (self.start[dimension], self.extent[dimension]);
            if extent == 0 || start.checked_add(extent).is_none_or(|end| end > *size) {
                return Err(format!(
                    "a box of start {:?} and extent {:?} does not lie in shape {shape:?}",
                    self.start, self.extent
                ));
            }
        }
        let elements = element_count(&self.extent).unwrap_or(0);
        if self.range[0] >= self.range[1] || self.range[1] > elements {
            return Err(format!(
                "element range {:?} is empty or leaves its box of {elements} elements",
                self.range
            ));
        }
        Ok(())
    }

    /// Row-major index in the tensor of the box's element `index`.
    pub(super) fn tensor_index(&self, shape: &[usize], index: usize) -> usize {
        let (mut rest, mut stride, mut position) = (index, 1, 0);
        for dimension in (0..shape.len()).rev() {
            position += (self.start[dimension] + rest % self.extent[dimension]) * stride;
            rest /= self.extent[dimension];
            stride *= shape[dimension];
        }
        position
    }

    /// Elements of the box that stay contiguous in the tensor: its whole trailing dimensions times
    /// the extent of the first one that is cut.
    fn contiguous(&self, shape: &[usize]) -> usize {
        let mut block = 1;
        for dimension in (0..shape.len()).rev() {
            block *= self.extent[dimension];
            if self.extent[dimension] != shape[dimension] {
                break;
            }
        }
        block
    }

    /// The tensor range that this region is, if it is one contiguous range of the tensor.
    pub(super) fn as_flat(&self, shape: &[usize]) -> Option<Range<usize>> {
        let block = self.contiguous(shape);
        (self.range[0] / block == (self.range[1] - 1) / block).then(|| {
            let first = self.tensor_index(shape, self.range[0]);
            first..first + self.len()
        })
    }

    /// The indices in the box of this region's elements that lie in `request`, a range of the
    /// tensor. Empty if there are none.
    pub(super) fn overlap(&self, shape: &[usize], request: &Range<usize>) -> Range<usize> {
        let lower_bound = |target: usize| {
            let (mut low, mut high) = (self.range[0], self.range[1]);
            while low < high {
                let middle = low + (high - low) / 2;
                if self.tensor_index(shape, middle) < target {
                    low = middle + 1;
                } else {
                    high = middle;
                }
            }
            low
        };
        lower_bound(request.start)..lower_bound(request.end)
    }

    /// The contiguous runs that the box's elements `indices` make in the tensor, in order.
    pub(super) fn runs<'a>(
        &'a self,
        shape: &'a [usize],
        indices: Range<usize>,
    ) -> impl Iterator<Item = Run> + 'a {
        let block = self.contiguous(shape);
        let mut index = indices.start;
        std::iter::from_fn(move || {
            if index >= indices.end {
                return None;
            }
            let len = (block - index % block).min(indices.end - index);
            let run = Run {
                tensor: self.tensor_index(shape, index),
                index,
                len,
            };
            index += len;
            Some(run)
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn flat_regions_are_tight_and_flat() {
        let shape = [5, 4];
        for start in 0..20 {
            for end in start + 1..=20 {
                let region = Region::flat(&shape, start..end);
                region.check(&shape).unwrap();
                assert_eq!(region.as_flat(&shape), Some(start..end));
                assert_eq!(region.extent[0], end.div_ceil(4) - start / 4);
            }
        }
        assert_eq!(Region::flat(&[], 0..1).as_flat(&[]), Some(0..1));
    }

    #[test]
    fn strided_boxes_map_to_the_tensor() {
        let shape = [3, 4];
        let region = Region {
            start: vec![1, 1],
            extent: vec![2, 2],
            range: [0, 4],
        };
        region.check(&shape).unwrap();
        assert_eq!(region.as_flat(&shape), None);
        let runs: Vec<Run> = region.runs(&shape, 0..4).collect();
        assert_eq!(
            runs,
            [
                Run {
                    tensor: 5,
                    index: 0,
                    len: 2
                },
                Run {
                    tensor: 9,
                    index: 2,
                    len: 2
                }
            ]
        );
        assert_eq!(region.overlap(&shape, &(6..10)), 1..3);
        assert_eq!(region.overlap(&shape, &(7..9)), 2..2);
        assert_eq!(region.overlap(&shape, &(0..12)), 0..4);
    }

    #[test]
    fn impossible_regions_are_named() {
        let shape = [3, 4];
        for (start, extent, range) in [
            (vec![0], vec![3, 4], [0, 12]),
            (vec![0, 0], vec![3], [0, 12]),
            (vec![2, 0], vec![2, 4], [0, 8]),
            (vec![usize::MAX, 0], vec![2, 4], [0, 8]),
            (vec![0, 0], vec![0, 4], [0, 0]),
            (vec![0, 0], vec![3, 4], [0, 13]),
            (vec![0, 0], vec![3, 4], [5, 5]),
            (vec![0, 0], vec![3, 4], [6, 5]),
        ] {
            assert!(
                Region {
                    start,
                    extent,
                    range
                }
                .check(&shape)
                .is_err()
            );
        }
    }

    #[test]
    fn uncountable_shapes_have_no_count() {
        assert_eq!(element_count(&[usize::MAX, 2]), None);
        assert_eq!(element_count(&[usize::MAX]), None);
        assert_eq!(element_count(&[3, 0]), None);
        assert_eq!(element_count(&[]), Some(1));
    }
}
