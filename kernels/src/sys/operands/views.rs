//! Views `[batch, seq, heads, d]`, some of which lie side by side in the rows of one buffer.

use tch::{Kind, Tensor};

use super::Operands;
use super::claims::{Claims, Span};
use crate::{Error, Scalar};

/// Where a tensor `[batch, seq, heads, d]` lies.
pub(crate) struct View {
    /// Address of the first element.
    start: usize,
    shape: [usize; 4],
    /// Of sample, token and head, in elements; 0 for an axis of one.
    strides: [usize; 3],
    /// Elements from the first to the last.
    reach: usize,
    /// Bytes of an element.
    element: usize,
}

/// Elements from the first to the last of a view; strides are those of sample, token and head.
pub(crate) fn reach([batch, seq, heads, d]: [usize; 4], strides: [usize; 3]) -> usize {
    if batch * seq * heads * d == 0 {
        return 0;
    }
    (batch - 1) * strides[0] + (seq - 1) * strides[1] + (heads - 1) * strides[2] + d
}

impl View {
    fn end(&self) -> usize {
        self.start + self.reach * self.element
    }

    /// Bytes from the first to the last element of one token.
    fn row(&self) -> usize {
        let [_, _, heads, d] = self.shape;
        reach([1, 1, heads, d], self.strides) * self.element
    }

    /// Whether no element of `other` is one of this view, as far as can be seen: they lie apart, or
    /// their tokens lie in the same rows and apart in each.
    fn is_beside(&self, other: &View) -> bool {
        if self.reach == 0 || other.reach == 0 {
            return true;
        }
        if self.end() <= other.start || other.end() <= self.start {
            return true;
        }
        let outer = |view: &View| [0, 1].map(|axis| (view.strides[axis], view.shape[axis]));
        if outer(self) != outer(other) {
            return false;
        }
        let (first, second) = if self.start < other.start {
            (self, other)
        } else {
            (other, self)
        };
        let at = second.start - first.start;
        // Rows of both together must not reach into the next ones.
        let mut covered = first.row().max(at + second.row());
        let mut steps = outer(self).map(|(stride, size)| (stride * self.element, size));
        steps.sort_unstable();
        for (stride, size) in steps.into_iter().filter(|&(_, size)| size > 1) {
            if stride < covered {
                return false;
            }
            covered += (size - 1) * stride;
        }
        first.row() <= at
    }
}

impl Operands {
    /// A view `[batch, seq, heads, d]` whose heads are dense, to be read: the elements from its first
    /// to its last, and the strides of sample, token and head.
    ///
    /// # Errors
    /// Any of the argument errors of [`Error`].
    pub fn read_view<'t, E: Scalar>(
        &mut self,
        name: &'static str,
        tensor: &'t Tensor,
        shape: [usize; 4],
    ) -> Result<(&'t [E], [usize; 3]), Error> {
        let view = self.claims.view(name, tensor, E::KIND, shape)?;
        if view.reach > 0 {
            self.claims.claim_span(Span {
                name,
                start: view.start,
                end: view.end(),
                written: false,
            })?;
        } else {
            return Ok((&[], view.strides));
        }
        // SAFETY: a defined CPU tensor of this dtype owns all elements that its strides reach for as
        // long as it is borrowed; `claim` saw no written argument among them.
        let elements = unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast(), view.reach) };
        Ok((elements, view.strides))
    }

    /// Views `[batch, seq, heads, d]` of one shape but for the heads, to be written: where each
    /// begins and the strides of sample, token and head. They may lie side by side in the rows of one
    /// buffer; no two have an element in common.
    ///
    /// # Errors
    /// Any of the argument errors of [`Error`].
    pub fn write_views<E: Scalar, const N: usize>(
        &mut self,
        views: [(&'static str, &mut Tensor, [usize; 4]); N],
    ) -> Result<[(*mut E, [usize; 3]); N], Error> {
        let mut found = [(std::ptr::null_mut(), [0; 3]); N];
        let mut claimed: Vec<(&'static str, View)> = Vec::with_capacity(N);
        for (found, (name, tensor, shape)) in found.iter_mut().zip(views) {
            let view = self.claims.view(name, tensor, E::KIND, shape)?;
            for (other, before) in &claimed {
                if !view.is_beside(before) {
                    return Err(Error::Overlap {
                        op: self.op(),
                        first: other,
                        second: name,
                    });
                }
            }
            *found = (tensor.data_ptr().cast(), view.strides);
            claimed.push((name, view));
        }
        // Against all other arguments they count as one, from the first element to the last.
        let filled = || claimed.iter().filter(|(_, view)| view.reach > 0);
        let start = filled().map(|(_, view)| view.start).min();
        let end = filled().map(|(_, view)| view.end()).max();
        if let (Some(start), Some(end), Some((name, _))) = (start, end, claimed.first()) {
            self.claims.claim_span(Span {
                name,
                start,
                end,
                written: true,
            })?;
        }
        Ok(found)
    }
}

impl Claims {
    /// A view `[batch, seq, heads, d]` whose heads are dense. Its memory is not claimed.
    pub(crate) fn view(
        &self,
        name: &'static str,
        tensor: &Tensor,
        kind: Kind,
        shape: [usize; 4],
    ) -> Result<View, Error> {
        self.check(name, tensor, kind, &shape)?;
        let found = tensor.stride();
        if shape[3] > 1 && found[3] != 1 {
            return Err(self.layout(name, tensor, "dense within a head"));
        }
        let mut strides = [0; 3];
        for ((to, &stride), size) in strides.iter_mut().zip(&found).zip(shape) {
            // The stride of an axis of one is never used, and may be anything.
            *to = if size > 1 {
                usize::try_from(stride).unwrap_or(0)
            } else {
                0
            };
        }
        let view = View {
            start: tensor.data_ptr() as usize,
            shape,
            strides,
            reach: reach(shape, strides),
            element: kind.elt_size_in_bytes(),
        };
        if !view.start.is_multiple_of(kind.elt_size_in_bytes()) {
            return Err(self.layout(name, tensor, "aligned to its element size"));
        }
        Ok(view)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::testing::zeros;
    use tch::Kind;

    const SHAPE: [usize; 4] = [2, 3, 2, 4];

    fn write(a: &mut Tensor, b: &mut Tensor) -> Result<(), Error> {
        let mut operands = Operands::new("test");
        let views = [("a", a, SHAPE), ("b", b, SHAPE)];
        operands.write_views::<f32, 2>(views).map(drop)
    }

    #[test]
    fn views_may_lie_side_by_side_but_not_overlap() {
        let fused = zeros(&[2, 3, 5, 4], Kind::Float);
        let cut = |first| fused.narrow(2, first, 2);
        write(&mut cut(0), &mut cut(2)).unwrap();
        write(&mut cut(3), &mut cut(0)).unwrap();
        let overlap = write(&mut cut(0), &mut cut(1)).unwrap_err();
        assert!(matches!(overlap, Error::Overlap { .. }), "{overlap}");
        assert!(write(&mut cut(2), &mut cut(2)).is_err());
        write(&mut cut(0), &mut zeros(&[2, 3, 2, 4], Kind::Float)).unwrap();
        // The rows of one reach into those of the other.
        let flat = zeros(&[200], Kind::Float);
        let strided = |at| flat.as_strided([2, 3, 2, 4], [60, 12, 4, 1], at);
        write(&mut strided(0), &mut strided(6)).unwrap_err();
    }

    #[test]
    fn what_is_written_is_not_read() {
        let fused = zeros(&[2, 3, 5, 4], Kind::Float);
        let mut operands = Operands::new("test");
        let (mut a, b) = (fused.narrow(2, 0, 2), fused.narrow(2, 2, 2));
        let (elements, strides) = operands.read_view::<f32>("b", &b, SHAPE).unwrap();
        assert_eq!((elements.len(), strides), (5 * 20 + 8, [60, 20, 4]));
        // Whoever reads gets a slice over what lies between the rows, too.
        let refused = operands.write_views::<f32, 1>([("a", &mut a, SHAPE)]);
        assert!(matches!(refused, Err(Error::Overlap { .. })));
        assert!(
            Operands::new("test")
                .read_view::<f32>("b", &b, [2, 3, 2, 5])
                .is_err()
        );
        let turned = zeros(&[2, 3, 4, 2], Kind::Float).transpose(2, 3);
        assert!(
            Operands::new("test")
                .read_view::<f32>("t", &turned, SHAPE)
                .is_err()
        );
    }
}
